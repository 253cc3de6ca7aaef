"""How long a hop takes on an idle system: one row in flight, two roles in one worker, a broker on file storage.

    python -m benchmarks.latency [--rows 40] [--hops 100]

A hop is timed from one handler's start to the next one's, so it has all of it: the state is encoded, published with
fence, confirmed by the broker, delivered, decoded. The publish alone is timed from this process, guarded as an outcome
is, with a body of 2 KB. Times are in milliseconds. The last line is JSON; the exit code is 1 if a row is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import uvloop

from benchmarks.stage import Stage, last_outcome, stage
from matrix_bus import Next, Outcome, Row, RunConfig, State, Workflow, run, success, to
from matrix_bus.bus import fence
from matrix_bus.dataset import Line
from matrix_bus.orchestrator import decode_outcome, outcome_stream, outcome_subject

_AT_FIRST = 10
"""Hops at the start of the run that are left out: the interpreter warms up."""


class Trip(msgspec.Struct, frozen=True):
    """How far the rows go."""

    hops: int = 100


class Pulse(State):
    """When each handler began, on the clock of the worker's machine."""

    text: str
    began: list[float] = msgspec.field(default_factory=list)


flow = Workflow("pulse", state=Pulse, start="ping", config=Trip)


def _beat(row: Row[Pulse], trip: Trip, following: str) -> Next | Outcome:
    row.state.began.append(time.perf_counter())
    return success() if row.hop > trip.hops else to(following)


@flow.role
async def ping(row: Row[Pulse], trip: Trip) -> Next | Outcome:
    return _beat(row, trip, "pong")


@flow.role
async def pong(row: Row[Pulse], trip: Trip) -> Next | Outcome:
    return _beat(row, trip, "ping")


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def measure(rows: int, hops: int) -> dict[str, Any]:
    """Figures for one worker."""
    config = RunConfig(max_in_flight=1, workflow={"hops": hops})
    async with stage(__file__, config) as here, asyncio.timeout(300):
        (record,) = here.records
        lines = [Line(n, msgspec.json.encode({"text": "x" * 1024}), f"p{n}") for n in range(rows)]
        await run.submit(here.bus, record, lines)
        await last_outcome(here, [rows])
        taken: list[float] = []
        ok = True
        async for message in here.bus.read(outcome_stream(record.id)):
            outcome = decode_outcome(message.data)
            began = msgspec.json.decode(outcome.state, type=Pulse).began
            ok = ok and outcome.outcome == "success" and len(began) == hops + 1 == outcome.hops
            taken += [(b - a) * 1e3 for a, b in itertools.pairwise(began)]
        publishes = await _publishes(here, record.id, 500)
    return {
        "ok": ok and len(taken) == rows * hops,
        "hops": len(taken),
        **_figures("hop_ms", taken[_AT_FIRST:]),
        **_figures("publish_ms", publishes[_AT_FIRST:]),
    }


async def _publishes(here: Stage, run_id: str, count: int) -> list[float]:
    """What a guarded publish and its confirmation take: as outcomes of rows that there are not, which nobody reads."""
    taken = []
    body = b"x" * 2048
    for n in range(10**6, 10**6 + count):
        started = time.perf_counter()
        await here.bus.publish(outcome_subject(run_id, n, 0), body, fence(0))
        taken.append((time.perf_counter() - started) * 1e3)
    return taken


def _figures(name: str, taken: Sequence[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    found = {f"{name}_{word}": round(percentile(taken, share), 3) for word, share in shares.items()}
    return {**found, f"{name}_max": round(max(taken), 3)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="latency", description="How long a hop takes on an idle system.")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--hops", type=int, default=100, help="of each row")
    given = parser.parse_args()
    if min(given.rows, given.hops) < 1:
        parser.error("--rows and --hops must be at least 1")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure(given.rows, given.hops))
    machine = {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)}
    print(msgspec.json.encode({"benchmark": "latency", **found, "machine": machine}).decode(), flush=True)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
