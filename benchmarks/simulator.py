"""How many calls the simulated server carries on one core: `just bench simulator`; prints JSON as its last line.

The server has the `instant` profile and a core of its own where there are two; a closed loop of aiohttp clients in
this process sends 1 KB and gets as much back. Where the clients are slower than the server, its CPU time per call
says what it could carry.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time

import aiohttp
import msgspec
import psutil
import uvloop

TEXT = "The option fits the premises, since each step follows from the one before. " * 11
BODY = {
    "model": "simulated",
    "messages": [{"role": "system", "content": TEXT[:200]}, {"role": "user", "content": TEXT[:800]}],
    "max_tokens": 256,
}


async def load(url: str, clients: int, seconds: float, stream: bool) -> float:
    """Calls a second."""
    body = msgspec.json.encode({**BODY, "stream": stream})
    answered = 0
    began = time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal answered
        while time.perf_counter() < began + seconds:
            async with session.post(url, data=body) as response:
                if response.status != 200 or not await response.read():
                    raise SystemExit(f"error: {url} answered {response.status}")
            answered += 1

    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients)) as session,
        asyncio.TaskGroup() as tasks,
    ):
        for _ in range(clients):
            tasks.create_task(client(session))
    return answered / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=__doc__)
    parser.add_argument("--clients", type=int, default=64, help="calls under way at a time")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--stream", action="store_true")
    args = parser.parse_args()
    command = [sys.executable, "-m", "matrix_serving.simulator", "--profile", "instant"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = f"{server.stdout.readline().strip()}/chat/completions"
            process = psutil.Process(server.pid)
            if sys.platform == "linux":
                cores = sorted(os.sched_getaffinity(0))
                os.sched_setaffinity(server.pid, cores[:1])
                os.sched_setaffinity(0, cores[1:] or cores)
            uvloop.run(load(url, args.clients, 1, args.stream))
            before = process.cpu_times()
            calls_per_s = uvloop.run(load(url, args.clients, args.seconds, args.stream))
            after = process.cpu_times()
        finally:
            server.terminate()
    cpu_s = after.user - before.user + after.system - before.system
    cpu_us = cpu_s / (calls_per_s * args.seconds) * 1e6
    print(msgspec.json.encode({"calls_per_s": round(calls_per_s), "server_cpu_us_per_call": round(cpu_us)}).decode())


if __name__ == "__main__":
    main()
