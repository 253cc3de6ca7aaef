"""The embedded model, for real: served, asked, stopped. Fetches 98 MB on a machine's first run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from matrix_bus.errors import UsageError
from matrix_bus.service import LocalService, port_is_free
from matrix_serving import MODEL_NAME, local_model, resolve_model
from matrix_serving.local import models_at
from matrix_serving.serve import serve

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]


def chat(url: str, text: str, max_tokens: int = 16) -> dict[str, Any]:
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    request = Request(f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    """The user's shared model server, of a user whose state is in `tmp_path`."""
    monkeypatch.setenv("MATRIX_BUS_HOME", str(tmp_path / "home"))
    shared = local_model()
    yield shared
    shared.stop()


def test_it_answers_with_text_and_usage(model_url: str) -> None:
    answer = chat(model_url, "What is gravity?")
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["model"] == MODEL_NAME
    assert answer["usage"]["prompt_tokens"] > 0
    assert 0 < answer["usage"]["completion_tokens"] <= 16


def test_health_and_models(model_url: str) -> None:
    with urlopen(f"{model_url.removesuffix('/v1')}/health", timeout=10) as reply:
        assert json.load(reply) == {"status": "ok"}
    assert [model["id"] for model in models_at(model_url)] == [MODEL_NAME]


def test_more_calls_than_slots_wait_in_line(model_url: str) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: chat(model_url, f"Count from {n}.", 4), range(20)))
    assert all(answer["usage"]["completion_tokens"] > 0 for answer in answers)


def test_shared_found_again_replaced_on_its_port_and_stopped(service: LocalService) -> None:
    assert service.status() is None
    first = service.ensure()
    assert first.started_by_us
    assert local_model().ensure().pid == first.pid
    port = int(first.url.removesuffix("/v1").rpartition(":")[2])
    os.kill(first.pid, signal.SIGKILL)
    while not port_is_free(port):  # until it is gone
        pass
    second = service.ensure()
    assert second.url == first.url
    assert second.pid != first.pid
    assert service.stop() is True
    assert models_at(first.url) == []
    assert port_is_free(port)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_serve_prints_how_to_use_it_and_stops_in_the_middle_of_a_call(signum: signal.Signals) -> None:
    code = "from matrix_serving.serve import serve; serve(parallel=2)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        url = line.split()[3]
        try:
            assert line == f"serving {MODEL_NAME} at {url} (use it with llm.urls={url})\n"
            generating = threading.Thread(target=_chat_until_cut, args=(url,))
            generating.start()
            while not _busy(url):  # a real condition: the server decodes
                pass
            server.send_signal(signum)
            assert server.wait(5) == 0
            generating.join(10)
        finally:
            server.kill()  # else a failed assertion would wait for it here for ever


def _chat_until_cut(url: str) -> None:
    try:
        chat(url, "Tell me a very long story.", 1900)
    except OSError:
        return
    raise AssertionError("the call outlived the server")


def _busy(url: str) -> bool:
    with urlopen(f"{url.removesuffix('/v1')}/slots", timeout=10) as reply:
        return any(slot["is_processing"] for slot in json.load(reply))


def test_what_is_wrong_is_said(tmp_path: Path, model_url: str) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    port = model_url.removesuffix("/v1").rpartition(":")[2]
    command = [sys.executable, "-m", "matrix_serving.llama", "--name", "x"]
    for arguments in (
        ["--model", str(broken)],
        ["--model", str(resolve_model()), "--port", port],
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "error: the model server did not start" in done.stderr
        assert "Traceback" not in done.stderr


def test_without_xllamacpp_the_advice_is_to_install_it(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(UsageError, match=r"matrix-bus\[local\]"):
        service.ensure()
    with pytest.raises(UsageError, match=r"matrix-bus\[local\]"):
        serve()


def test_serve_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UsageError, match=r"unknown backend 'vlm'.*llama"):
        serve("vlm")
    with pytest.raises(UsageError, match="parallel=0"):
        serve(parallel=0)
