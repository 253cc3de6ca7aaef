"""Hops that each call a model: what one worker process manages against a server that answers at once.

    python -m benchmarks.llm_hop [--rows 2000] [--hops 6] [--in-flight 256] [--repeat 3]

Two roles discuss in turns; each hop asks the model with the row's question and what was said last, and keeps the
answer. The server is `benchmarks.llm`'s: the same body of about 1 KB at once for every request. Everything else is
as in production: a durable broker, fence, lease, accounting, metrics, the history of model calls in the row, the
endpoint's health and concurrency. CPU is that of the worker process, so `hops_per_s_and_core` is what a core of it
would do; on two cores the worker shares them with the broker and the model server.

The last line is JSON; the exit code is 1 if an outcome is wrong or a model call is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from typing import Any

import msgspec
import uvloop
from msgspec import Struct

from benchmarks.llm import ANSWER, null_server
from benchmarks.stage import cpu_s, empty, last_outcome, stage
from matrix_bus import LLM, Next, Outcome, Row, RunConfig, State, Workflow, run, success, system, to, user
from matrix_bus.config import LlmConfig
from matrix_bus.dataset import Line
from matrix_bus.orchestrator import decode_outcome, outcome_stream

_QUESTION = "Which of these follows from the premises, and which does not? Say why, and be brief. " * 6


class Trip(Struct, frozen=True):
    """How many hops a row makes."""

    hops: int = 6


class Talk(State):
    """The question, and what was said."""

    question: str
    said: list[str] = msgspec.field(default_factory=list)


flow = Workflow("llm_hop", state=Talk, start="first", config=Trip)


async def _speak(row: Row[Talk], llm: LLM, trip: Trip, following: str) -> Next | Outcome:
    chat = [system("You are one of two experts."), user(row.state.question), *map(user, row.state.said[-1:])]
    row.state.said.append((await llm.chat(chat)).text)
    return success() if row.hop >= trip.hops else to(following)


@flow.role
async def first(row: Row[Talk], llm: LLM, trip: Trip) -> Next | Outcome:
    return await _speak(row, llm, trip, "second")


@flow.role
async def second(row: Row[Talk], llm: LLM, trip: Trip) -> Next | Outcome:
    return await _speak(row, llm, trip, "first")


class Measured(Struct):
    """One measurement."""

    hops_per_s: float
    worker_cpu_us_per_hop: float
    broker_cpu_us_per_hop: float
    problems: int


async def measure(url: str, rows: int, hops: int, in_flight: int) -> Measured:
    """All rows once."""
    llm = LlmConfig(urls=[url], model="null", concurrency=in_flight)
    config = RunConfig(workflow={"hops": hops}, max_in_flight=in_flight, llm=llm)
    async with stage(__file__, config) as here, asyncio.timeout(300):
        (record,), (worker,) = here.records, here.workers
        body = msgspec.json.encode({"question": _QUESTION})
        before = worker.cpu_s, cpu_s(here.broker)
        started = time.time()
        async with asyncio.TaskGroup() as group:
            group.create_task(run.submit(here.bus, record, [Line(n, body, f"q{n}") for n in range(rows)]))
            ended = await last_outcome(here, [rows])
        await empty(here)
        worker_s, broker_s = worker.cpu_s - before[0], cpu_s(here.broker) - before[1]
        fine = 0
        async for message in here.bus.read(outcome_stream(record.id)):
            outcome = decode_outcome(message.data)
            said = msgspec.json.decode(outcome.state, type=Talk).said
            calls = outcome.usage.calls == len(outcome.history) == hops
            fine += outcome.outcome == "success" and calls and said == [ANSWER] * hops
    done = rows * hops
    return Measured(done / (ended - started), worker_s / done * 1e6, broker_s / done * 1e6, rows - fine)


def main() -> int:
    parser = argparse.ArgumentParser(prog="llm_hop", description="Hops that each call a model.")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--hops", type=int, default=6, help="of each row")
    parser.add_argument("--in-flight", type=int, default=256, help="rows in flight, and calls at a time")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    if min(given.rows, given.hops, given.in_flight, given.repeat) < 1:
        parser.error("all numbers must be at least 1")
    found: list[Measured] = []
    with null_server() as url, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for _ in range(given.repeat):
            found.append(runner.run(measure(url, given.rows, given.hops, given.in_flight)))
            print(
                f"{found[-1].hops_per_s:8.0f} hops/s {found[-1].worker_cpu_us_per_hop:7.1f} us/hop worker "
                f"{found[-1].broker_cpu_us_per_hop:7.1f} us/hop broker",
                flush=True,
            )
    worker_us = statistics.median(one.worker_cpu_us_per_hop for one in found)
    problems = sum(one.problems for one in found)
    made: dict[str, Any] = {
        "benchmark": "llm_hop",
        "ok": problems == 0,
        "hops_per_s": round(statistics.median(one.hops_per_s for one in found)),
        "hops_per_s_and_core": round(1e6 / worker_us),
        "cpu_us_per_hop_worker": round(worker_us, 1),
        "cpu_us_per_hop_broker": round(statistics.median(one.broker_cpu_us_per_hop for one in found), 1),
        "rows": given.rows,
        "hops": given.hops * given.rows,
        "in_flight": given.in_flight,
        "wrong_rows": problems,
        "hops_per_s_runs": [round(one.hops_per_s) for one in found],
        "machine": {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)},
    }
    print(msgspec.json.encode(made).decode(), flush=True)
    return 0 if made["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
