"""Real servers for the tests: private brokers, and one server of the embedded model; never the user's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from matrix_bus.broker import Broker


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A fresh private broker, for a test that kills or restarts it."""
    with Broker(tmp_path / "broker") as server:
        yield server


@pytest.fixture(scope="session")
def shared_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A private broker for all tests that leave it running and use run ids of their own."""
    with Broker(tmp_path_factory.mktemp("shared-broker")) as server:
        yield server


@pytest.fixture(scope="session")
def model_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL, with `/v1`, of a server of the embedded model, which is fetched on the first run.

    Mark the test `@pytest.mark.model`.
    """
    pytest.importorskip("xllamacpp", reason="the embedded model needs the extra 'local'")
    from matrix_serving import MODEL_NAME, resolve_model

    log = tmp_path_factory.mktemp("model") / "log"
    command = [
        sys.executable,
        "-m",
        "matrix_serving.llama",
        "--model",
        str(resolve_model()),
        "--name",
        MODEL_NAME,
    ]
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as server:
        assert server.stdout is not None
        url = server.stdout.readline().decode().strip()
        try:
            assert url, f"the model server did not start: {log.read_text()}"
            yield url
        finally:
            server.terminate()
