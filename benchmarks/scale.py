"""How cost follows size: worker processes, runs, roles, bytes of a row, rows in flight; one at a time.

    python -m benchmarks.scale [--only workers,in_flight] [--workers 1,2,4] [--in-flight 1000,50000] [--plot scale.png]

Every point has a fresh private broker on file storage and fresh worker processes, no model, and every outcome is
checked; see `benchmarks.scale_point`, for rows in flight `benchmarks.scale_waiting`, for the workflow
`benchmarks.ring`. What a sweep does not vary is as in the base point: one worker, one run, 4 roles, 8 hops, rows of
1 KiB, 1 000 in flight.

The last line is one JSON object: a table for each sweep, and the goals with what was measured. A goal that is missed
is reported; the exit code is 1 only where an outcome is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from msgspec import Struct

from benchmarks import ring, scale_waiting
from benchmarks.scale_point import Point, Setup, measure
from benchmarks.scale_waiting import Waiting

_SIZES = (1 << 10, 16 << 10, 128 << 10, 1 << 20)
_OFFLOAD_ABOVE = 8 << 10
"""Below the default of 64 KiB, so that rows of 16 KiB show what it would cost and save."""
_NEVER = 1 << 30
_MOST_MESSAGE = (8 << 20) - (64 << 10)
"""What the private broker takes, less what stands around a row in its message."""
_MOST_BYTES = 64 << 20
"""Of the rows of a point: of large ones there are fewer."""
_WAITING = (1_000, 5_000, 10_000, 50_000)

_FLAT, _PER_ROW_FIXED, _PER_ROW_TIMES, _IDLE = 0.2, 10 << 10, 2, 0.05

Measured = Point | Waiting
Job = Callable[[], Awaitable[Measured]]


class Options(Struct):
    rows: int
    workers: list[int]
    in_flight: list[int]
    rate: float
    rest_s: float


def sweeps(options: Options) -> dict[str, list[Job]]:
    """What there is to measure, by sweep."""
    base = Setup(rows=options.rows)

    def points(setups: Sequence[Setup]) -> list[Job]:
        return [functools.partial(measure, setup) for setup in setups]

    def with_(**changes: Any) -> Setup:
        return msgspec.structs.replace(base, **changes)

    sizes = []
    for size in _SIZES:
        rows = max(8, min(options.rows, _MOST_BYTES // size))
        fits = 2 * size <= _MOST_MESSAGE  # the line as it came, and the state that was made of it
        above = [*([_NEVER] if fits else []), *([_OFFLOAD_ABOVE] if 2 * size > _OFFLOAD_ABOVE else [])]
        sizes += [with_(rows=rows, row_bytes=size, offload_above_bytes=limit) for limit in above]
    return {
        "workers": points([with_(workers=count) for count in options.workers]),
        "runs": points([with_(runs=count) for count in (1, 10, 50)]),
        "roles": points([with_(roles=count) for count in ring.ROLES]),
        "row_bytes": points(sizes),
        "in_flight": [
            functools.partial(
                scale_waiting.measure, count, row_bytes=base.row_bytes, rate=options.rate, rest_s=options.rest_s
            )
            for count in options.in_flight
        ],
    }


def goals(waiting: Sequence[Waiting]) -> dict[str, dict[str, Any]]:
    """Whether the goals for rows in flight are met; `met` is None where the sizes they speak of were not measured."""
    by_size = {found.in_flight: found for found in waiting}
    few, many = by_size.get(_WAITING[0]), by_size.get(_WAITING[-1])
    change = many.worker_cpu_us_per_hop / few.worker_cpu_us_per_hop - 1 if few and many else None
    broker = many.broker_cpu_us_per_hop / few.broker_cpu_us_per_hop - 1 if few and many else None
    rss = None
    if few and many:  # the slope, so that what a warm worker needs without rows does not count
        rss = round((many.worker_rss_mib - few.worker_rss_mib) * (1 << 20) / (many.in_flight - few.in_flight))
    at_rest = max((found.rss_per_row_at_rest_bytes for found in waiting), default=None)
    most_rss = _PER_ROW_TIMES * waiting[0].row_bytes + _PER_ROW_FIXED if waiting else None
    worker_share = statistics.mean(many.rest_worker_share) if many else None
    broker_share = statistics.mean(many.rest_broker_share) if many else None
    both = worker_share + broker_share if worker_share is not None and broker_share is not None else None
    return {
        "cost_per_hop_flat_to_50000": {
            "met": None if change is None or broker is None else max(abs(change), abs(broker)) <= _FLAT,
            "worker_change": _round(change, 3),
            "broker_change": _round(broker, 3),
            "at_most": _FLAT,
        },
        "memory_per_row_in_flight": {
            "met": None if rss is None or most_rss is None else rss <= most_rss,
            "met_at_rest": None if at_rest is None or most_rss is None else at_rest <= most_rss,
            "bytes": rss,
            "bytes_at_rest": at_rest,
            "at_most": most_rss,
        },
        "idle_cost_of_50000_rows": {
            "met": None if both is None else both < _IDLE,
            "met_by_worker": None if worker_share is None else worker_share < _IDLE,
            "share_of_a_core": _round(both, 4),
            "worker_share": _round(worker_share, 4),
            "broker_share": _round(broker_share, 4),
            "below": _IDLE,
        },
    }


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _say(name: str, found: Measured) -> None:
    if isinstance(found, Waiting):
        what = (
            f"{found.in_flight} in flight, {found.rss_per_row_bytes} B each "
            f"({found.rss_per_row_at_rest_bytes} at rest), at rest {statistics.mean(found.rest_worker_share):.1%} of "
            f"a core in the worker and {statistics.mean(found.rest_broker_share):.1%} in the broker"
        )
    else:
        what = (
            f"{found.workers} workers, {found.runs} runs, {found.roles} roles, {found.row_bytes} B a row, "
            f"{found.stored_mib:.0f} MiB stored, {found.rows} rows"
        )
    print(
        f"{name:9} {found.hops_per_s:6} hops/s {found.worker_cpu_us_per_hop:7.1f} + "
        f"{found.broker_cpu_us_per_hop:6.1f} us/hop {found.worker_rss_mib:6.0f} MiB  {what}",
        flush=True,
    )


def report(tables: Mapping[str, Sequence[Measured]], options: Options, seconds: float) -> dict[str, Any]:
    """Everything, for the last line."""
    waiting = [found for found in tables.get("in_flight", ()) if isinstance(found, Waiting)]
    return {
        "benchmark": "scale",
        "rows": options.rows,
        "rate": options.rate,
        "seconds": round(seconds, 1),
        "sweeps": msgspec.to_builtins(dict(tables)),
        "goals": goals(waiting),
        "ok": all(found.ok for some in tables.values() for found in some),
        "machine": {
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "nats_py": importlib.metadata.version("nats-py"),
            "load_1m": round(os.getloadavg()[0], 2),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="scale", description="How cost follows size, one dimension at a time.")
    parser.add_argument("--rows", type=int, default=4000, help="of a point, all runs together; fewer where large")
    parser.add_argument("--only", default="", help="sweeps, with commas: workers, runs, roles, row_bytes, in_flight")
    parser.add_argument("--workers", default="1,2,4", help="processes of that sweep, with commas")
    parser.add_argument("--in-flight", default=",".join(map(str, _WAITING)), help="sizes of that sweep, with commas")
    parser.add_argument("--rate", type=float, default=2500.0, help="hops per second that rows in flight make")
    parser.add_argument("--rest-s", type=float, default=20.0, help="how long all rows wait, in windows of 10 s")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the tables (needs matplotlib)")
    given = parser.parse_args()
    try:
        workers, in_flight = ([int(word) for word in words.split(",")] for words in (given.workers, given.in_flight))
        options = Options(given.rows, workers, in_flight, given.rate, given.rest_s)
    except ValueError:
        parser.error("--workers and --in-flight must be whole numbers with commas between them")
    if min(options.rows, *options.in_flight) < 50 or min(options.workers) < 1 or options.rate <= 0:
        parser.error("--rows and --in-flight must be at least 50, --workers at least 1, --rate above 0")
    wanted = sweeps(options)
    names = given.only.split(",") if given.only else list(wanted)
    for name in names:
        if name not in wanted:
            parser.error(f"--only {name}: there are {', '.join(wanted)}")
    tables: dict[str, list[Measured]] = {}
    started = time.monotonic()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for name in names:
            for job in wanted[name]:
                found = runner.run(_coroutine(job))
                tables.setdefault(name, []).append(found)
                _say(name, found)
                for problem in found.problems:
                    print(problem, file=sys.stderr)
    made = report(tables, options, time.monotonic() - started)
    if given.plot:
        from benchmarks.scale_plot import draw

        draw(made["sweeps"], given.plot)
    print(msgspec.json.encode(made).decode(), flush=True)
    return 0 if made["ok"] else 1


async def _coroutine(job: Job) -> Measured:
    return await job()


if __name__ == "__main__":
    sys.exit(main())
