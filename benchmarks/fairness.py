"""How long a small run takes beside a large one that has filled the workers before it came.

    python -m benchmarks.fairness [--small 100] [--large 100000] [--slots 64] [--step-s 0.05]

Each row makes eight hops of `step-s` seconds. The small run is timed alone on a worker with half the slots, and then
on a worker with all of them that a large run keeps full. Shared fairly, the second takes about as long as the first:
`ratio`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from matrix_bus import Next, Outcome, Row, RunConfig, State, Workflow, control, registry, run, success, to
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.dataset import Line
from matrix_bus.orchestrator import outcome_stream
from matrix_bus.registry import RunRecord
from matrix_bus.worker import Worker

_HOPS = 8


class Nothing(State):
    """A row without content."""


def workflow(step_s: float) -> Workflow[Nothing]:
    """Two roles that hand a row to and fro."""
    flow = Workflow("fairness", state=Nothing, start="ping")
    flow.code_hash = "of-this-benchmark"

    async def step(row: Row[Nothing], following: str) -> Next | Outcome:
        await asyncio.sleep(step_s)
        return success() if row.hop == _HOPS else to(following)

    @flow.role
    async def ping(row: Row[Nothing]) -> Next | Outcome:
        return await step(row, "pong")

    @flow.role
    async def pong(row: Row[Nothing]) -> Next | Outcome:
        return await step(row, "ping")

    return flow


@contextlib.asynccontextmanager
async def serving(url: str, flow: Workflow[Any], slots: int) -> AsyncIterator[None]:
    """A worker in this process."""
    async with await Bus.connect(url) as bus:
        worker = Worker(bus, [flow], slots=slots, grace_s=0)
        working = asyncio.create_task(worker.run())
        try:
            yield
        finally:
            worker.stop()
            await working


async def submitted(bus: Bus, flow: Workflow[Any], rows: int, in_flight: int, weight: float = 1.0) -> RunRecord:
    config = RunConfig(max_in_flight=in_flight, weight=weight)
    record = await run.open_run(bus, run.new_record(flow, config))
    await run.submit(bus, record, [Line(n, b"{}", str(n)) for n in range(rows)])
    return record


async def timed(bus: Bus, flow: Workflow[Any], rows: int, weight: float = 1.0) -> float:
    """Seconds from submission until the last outcome is there."""
    began = time.monotonic()
    record = await submitted(bus, flow, rows, rows, weight)
    while not (await registry.progress(bus, await registry.require(bus, record.id))).done:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def measure(small: int, large: int, slots: int, step_s: float) -> dict[str, Any]:
    flow = workflow(step_s)
    with tempfile.TemporaryDirectory(prefix="matrix-bus-fairness-") as folder, Broker(Path(folder)) as broker:
        async with await Bus.connect(broker.url) as bus:
            async with serving(broker.url, flow, slots // 2):
                alone_s = await timed(bus, flow, small)
            other = await submitted(bus, flow, large, large)
            async with serving(broker.url, flow, slots):
                while await _ended(bus, other) < 10 * slots:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
                beside_s = await timed(bus, flow, small)
                heavier_s = await timed(bus, flow, small, weight=3.0)
                going_on = await _ended(bus, other) < large
                await control.purge(bus, other.id)
    return {
        "benchmark": "fairness",
        "rows": small,
        "rows_of_the_large_run": large,
        "slots": slots,
        "step_s": step_s,
        "alone_with_half_the_slots_s": round(alone_s, 3),
        "beside_the_large_run_s": round(beside_s, 3),
        "ratio": round(beside_s / alone_s, 2),
        "with_weight_3_s": round(heavier_s, 3),
        "large_run_went_on": going_on,
        "machine": {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)},
    }


async def _ended(bus: Bus, record: RunRecord) -> int:
    return int((await bus.api(f"STREAM.INFO.{outcome_stream(record.id)}"))["state"]["messages"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="fairness", description="A small run beside a large one.")
    parser.add_argument("--small", type=int, default=100)
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--step-s", type=float, default=0.05)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure(given.small, given.large, given.slots, given.step_s))
    print(msgspec.json.encode(found).decode(), flush=True)
    return 0 if found["large_run_went_on"] else 1


if __name__ == "__main__":
    sys.exit(main())
