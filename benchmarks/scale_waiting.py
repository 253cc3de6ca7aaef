"""Thousands of rows in flight in one worker process, at rest and under way.

At rest: all rows wait in their first handler, and CPU is read every ten seconds, a heartbeat period. What they cost
then are heartbeats, and looks at rows whose lease has run out. Under way: every handler waits for so long that rows
pass at `rate` hops a second; CPU is read from after the start to before the first row ends, so that it is of hops
alone, no admission and no outcome.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import time
import urllib.request

from msgspec import Struct

from benchmarks import ring
from benchmarks.scale_point import Setup, point, wrong
from benchmarks.stage import Stage, cpu_s, empty, last_outcome
from matrix_bus import run
from matrix_bus.dataset import Line
from matrix_bus.orchestrator import LEASE_ROLE, work_stream
from matrix_bus.service import free_port

_WINDOW_S = 10.0
"""A third of the default AckWait: each waiting row has one heartbeat in it."""
_SETTLE_S = 1.0
_LEAST_S = 16.0
_LOOKS = 5
_NUMBER = re.compile(r"^matrix_bus_hops(_in_flight)?(?:_total)?\{(.*)\} (\S+)$", re.MULTILINE)


class Waiting(Struct, kw_only=True):
    """What so many rows in flight took."""

    in_flight: int
    rows: int
    hops_per_row: int
    wait_s: float
    """In each handler."""
    submitted_s: float
    """From the first row published until all are in their first handler."""
    worker_rss_before_mib: float
    rss_per_row_at_rest_bytes: int
    rss_per_row_bytes: int
    """At rest or under way, whatever is more; above what the worker has without rows."""
    row_bytes: int
    rest_worker_share: list[float]
    """Of a core, in each window of ten seconds at rest."""
    rest_broker_share: list[float]
    rest_leases_per_s: list[float]
    """Row messages that were delivered again, since their lease had run out."""
    under_way: float
    """Rows in handlers, on average, while hops were measured."""
    seconds: float
    hops: int
    hops_per_s: int
    worker_cpu_us_per_hop: float
    broker_cpu_us_per_hop: float
    leases_per_s: float
    worker_rss_mib: float
    redelivered: int
    """Deliveries of hops beyond one each: after a lost connection, or a heartbeat that came too late."""
    disconnected: int
    """How often the worker lost its connection to the broker; what was on its way comes again after AckWait."""
    ok: bool
    problems: list[str] = []


class _Counts(Struct):
    """One look at the worker and the broker."""

    at: float
    worker_s: float
    broker_s: float
    in_handlers: int
    moved: int
    leases: int
    rss_mib: float


async def measure(in_flight: int, *, row_bytes: int, rate: float, rest_s: float) -> Waiting:
    """`rate` is in hops per second; `rest_s` is rounded to windows of ten seconds."""
    wait_s = in_flight / rate
    hops = max(3, math.ceil(_LEAST_S / wait_s) + 1)
    setup = Setup(
        rows=in_flight, hops=hops, row_bytes=row_bytes, in_flight=in_flight, wait_s=wait_s, gate="gate-is-open"
    )
    port = free_port()
    async with point(setup, ["--metrics-port", str(port)]) as here, asyncio.timeout(600):
        (record,), (worker,) = here.records, here.workers
        bare = await _look(here, port)
        started = time.monotonic()
        await run.submit(here.bus, record, (Line(n, ring.line(n, row_bytes), f"r{n}") for n in range(in_flight)))
        while (await _look(here, port)).in_handlers < in_flight:
            here.check()
            await asyncio.sleep(0.25)
        submitted_s = time.monotonic() - started
        await asyncio.sleep(_SETTLE_S)
        rest = [await _look(here, port)]
        for _ in range(max(1, round(rest_s / _WINDOW_S))):
            await asyncio.sleep(rest[0].at + len(rest) * _WINDOW_S - time.monotonic())
            rest.append(await _look(here, port))
        (here.directory / setup.gate).touch()
        opened = time.monotonic()
        await asyncio.sleep(min(2.0, 1.0 + wait_s / 10))
        looks = [await _look(here, port)]
        ends = opened + (hops - 1) * wait_s
        for left in range(_LOOKS, 0, -1):
            await asyncio.sleep((ends - time.monotonic()) / left - 0.1 / _LOOKS)
            looks.append(await _look(here, port))
        await last_outcome(here, [in_flight])
        redelivered = 0
        for role in record.roles:
            info = await here.bus.api(f"CONSUMER.INFO.{work_stream(record.id)}.{role}")
            redelivered += info["delivered"]["consumer_seq"]
        redelivered -= in_flight * hops
        await empty(here)
        problems = [problem async for problem in wrong(here.bus, record, range(in_flight), setup)]
        rss_mib, disconnected = worker.rss_mib, here.disconnected
    first, last = looks[0], looks[-1]
    seconds, moved = last.at - first.at, last.moved - first.moved
    peak_mib = max(look.rss_mib for look in looks)
    pairs = list(itertools.pairwise(rest))

    def per_row(mib: float) -> int:
        return round((mib - bare.rss_mib) * (1 << 20) / in_flight)

    return Waiting(
        in_flight=in_flight,
        rows=in_flight,
        hops_per_row=hops,
        wait_s=wait_s,
        submitted_s=round(submitted_s, 2),
        worker_rss_before_mib=round(bare.rss_mib, 1),
        rss_per_row_at_rest_bytes=per_row(rest[-1].rss_mib),
        rss_per_row_bytes=per_row(max(peak_mib, *(look.rss_mib for look in rest))),
        row_bytes=row_bytes,
        rest_worker_share=[round((b.worker_s - a.worker_s) / (b.at - a.at), 4) for a, b in pairs],
        rest_broker_share=[round((b.broker_s - a.broker_s) / (b.at - a.at), 4) for a, b in pairs],
        rest_leases_per_s=[round((b.leases - a.leases) / (b.at - a.at), 1) for a, b in pairs],
        under_way=round(sum(look.in_handlers for look in looks) / len(looks), 1),
        seconds=round(seconds, 3),
        hops=moved,
        hops_per_s=round(moved / seconds),
        worker_cpu_us_per_hop=round((last.worker_s - first.worker_s) / moved * 1e6, 1),
        broker_cpu_us_per_hop=round((last.broker_s - first.broker_s) / moved * 1e6, 1),
        leases_per_s=round((last.leases - first.leases) / seconds, 1),
        worker_rss_mib=round(max(peak_mib, rss_mib), 1),
        redelivered=redelivered,
        disconnected=disconnected,
        ok=not problems,
        problems=problems[:10],
    )


async def _look(here: Stage, port: int) -> _Counts:
    (record,), (worker,) = here.records, here.workers
    text = await asyncio.to_thread(_metrics, port)
    in_handlers = moved = 0
    for found in _NUMBER.finditer(text):
        if found[1]:
            in_handlers += int(float(found[3]))
        elif 'settled="advance"' in found[2]:
            moved += int(float(found[3]))
    leases = (await here.bus.api(f"CONSUMER.INFO.{work_stream(record.id)}.{LEASE_ROLE}"))["delivered"]["consumer_seq"]
    return _Counts(time.monotonic(), worker.cpu_s, cpu_s(here.broker), in_handlers, moved, leases, worker.rss_mib)


def _metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return str(answer.read().decode())
