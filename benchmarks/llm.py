"""Client CPU of a model call: our LLM with its direct transport, beside the openai SDK as it comes.

    python -m benchmarks.llm [--calls 6000] [--in-flight 64] [--repeat 3]

A server in another process answers every chat completion at once with the same body of about 1 KB; prompts are of
about 1 KB as well. Client CPU is that of this process alone, from the first call to the last reply: encoding, HTTP,
decoding into our structs, and the row's history. Both take turns in one run; medians are reported. The last line is
JSON. A call whose reply is not the expected one ends the benchmark with exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
import uvloop

from matrix_bus.config import ModelConfig, Sampling
from matrix_bus.llm import LLM, ModelPool, system, user

_TEXT = "The option fits the premises, since each step follows from the one before and no other does. " * 8
ANSWER = _TEXT[:700]
"""What the server says to everything."""
_CHAT = [system("You are one of two experts who discuss a question. Be brief."), user(_TEXT + "What do you think?")]

_SERVER = """
import asyncio, json, sys, uvloop

BODY = json.dumps({
    "id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": "null",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": sys.argv[1]}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 200, "completion_tokens": 150, "total_tokens": 350},
}).encode()
REPLY = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(BODY) + BODY

class Null(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.left = transport, b""

    def data_received(self, data):
        self.left += data
        while (end := self.left.find(b"\\r\\n\\r\\n")) >= 0:
            head = self.left[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\\r\\n", 1)[0]) if at >= 0 else 0
            if len(self.left) < end + 4 + size:
                return
            self.left = self.left[end + 4 + size :]
            self.transport.write(REPLY)

async def main():
    server = await asyncio.get_running_loop().create_server(Null, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

uvloop.run(main())
"""

Call = Callable[[], Awaitable[str]]


@contextlib.contextmanager
def null_server() -> Iterator[str]:
    """A model server in another process that answers at once; its address."""
    server = subprocess.Popen([sys.executable, "-c", _SERVER, ANSWER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    finally:
        server.kill()
        server.wait()


async def _timed(call: Call, calls: int, in_flight: int) -> tuple[float, float]:
    """(CPU seconds of this process, seconds) for so many calls."""
    left = calls

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            if await call() != ANSWER:
                raise SystemExit("a reply was not the expected one")

    for _ in range(20):
        await call()
    cpu_s, started = time.process_time(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(in_flight)))
    return time.process_time() - cpu_s, time.perf_counter() - started


async def _ours(url: str, calls: int, in_flight: int) -> tuple[float, float]:
    pool = ModelPool(ModelConfig(model="null", concurrency=in_flight), [url])

    async def call() -> str:
        # A handler makes a few calls; its history grows with them.
        llm = LLM(lambda _: pool, "default", Sampling(temperature=0.7, max_tokens=256), [], "solver", 1, 1, 7)
        return (await llm.chat(_CHAT)).text

    try:
        return await _timed(call, calls, in_flight)
    finally:
        await pool.close()


async def _sdk(url: str, calls: int, in_flight: int) -> tuple[float, float]:
    import openai

    client = openai.AsyncOpenAI(base_url=url, api_key="none")
    messages: Any = [{"role": message.role, "content": message.content} for message in _CHAT]

    async def call() -> str:
        reply = await client.chat.completions.create(
            model="null", messages=messages, temperature=0.7, max_tokens=256, seed=7
        )
        return reply.choices[0].message.content or ""

    try:
        return await _timed(call, calls, in_flight)
    finally:
        await client.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="llm", description="Client CPU of a model call.")
    parser.add_argument("--calls", type=int, default=6000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    ours: list[tuple[float, float]] = []
    sdk: list[tuple[float, float]] = []
    sdk_calls = max(200, given.calls // 10)
    with null_server() as url, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for _ in range(given.repeat):
            ours.append(runner.run(_ours(url, given.calls, given.in_flight)))
            sdk.append(runner.run(_sdk(url, sdk_calls, given.in_flight)))
    ours_us = [cpu_s / given.calls * 1e6 for cpu_s, _ in ours]
    sdk_us = [cpu_s / sdk_calls * 1e6 for cpu_s, _ in sdk]
    found = {
        "benchmark": "llm",
        "cpu_us_per_call": round(statistics.median(ours_us), 1),
        "calls_per_s": round(statistics.median(given.calls / seconds for _, seconds in ours)),
        "sdk_cpu_us_per_call": round(statistics.median(sdk_us), 1),
        "sdk_calls_per_s": round(statistics.median(sdk_calls / seconds for _, seconds in sdk)),
        "speedup_vs_sdk": round(statistics.median(sdk_us) / statistics.median(ours_us), 2),
        "calls": given.calls,
        "in_flight": given.in_flight,
        "prompt_bytes": len(json.dumps([msgspec.to_builtins(message) for message in _CHAT])),
        "cpu_us_runs": [round(us, 1) for us in ours_us],
        "sdk_cpu_us_runs": [round(us, 1) for us in sdk_us],
        "machine": {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)},
    }
    print(msgspec.json.encode(found).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
