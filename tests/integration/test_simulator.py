"""The simulated server as a process of its own, asked by the stock `openai` client and by our own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any
from urllib.request import urlopen

import aiohttp
import openai
import pytest

from matrix_bus.config import Sampling
from matrix_bus.errors import ContextLengthExceeded, EndpointGone, ModelNotFound, RateLimited, ReplyInvalid
from matrix_bus.llm import ChatRequest, user
from matrix_bus.llm.direct import DirectTransport
from tests.helpers import until, until_sync

SLOW_PROFILE = {
    "name": "slow",
    "source": "made up for a test",
    "prefill_tokens_per_s": 100_000,
    "base_s": 0.002,
    "per_seq_s": 0,
    "max_num_seqs": 2,
    "max_model_len": 4096,
    "kv_cache_tokens": 8192,
}


class Process:
    """A running simulator."""

    def __init__(self, popen: subprocess.Popen[str], url: str) -> None:
        self.popen = popen
        self.url = url
        self.root = url.removesuffix("/v1")
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30)

    def metrics(self) -> dict[str, float]:
        with urlopen(f"{self.root}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {
            re.sub(r',?model_name="simulated",?', "", name).replace("{}", ""): float(value)
            for name, _, value in samples
        }


@contextlib.contextmanager
def simulator(
    profile: str | Path, *arguments: str, cwd: Path | None = None, errors: IO[bytes] | None = None
) -> Iterator[Process]:
    command = [sys.executable, "-m", "matrix_serving.simulator", "--profile", str(profile), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=cwd) as popen:
        assert popen.stdout is not None
        url = popen.stdout.readline().strip()
        try:
            assert url.endswith("/v1")
            process = Process(popen, url)
            with process.client:
                yield process
        finally:
            popen.kill()


@pytest.fixture(scope="module")
def instant() -> Iterator[Process]:
    with simulator("instant") as process:
        yield process


@pytest.fixture
def slow_profile(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = tmp_path / "slow.json"
        path.write_text(json.dumps({**SLOW_PROFILE, **changes}))
        return path

    return write


def chat(process: Process, text: str = "hello there", **parameters: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return process.client.chat.completions.create(**{"model": "simulated", "messages": messages, **parameters})


def test_the_stock_client_chats(instant: Process) -> None:
    reply = chat(instant, "x" * 10)
    assert reply.choices[0].message.content == "x" * 10
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 3, 6)
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    assert [model.id for model in instant.client.models.list()] == ["simulated"]
    with urlopen(f"{instant.root}/health", timeout=10) as health:
        assert health.status == 200


def test_max_tokens_n_stop_and_tools(instant: Process) -> None:
    cut = chat(instant, "x" * 100, max_tokens=5, n=3)
    assert [choice.message.content for choice in cut.choices] == ["x" * 20] * 3
    assert {choice.finish_reason for choice in cut.choices} == {"length"}
    assert (cut.usage.prompt_tokens, cut.usage.completion_tokens) == (25, 15)
    assert chat(instant, "one, two", stop=[", "]).choices[0].message.content == "one"
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    assert chat(instant, "hello", tools=[tool]).choices[0].message.tool_calls is None


@pytest.mark.parametrize("profile", ["instant", "slow"])
def test_the_stock_client_streams(profile: str, slow_profile: Callable[..., Path]) -> None:
    text = "a stream of several tokens"
    with simulator("instant" if profile == "instant" else slow_profile()) as process:
        chunks = list(chat(process, text, n=2, stream=True, stream_options={"include_usage": True}))
    said = {0: "", 1: ""}
    ends: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        assert choice.index not in ends, "something after the end"
        said[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert said == {0: text, 1: text}
    assert ends == {0: "stop", 1: "stop"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 14
    if profile == "slow":
        assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) == 14


def test_mistakes_are_answered_as_openai_does(instant: Process) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        chat(instant, model="other")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 131072 tokens"):
        chat(instant, "x" * 600_000)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chat(instant, "x", max_tokens=131_072)
    with pytest.raises(openai.BadRequestError, match="messages"):
        chat(instant, messages=[])
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings"):
        instant.client.embeddings.create(model="simulated", input="x")


async def test_our_client_understands_its_errors(instant: Process) -> None:
    async def ask(process: Process, text: str = "hello", model: str = "simulated") -> str:
        transport = DirectTransport(process.url)
        try:
            return (await transport.complete(ChatRequest(model, [user(text)], Sampling()), 30.0)).text
        finally:
            await transport.close()

    assert await ask(instant) == "hello"
    with pytest.raises(ModelNotFound, match="it has 'simulated'"):
        await ask(instant, model="other")
    with pytest.raises(ContextLengthExceeded):
        await ask(instant, "x" * 600_000)
    for spec, error in (("429=1", RateLimited), ("500=1", EndpointGone), ("malformed=1", ReplyInvalid)):
        with simulator("instant", "--fail", spec) as process, pytest.raises(error):
            await ask(process)


def test_it_asks_to_wait_or_fails() -> None:
    with simulator("instant", "--fail", "429=1", "--retry-after-s", "7") as process:
        with pytest.raises(openai.RateLimitError) as limited:
            chat(process)
        assert limited.value.response.headers["Retry-After"] == "7"
    with simulator("instant", "--fail", "500=1") as process, pytest.raises(openai.InternalServerError):
        chat(process)


def test_a_share_of_the_calls_fails() -> None:
    with simulator("instant", "--fail", "500=0.5", "--seed", "3") as process:
        answered = 0
        for _ in range(60):
            with contextlib.suppress(openai.InternalServerError):
                answered += len(chat(process).choices)
    assert 15 < answered < 45


def test_answers_without_choices_and_broken_ones() -> None:
    with simulator("instant", "--fail", "empty=1") as process:
        assert chat(process).choices == []
        assert not any(chunk.choices for chunk in chat(process, stream=True))
    with simulator("instant", "--fail", "malformed=1") as process:
        with pytest.raises(json.JSONDecodeError):
            chat(process)
        with pytest.raises(json.JSONDecodeError), chat(process, stream=True) as stream:
            list(stream)


def test_a_slow_call_is_answered_and_a_hanging_one_is_not() -> None:
    with simulator("instant", "--fail", "slow=1", "--slow-s", "0.2") as process:
        assert chat(process).choices
    with simulator("instant", "--fail", "hang=1") as process:
        with pytest.raises(openai.APITimeoutError):
            process.client.with_options(timeout=0.5).chat.completions.create(
                model="simulated", messages=[{"role": "user", "content": "x"}]
            )
        with urlopen(f"{process.root}/health", timeout=10) as health:
            assert health.status == 200


def test_a_crash_ends_the_process() -> None:
    with simulator("instant", "--fail", "crash=1") as process:
        with pytest.raises(openai.APIConnectionError):
            chat(process)
        assert process.popen.wait(10) == 1


def test_metrics_have_the_names_of_vllm(slow_profile: Callable[..., Path]) -> None:
    with simulator(slow_profile(), "--output-tokens", "fixed:16") as process:
        prompt = "x" * 4 * 64
        assert chat(process, prompt).usage.prompt_tokens_details.cached_tokens == 0
        assert chat(process, prompt).usage.prompt_tokens_details.cached_tokens == 48
        found = process.metrics()
    assert found["vllm:prompt_tokens_total"] == 128
    assert found["vllm:generation_tokens_total"] == 32
    assert found["vllm:prefix_cache_queries_total"] == 128
    assert found["vllm:prefix_cache_hits_total"] == 48
    assert found["vllm:time_to_first_token_seconds_count"] == 2
    assert found["vllm:e2e_request_latency_seconds_count"] == 2
    assert found["vllm:e2e_request_latency_seconds_sum"] >= found["vllm:time_to_first_token_seconds_sum"]
    idle = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc")
    assert [found[f"vllm:{name}"] for name in (*idle, "num_preemptions_total")] == [0] * 5


def test_calls_queue_and_are_preempted(slow_profile: Callable[..., Path]) -> None:
    profile = slow_profile(base_s=0.005, max_num_seqs=4, max_model_len=200, kv_cache_tokens=400)
    with simulator(profile, "--output-tokens", "fixed:100") as process, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(chat, process, f"{n}" * 200) for n in range(8)]
        until_sync(lambda: process.metrics()["vllm:num_requests_waiting"] >= 4, "calls that wait")
        assert process.metrics()["vllm:num_requests_running"] <= 4
        assert {call.result().usage.completion_tokens for call in calls} == {100}
        found = process.metrics()
    assert found["vllm:num_preemptions_total"] > 0
    assert found["vllm:generation_tokens_total"] == 800


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_frees_its_place(stream: bool, slow_profile: Callable[..., Path]) -> None:
    with simulator(slow_profile(base_s=0.05), "--output-tokens", "fixed:3000") as process:
        body = {"model": "simulated", "messages": [{"role": "user", "content": "x"}], "stream": stream}
        async with aiohttp.ClientSession() as session:

            async def ask() -> None:
                async with session.post(f"{process.url}/chat/completions", json=body) as response:
                    await response.read()

            call = asyncio.create_task(ask())
            await until(lambda: process.metrics()["vllm:num_requests_running"] == 1, "a call that runs")
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        await until(lambda: process.metrics()["vllm:num_requests_running"] == 0, "the place is free")
        assert process.metrics()['vllm:request_success_total{finished_reason="abort"}'] == 1


async def test_streams_that_are_given_up_are_no_errors(slow_profile: Callable[..., Path], tmp_path: Path) -> None:
    profile = slow_profile(max_num_seqs=100, base_s=0.001, kv_cache_tokens=100 * 4096)
    body = {"model": "simulated", "messages": [{"role": "user", "content": "x"}], "stream": True}
    with (
        (tmp_path / "errors").open("wb") as errors,
        simulator(profile, "--output-tokens", "fixed:4000", errors=errors) as process,
    ):
        for _ in range(5):
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                calls = [session.post(f"{process.url}/chat/completions", json=body) for _ in range(40)]
                for response in await asyncio.gather(*calls):
                    response.close()
        await until(lambda: process.metrics()["vllm:num_requests_running"] == 0, "all are forgotten")
        assert process.metrics()['vllm:request_success_total{finished_reason="abort"}'] == 200
    assert (tmp_path / "errors").read_text() == ""


def test_a_script_answers(tmp_path: Path) -> None:
    (tmp_path / "roles.py").write_text(
        "async def answer(request):\n"
        "    if request['messages'][-1]['content'] == 'fail':\n"
        "        raise KeyError('no such role')\n"
        "    return request['model'] + ' says ' + request['messages'][0]['content'].upper()\n"
    )
    with simulator("instant", "--responder", "script:roles:answer", cwd=tmp_path) as process:
        assert chat(process, "hi").choices[0].message.content == "simulated says HI"
        with pytest.raises(openai.InternalServerError, match="no such role"):
            chat(process, "fail")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_calls_under_way(signum: int, slow_profile: Callable[..., Path]) -> None:
    arguments = ("--output-tokens", "fixed:3000")
    with simulator(slow_profile(base_s=0.05), *arguments) as process, ThreadPoolExecutor(1) as pool:
        call = pool.submit(chat, process)
        until_sync(lambda: process.metrics()["vllm:num_requests_running"] == 1, "a call that runs")
        process.popen.send_signal(signum)
        assert process.popen.wait(15) == 0
        assert isinstance(call.exception(15), openai.APIConnectionError)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--profile", "h100"], "embedded, instant"),
        (["--profile", "instant", "--fail", "418=1"], "418"),
        (["--profile", "instant", "--responder", "parrot"], "parrot"),
        (["--profile", "instant", "--output-tokens", "many"], "many"),
        (["--profile", "instant", "--port", "99999"], "port 99999"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], told: str) -> None:
    command = [sys.executable, "-m", "matrix_serving.simulator", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 2
    assert told in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


def test_a_port_that_is_taken_is_told(instant: Process) -> None:
    port = instant.root.rpartition(":")[2]
    command = [sys.executable, "-m", "matrix_serving.simulator", "--profile", "instant", "--port", port]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert f"port {port}" in ended.stderr
