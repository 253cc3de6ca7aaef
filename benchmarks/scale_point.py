"""One point of the scale benchmark: a private broker, worker processes, runs, and what they took.

The time runs from just before the first row is published to the broker's own time stamp of the last outcome; CPU is
that of all worker processes, and of the broker, over the same stretch and until the queues are empty. Every outcome
is read again and checked. Rows are submitted from this process.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from benchmarks import ring
from benchmarks.stage import LOOK_S, Stage, cpu_s, empty, last_outcome, stage
from matrix_bus import RunConfig, run
from matrix_bus.bus import Bus
from matrix_bus.config import IoConfig
from matrix_bus.dataset import Line
from matrix_bus.orchestrator import decode_outcome, outcome_stream
from matrix_bus.payload import stream_of
from matrix_bus.registry import RunRecord

_WORKFLOW = Path(__file__).with_name("ring.py")


class Setup(Struct, frozen=True, kw_only=True):
    """What is measured; the defaults are the point that every sweep starts from."""

    rows: int
    """Of all runs together."""
    workers: int = 1
    runs: int = 1
    roles: int = 4
    hops: int = 8
    row_bytes: int = 1024
    offload_above_bytes: int = 64 << 10
    in_flight: int = 1000
    wait_s: float = 0.0
    """In each handler."""
    gate: str = ""
    timeout_s: float = 300.0


class Point(Struct, kw_only=True):
    """What one point took."""

    workers: int
    runs: int
    roles: int
    row_bytes: int
    offload_above_bytes: int
    in_flight: int
    rows: int
    hops: int
    seconds: float
    hops_per_s: int
    worker_cpu_us_per_hop: float
    """Of all worker processes together."""
    broker_cpu_us_per_hop: float
    worker_rss_mib: float
    """The largest of the worker processes, at its largest."""
    stored_mib: float
    """In the object stores of the runs."""
    cores_busy: float
    """By workers, broker and submitter together: near the number of cores, the machine is what limits."""
    disconnected: int
    """How often workers lost their connections to the broker."""
    ok: bool
    problems: list[str] = []


@asynccontextmanager
async def point(setup: Setup, words: Sequence[str] = ()) -> AsyncIterator[Stage]:
    """What the setup says, ready for rows. `words` are more options of the workers."""
    with tempfile.TemporaryDirectory(prefix="matrix-bus-scale-") as folder:
        gate = str(Path(folder) / setup.gate) if setup.gate else ""
        config = RunConfig(
            workflow={"hops": setup.hops, "wait_s": setup.wait_s, "gate": gate},
            max_in_flight=setup.in_flight,
            io=IoConfig(offload_above_bytes=setup.offload_above_bytes),
        )
        spec = f"{_WORKFLOW}:ring_{setup.roles}"
        async with stage(
            spec, config, directory=Path(folder), runs=setup.runs, workers=setup.workers, words=words
        ) as made:
            yield made


async def measure(setup: Setup) -> Point:
    """Submits all rows, waits for the last outcome, and checks all of them."""
    async with point(setup) as here, asyncio.timeout(setup.timeout_s):
        numbers = [range(at, setup.rows, setup.runs) for at in range(setup.runs)]
        datasets = [[Line(at, ring.line(n, setup.row_bytes), f"r{n}") for at, n in enumerate(some)] for some in numbers]
        ours = psutil.Process()
        peak_mib = 0.0

        async def watch() -> None:
            nonlocal peak_mib
            while True:
                here.check()
                peak_mib = max(peak_mib, *(client.rss_mib for client in here.workers))
                await asyncio.sleep(2 * LOOK_S)

        watching = asyncio.create_task(watch())
        before = here.workers_cpu_s, cpu_s(here.broker), cpu_s(ours)
        started = time.time()
        async with asyncio.TaskGroup() as group:
            for record, lines in zip(here.records, datasets, strict=True):
                group.create_task(run.submit(here.bus, record, lines))
            ended = await last_outcome(here, [len(lines) for lines in datasets])
        await empty(here)
        after = here.workers_cpu_s, cpu_s(here.broker), cpu_s(ours)
        watching.cancel()
        seconds = ended - started
        workers_s, broker_s, ours_s = (b - a for a, b in zip(before, after, strict=True))
        problems = [
            problem
            for record, some in zip(here.records, numbers, strict=True)
            async for problem in wrong(here.bus, record, some, setup)
        ]
        stored = [await here.bus.api(f"STREAM.INFO.{stream_of(record.id)}") for record in here.records]
        hops = setup.rows * setup.hops
        return Point(
            workers=setup.workers,
            runs=setup.runs,
            roles=setup.roles,
            row_bytes=setup.row_bytes,
            offload_above_bytes=setup.offload_above_bytes,
            in_flight=setup.in_flight,
            rows=setup.rows,
            hops=hops,
            seconds=round(seconds, 3),
            hops_per_s=round(hops / seconds),
            worker_cpu_us_per_hop=round(workers_s / hops * 1e6, 1),
            broker_cpu_us_per_hop=round(broker_s / hops * 1e6, 1),
            worker_rss_mib=round(peak_mib, 1),
            stored_mib=round(sum(info["state"]["bytes"] for info in stored) / (1 << 20), 1),
            cores_busy=round((workers_s + broker_s + ours_s) / seconds, 2),
            disconnected=here.disconnected,
            ok=not problems,
            problems=problems[:10],
        )


class _Left(Struct):
    passed: int
    crc32: int


_left = msgspec.json.Decoder(_Left)


async def wrong(bus: Bus, record: RunRecord, numbers: Sequence[int], setup: Setup) -> AsyncIterator[str]:
    """What is wrong with the outcomes of a run whose row at each place was made from one of `numbers`."""
    rows: Counter[int] = Counter()
    async for message in bus.read(outcome_stream(record.id)):
        outcome = decode_outcome(message.data)
        rows[outcome.row] += 1
        if outcome.outcome != "success":
            yield f"{record.id} row {outcome.row}: {outcome.outcome} {outcome.reason}"
            continue
        left = _left.decode(outcome.state)
        if not setup.hops == left.passed == outcome.hops == outcome.attempts:
            yield (
                f"{record.id} row {outcome.row}: {setup.hops} hops wanted, {left.passed} by its handlers, "
                f"{outcome.hops} counted, {outcome.attempts} handler calls"
            )
        if left.crc32 != ring.crc32(numbers[outcome.row], setup.row_bytes):
            yield f"{record.id} row {outcome.row}: its text arrived changed"
    if rows != Counter(range(len(numbers))):
        yield f"{record.id}: {rows.total()} outcomes for {len(rows)} of {len(numbers)} rows"
