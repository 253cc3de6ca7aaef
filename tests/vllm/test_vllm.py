"""Real vLLM, launched by `serve`: the transports against it, and coral over it. `just test-vllm` sets it up."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from matrix_bus.broker import Broker
from matrix_bus.config import ModelConfig
from matrix_bus.llm import ModelPool
from tests import conformance
from tests.acceptance.conftest import Shell

PYTHON, FOLDER = os.environ.get("VLLM_PYTHON", ""), os.environ.get("VLLM_MODEL", "")
QUESTIONS = Path(__file__).parents[2] / "agents" / "matrix_agents" / "coral" / "questions.jsonl"

pytestmark = [
    pytest.mark.skipif(not (PYTHON and FOLDER), reason="needs vLLM in an environment of its own: just test-vllm"),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Broker, str]]:
    """A terminal, its broker, and the URL of a vLLM that `serve` has launched."""
    folder = tmp_path_factory.mktemp("vllm")
    shell = Shell(folder)
    with Broker(folder / "broker") as broker:
        words = ("--model", "smollm2", "--python", PYTHON, "--server", broker.url)
        extra = ("--max-model-len", "2048", "--max-num-seqs", "64", "--dtype", "float32")
        serving = shell.start(
            "serve", FOLDER, *words, "--", *extra,
            VLLM_CPU_KVCACHE_SPACE="2", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
        )  # fmt: skip
        serving.says("serving smollm2 at ", 900)
        found = re.search(r"serving smollm2 at (\S+)", serving.said)
        assert found is not None
        yield shell, broker, found[1]
        serving.signal(signal.SIGTERM)
        assert serving.ends(60) == 0
        shell.end()


@pytest.fixture(params=["direct", "sdk"])
async def pool(request: pytest.FixtureRequest, served: tuple[Shell, Broker, str]) -> AsyncIterator[ModelPool]:
    made = ModelPool(ModelConfig(model="smollm2", transport=request.param, patience_s=0), [served[2]])
    yield made
    await made.close()


EVERYTHING = [
    *conformance.ALL,
    conformance.knows_its_models,
    conformance.decodes_by_a_schema,
    conformance.has_choices_and_logprobs,
]


@pytest.mark.parametrize("check", EVERYTHING)
async def test_both_transports(pool: ModelPool, check: conformance.Check) -> None:
    await check(pool)


async def test_it_is_the_model(pool: ModelPool) -> None:
    assert "Paris" in (await conformance.llm_over(pool).chat(conformance.CHAT)).text


def test_coral_over_it(served: tuple[Shell, Broker, str]) -> None:
    shell, broker, _ = served
    data = shell.directory / "eight.jsonl"
    data.write_text("\n".join(QUESTIONS.read_text().splitlines()[:8]) + "\n")
    server = ("--server", broker.url)
    shell.start("worker", *server)
    words = ("llm.model=smollm2", "llm.max_tokens=64", "workflow.max_turns=4")
    submitted = shell.run("submit", str(data), *server, *words, timeout_s=900)
    assert submitted.returncode == 0, submitted.stderr
    lines = [json.loads(line) for line in (shell.directory / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert {line["outcome"] for line in lines} <= {"success", "filtered"}
    assert all(line["usage"]["completion_tokens"] > 0 for line in lines)
    listed = shell.run("endpoints", *server).stdout
    assert "tokens/s" in listed
