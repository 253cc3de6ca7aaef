"""Hops per second of one worker process without a model, beside a bare nats-py loop with the same messages.

    python -m benchmarks.hop [--rows 1000] [--in-flight 1000] [--repeat 3] [--with-reference]

Each measurement has a fresh private broker on file storage, and one fresh client process: our worker with all
roles, or the floor (see `benchmarks.workload`). Ours and the floor take turns, so that both meet the same weather;
medians are reported. The time runs from just before the first row is published to the broker's own time stamp of
the last outcome. Our rows are submitted from this process, the floor's from its own. CPU is that of the client
process and of the broker over the same stretch and until the queue is empty.

With the reference (see `benchmarks.reference`) there is a third in turn: about a minute and a half each time on two
cores, and an installation of 0.8 GB at the first.

The result is checked: one outcome per row, each a success after as many hops as its seed asks for, by the count
of the orchestrator and by what the handlers left in the state. If not, the exit code is 1. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import msgspec
import uvloop
from msgspec import Struct

from benchmarks import reference
from benchmarks.reference import Reference
from benchmarks.stage import Client, Stage, cpu_s, empty, last_outcome, stage
from benchmarks.workload import RUN_SEED, hops_of, line, sizes
from matrix_bus import RunConfig, run
from matrix_bus.broker import server_info
from matrix_bus.dataset import Line
from matrix_bus.orchestrator import decode_outcome, outcome_stream, row_seed

_WORKFLOW = Path(__file__).with_name("workload.py")

Side = Literal["ours", "floor"]


class Options(Struct):
    rows: int
    in_flight: int
    timeout_s: float


class Measured(Struct):
    """One measurement."""

    side: Side
    seconds: float
    hops: int
    client_cpu_s: float
    """Of the worker, or of the floor's process."""
    broker_cpu_s: float
    outcomes: dict[str, int]
    problems: list[str]
    server: str = ""

    @property
    def hops_per_s(self) -> float:
        return self.hops / self.seconds


async def measure(side: Side, options: Options) -> Measured:
    """One measurement on a broker of its own."""
    config = RunConfig(max_in_flight=options.in_flight, seed=RUN_SEED)
    async with stage(str(_WORKFLOW), config, workers=side == "ours") as here, asyncio.timeout(options.timeout_s):
        measured = await (_ours if side == "ours" else _floor)(here, options)
        measured.server = str((server_info(here.bus.url) or {}).get("version", ""))
        return measured


async def _ours(here: Stage, options: Options) -> Measured:
    bus, (record,), (worker,) = here.bus, here.records, here.workers
    lines = [Line(n, line(n), f"q{n}") for n in range(options.rows)]
    client_cpu, broker_cpu, started = worker.cpu_s, cpu_s(here.broker), time.time()
    async with asyncio.TaskGroup() as group:
        group.create_task(run.submit(bus, record, lines))
        ended = await last_outcome(here, [options.rows])
    await empty(here)
    client_cpu, broker_cpu = worker.cpu_s - client_cpu, cpu_s(here.broker) - broker_cpu
    kinds: Counter[str] = Counter()
    rows: Counter[int] = Counter()
    problems: list[str] = []
    hops = 0
    async for message in bus.read(outcome_stream(record.id)):
        outcome = decode_outcome(message.data)
        kinds[outcome.outcome] += 1
        rows[outcome.row] += 1
        said = len(msgspec.json.decode(outcome.state)["said"])
        drawn = hops_of(row_seed(RUN_SEED, outcome.row, 0))
        hops += said
        if outcome.outcome != "success" or not drawn == said == outcome.hops == outcome.attempts:
            problems.append(
                f"row {outcome.row}: {outcome.outcome}, {drawn} hops drawn, {said} recorded by handlers, "
                f"{outcome.hops} counted, {outcome.attempts} handler calls"
            )
    if rows != Counter(range(options.rows)):
        problems.append(f"{rows.total()} outcomes for {len(rows)} of {options.rows} rows")
    return Measured("ours", ended - started, hops, client_cpu, broker_cpu, dict(kinds), problems)


async def _floor(here: Stage, options: Options) -> Measured:
    bus, (record,) = here.bus, here.records
    words = ["benchmarks.workload", bus.url, record.id, str(options.rows), str(options.in_flight)]
    client = Client(here.directory, 0, words)
    here.workers.append(client)
    try:
        await client.read()
        broker_cpu = cpu_s(here.broker)
        client.write("go")
        ended = await last_outcome(here, [options.rows])
        counted = msgspec.json.decode(await client.read())
        await empty(here)
        broker_cpu = cpu_s(here.broker) - broker_cpu
    finally:
        client.stop()
    subjects = Counter([message.subject async for message in bus.read(outcome_stream(record.id))])
    problems = []
    if subjects != Counter(f"out.{record.id}.{n}.0" for n in range(options.rows)):
        problems.append(f"floor: {subjects.total()} outcomes for {len(subjects)} of {options.rows} rows")
    drawn = sum(hops_of(row_seed(RUN_SEED, n, 0)) for n in range(options.rows))
    if counted["hops"] != drawn:
        problems.append(f"floor: {counted['hops']} hops, {drawn} drawn")
    seconds, kinds = ended - counted["started"], {"success": subjects.total()}
    return Measured("floor", seconds, counted["hops"], counted["cpu_s"], broker_cpu, kinds, problems)


def report(
    results: list[Measured], options: Options, references: list[Reference], versions: dict[str, str]
) -> dict[str, Any]:
    """The figures of all measurements: medians, and each run beside them."""
    ours = [r for r in results if r.side == "ours"]
    floor = [r for r in results if r.side == "floor"]
    hops = ours[0].hops
    seconds = statistics.median(r.seconds for r in ours)
    ours_hops_per_s = statistics.median(r.hops_per_s for r in ours)
    floor_hops_per_s = statistics.median(r.hops_per_s for r in floor)

    def us_per_hop(some: list[Measured], field: str) -> float:
        return round(float(statistics.median(getattr(r, field) / max(1, r.hops) for r in some)) * 1e6, 1)

    return {
        "benchmark": "hop",
        "rows_per_s": round(statistics.median(options.rows / r.seconds for r in ours), 1),
        "hops_per_s": round(ours_hops_per_s),
        "floor_hops_per_s": round(floor_hops_per_s),
        "ratio_to_floor": round(ours_hops_per_s / floor_hops_per_s, 3),
        **_beside(references, versions, ours_hops_per_s),
        "rows": options.rows,
        "hops": hops,
        "in_flight": options.in_flight,
        "seconds": round(seconds, 3),
        "cpu_us_per_hop_worker": us_per_hop(ours, "client_cpu_s"),
        "cpu_us_per_hop_broker": us_per_hop(ours, "broker_cpu_s"),
        "cpu_us_per_hop_floor": us_per_hop(floor, "client_cpu_s"),
        "cpu_us_per_hop_floor_broker": us_per_hop(floor, "broker_cpu_s"),
        "outcomes": ours[-1].outcomes,
        "repeat": len(ours),
        "hops_per_s_runs": [round(r.hops_per_s) for r in ours],
        "floor_hops_per_s_runs": [round(r.hops_per_s) for r in floor],
        "ratio_runs": [round(a.hops_per_s / b.hops_per_s, 3) for a, b in zip(ours, floor, strict=True)],
        "body_bytes_mean": round(statistics.mean(size for n in range(100) for size in sizes("run", n))),
        "ok": not _problems(results, references),
        "machine": {
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "nats_server": ours[0].server,
            "nats_py": importlib.metadata.version("nats-py"),
            "load_1m": round(os.getloadavg()[0], 2),
        },
    }


def _problems(results: list[Measured], references: list[Reference]) -> list[str]:
    lists = [*(result.problems for result in results), *(its.problems for its in references)]
    return [problem for problems in lists for problem in problems]


def _beside(references: list[Reference], versions: dict[str, str], ours_hops_per_s: float) -> dict[str, Any]:
    """The figures of the reference; null if it was not measured."""
    if not references:
        return dict.fromkeys(("reference_hops_per_s", "reference_rows_per_s", "ratio_to_reference"))
    hops_per_s = statistics.median(r.hops_per_s for r in references)
    return {
        "reference_hops_per_s": round(hops_per_s, 1),
        "reference_rows_per_s": round(statistics.median(r.rows_per_s for r in references), 1),
        "ratio_to_reference": round(ours_hops_per_s / hops_per_s, 1),
        "reference_hops": [r.hops for r in references],
        "reference_hops_per_s_runs": [round(r.hops_per_s, 1) for r in references],
        "reference_versions": versions,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="hop", description="Hops per second, beside a bare nats-py loop.")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--in-flight", type=int, default=1000, help="rows in flight, and slots of each role")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each, in turns")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="of one measurement")
    parser.add_argument("--with-reference", action="store_true", help="measure the reference implementation too")
    parser.add_argument("--reference-rows", type=int, default=2000, help="of the reference: 2000 take it two minutes")
    parser.add_argument(
        "--reference-env", type=Path, default=reference.DEFAULT_ENVIRONMENT, help="its environment, made if need be"
    )
    given = parser.parse_args()
    if min(given.rows, given.in_flight, given.repeat, given.reference_rows) < 1:
        parser.error("--rows, --in-flight, --repeat and --reference-rows must be at least 1")
    options = Options(given.rows, given.in_flight, given.timeout_s)
    versions: dict[str, str] = {}
    if given.with_reference:
        reference.prepare(given.reference_env)
        versions = reference.versions(given.reference_env)
    results: list[Measured] = []
    references: list[Reference] = []
    sides: tuple[Side, Side] = ("ours", "floor")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for _ in range(given.repeat):
            for side in sides:
                found = runner.run(measure(side, options))
                results.append(found)
                print(
                    f"{side:5} {found.hops_per_s:8.0f} hops/s {options.rows / found.seconds:8.1f} rows/s "
                    f"{found.seconds:7.3f} s  {found.client_cpu_s / found.hops * 1e6:6.1f} us/hop client "
                    f"{found.broker_cpu_s / found.hops * 1e6:6.1f} us/hop broker",
                    flush=True,
                )
            if given.with_reference:
                its = reference.measure(given.reference_env, given.reference_rows, given.in_flight, given.timeout_s)
                references.append(its)
                print(
                    f"ref   {its.hops_per_s:8.0f} hops/s {its.rows_per_s:8.1f} rows/s {its.seconds:7.3f} s", flush=True
                )
    problems = _problems(results, references)
    for problem in problems[:20]:
        print(problem, file=sys.stderr)
    print(msgspec.json.encode(report(results, options, references, versions)).decode(), flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
