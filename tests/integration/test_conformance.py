"""The same calls over both transports, against the simulator and against the embedded model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from matrix_bus.config import EMBEDDED_MODEL, ModelConfig
from matrix_bus.llm import ModelPool
from tests import conformance

PAGE = "Paris has been the capital of France for a thousand years, with few interruptions, and is its largest city."


@pytest.fixture(scope="module")
def simulator_url() -> Iterator[str]:
    words = ["--profile", "embedded", "--model", EMBEDDED_MODEL, "--responder", f"fixed:{PAGE}"]
    command = [sys.executable, "-m", "matrix_serving.simulator", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.fixture(params=["direct", "sdk"])
async def simulated(request: pytest.FixtureRequest, simulator_url: str) -> AsyncIterator[ModelPool]:
    pool = ModelPool(ModelConfig(transport=request.param, patience_s=0), [simulator_url])
    yield pool
    await pool.close()


@pytest.fixture(params=["direct", "sdk"])
async def embedded(request: pytest.FixtureRequest, model_url: str) -> AsyncIterator[ModelPool]:
    pool = ModelPool(ModelConfig(transport=request.param, patience_s=0), [model_url])
    yield pool
    await pool.close()


@pytest.mark.parametrize("check", [*conformance.ALL, conformance.knows_its_models])
async def test_the_simulator(simulated: ModelPool, check: conformance.Check) -> None:
    await check(simulated)


@pytest.mark.model
@pytest.mark.parametrize("check", [*conformance.ALL, conformance.decodes_by_a_schema])
async def test_the_embedded_model(embedded: ModelPool, check: conformance.Check) -> None:
    await check(embedded)
