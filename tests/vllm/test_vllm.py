"""Real vLLM, launched by `serve`: the transports against it, and coral over it. `just test-vllm` sets it up."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from matrix_bus.broker import Broker
from matrix_bus.config import ModelConfig, Sampling
from matrix_bus.errors import ContextLengthExceeded, ModelNotFound
from matrix_bus.llm import LLM, ChatRequest, ModelPool, user
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


def llm_over(pool: ModelPool) -> LLM:
    return LLM(lambda _: pool, "default", Sampling(temperature=0.0, max_tokens=40), [], "tester", 1, 1, 7)


CHAT = [user("What is the capital of France?")]


async def test_a_chat_with_usage(pool: ModelPool) -> None:
    await pool.check()
    reply = await llm_over(pool).chat(CHAT)
    assert "Paris" in reply.text
    assert reply.finish_reason in ("stop", "length")
    assert reply.usage.prompt_tokens > 10
    assert 0 < reply.usage.completion_tokens <= 40


async def test_a_streamed_chat_says_the_same(pool: ModelPool) -> None:
    heard: list[str] = []
    reply = await llm_over(pool).chat(CHAT, on_text=heard.append)
    assert len(heard) > 1
    assert "".join(heard) == reply.text == (await llm_over(pool).chat(CHAT)).text
    assert reply.usage.completion_tokens > 0
    assert 0 < reply.first_s <= reply.latency_s


async def test_choices_logprobs_and_stop(pool: ModelPool) -> None:
    reply = await llm_over(pool).chat(CHAT, n=3, logprobs=2, temperature=1.0)
    assert len(reply.choices) == 3
    assert reply.logprobs is not None
    assert len(reply.logprobs["content"][0]["top_logprobs"]) == 2
    stopped = await llm_over(pool).chat(CHAT, stop=["Paris"])
    assert "Paris" not in stopped.text


class City(msgspec.Struct):
    name: str
    is_capital: bool


async def test_guided_decoding(pool: ModelPool) -> None:
    city = await llm_over(pool).parse([user("Describe Paris as JSON with name and is_capital.")], City, max_tokens=60)
    assert isinstance(city, City)
    assert pool.guided


async def test_what_is_wrong_is_told_apart(pool: ModelPool) -> None:
    with pytest.raises(ModelNotFound, match="smollm2"):
        await pool.complete(ChatRequest("other", CHAT))
    with pytest.raises(ContextLengthExceeded):
        await llm_over(pool).chat([user("word " * 5000)])


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
