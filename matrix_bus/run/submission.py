"""Rows into a run: published as fast as the broker confirms, sealed at the end, repeatable at any time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from functools import partial
from typing import TypeVar

from msgspec import Raw, Struct

from .. import registry
from ..bus import Bus, fence_lines, is_lost_race, patiently, unwrapped_group
from ..dataset import Line, Rejected
from ..errors import PublishRefused, RunError
from ..orchestrator import (
    RowMessage,
    encode,
    family,
    ref_json,
    row_seed,
    row_subject,
)
from ..payload import Payloads
from ..registry import RunRecord
from ..telemetry import logger
from .pressure import Gauge

_WINDOW = 1024
"""Publishes of a submitter that may wait for their confirmation at once."""
_CHECK_S = 1.0
_BESIDE_BYTES = 8 << 10
"""Of a row's message beside its input: most of it is the id, which may have a thousand characters."""

T = TypeVar("T")
log = logger("run")


class Submitted(Struct):
    """What a submission did."""

    run: str
    rows: int
    """Rows of the run: accepted lines times trials."""
    rejected: int
    seconds: float


async def submit(
    bus: Bus,
    record: RunRecord,
    lines: Iterable[Line | Rejected] | AsyncIterable[Line | Rejected],
    *,
    on_reject: Callable[[Rejected], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
    shard: int = 1,
) -> Submitted:
    """Publishes every line `trials` times, then seals the run with its total.

    Of a run that is submitted in shards, `lines` are those of this one; the last of the shards to end seals the run.

    Lines that the run had when it was sealed before are passed over. A row that is in the run already is refused by
    its fence, so an interrupted submission is simply repeated. A line is asked for only when the window has room for
    it. Raises `BusError` if the broker refuses, `RunError` if the run is ended meanwhile, and what `lines` raises as
    it is.
    """
    started = checked_at = time.monotonic()
    trials, seed = record.config.trials, record.config.seed
    skipped = 0 if record.total_before is None else record.lines
    accepted = rejected = seen = 0
    window = _Window(_WINDOW)
    still_wanted = partial(_require_active, bus, record.id)
    payloads = Payloads(bus, record.id, still_wanted)
    most_bytes = min(record.config.io.offload_above_bytes, bus.max_body - _BESIDE_BYTES)
    gauge = Gauge(bus, record, partial(patiently, bus, still_wanted))

    async def insist(n: int, body: bytes) -> None:
        try:
            await _publish_row(bus, record.id, n, body)
        finally:
            window.release()

    def settled(group: asyncio.TaskGroup, n: int, body: bytes, error: BaseException | None) -> None:
        if error is None:
            window.release()
            return
        insisting = insist(n, body)  # whatever it is, the patient way finds out
        try:
            group.create_task(insisting)
        except RuntimeError:  # the submission has failed meanwhile
            insisting.close()

    async with unwrapped_group() as group, contextlib.aclosing(_each(lines)) as each:
        async for line in each:
            if isinstance(line, Rejected):
                rejected += 1
                on_reject(line)
                continue
            seen = max(seen, line.number + 1)
            if line.number < skipped:
                continue
            body = line.body
            if len(body) > most_bytes:
                body = ref_json(await payloads.put(body))  # one at a time: so many of them may be very large
            for trial in range(trials):
                row = RowMessage(
                    input=Raw(body),
                    id=line.id,
                    seed=row_seed(seed, line.number, trial),
                    submitted_at=time.time(),
                    schema=record.schema,
                )
                message = encode(row)
                n = line.number * trials + trial
                # Each of these is a coroutine less per row, where there is nothing to wait for.
                if gauge.is_due:
                    await gauge.look()
                if bus.is_full:
                    await bus.room()
                if window.is_full:
                    await window.room()
                gauge.count(len(message))
                window.take()
                headers = _headers(bus, record.id, n)
                bus.begin_publish(row_subject(record.id, n), message, headers, partial(settled, group, n, message))
            accepted += 1
            if time.monotonic() - checked_at > _CHECK_S:
                await patiently(bus, still_wanted)
                checked_at = time.monotonic()
            if accepted % 256 == 0:
                on_progress(accepted * trials)
                await asyncio.sleep(0)  # confirmations come in even where publishing never has to wait
        # What the group still waits for is confirmed, or refused for good, before the run is sealed.
        await window.empty()
    sealed = await patiently(bus, lambda: registry.seal(bus, record, shard, accepted * trials, seen))
    if sealed.total is None and sealed.dataset != record.dataset:
        log.warning("run.not_sealed", run=record.id, advice="its dataset has grown meanwhile: submit all of it again")
    rows = (record.total_before or 0) + accepted * trials
    on_progress(rows)
    return Submitted(record.id, rows, rejected, time.monotonic() - started)


class _Window:
    """How many publishes wait for their confirmation. Asked by one task."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._below = size
        """What `_waiter` waits to see `_taken` below."""
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_full(self) -> bool:
        return self._taken >= self._size

    def take(self) -> None:
        self._taken += 1

    def release(self) -> None:
        self._taken -= 1
        if self._waiter is not None and self._taken < self._below and not self._waiter.done():
            self._waiter.set_result(None)

    async def room(self) -> None:
        """Returns when there is room for a good many, since each return costs a turn of the loop."""
        await self._sink(self._size - self._size // 8)

    async def empty(self) -> None:
        """Returns when nothing waits any more."""
        await self._sink(1)

    async def _sink(self, below: int) -> None:
        while self._taken >= below:
            self._below, self._waiter = below, asyncio.get_running_loop().create_future()
            await self._waiter


def _each(lines: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T, None]:
    return lines if isinstance(lines, AsyncGenerator) else _generated(lines)


async def _generated(lines: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T, None]:
    if isinstance(lines, AsyncIterable):
        async for line in lines:
            yield line
    else:
        for line in lines:
            yield line


async def _publish_row(bus: Bus, run: str, n: int, body: bytes) -> None:
    subject, headers = row_subject(run, n), _headers(bus, run, n)
    try:
        await patiently(bus, lambda: bus.publish(subject, body, headers), partial(_require_active, bus, run))
    except PublishRefused as error:
        if not is_lost_race(error):  # else it is under way already
            raise


def _headers(bus: Bus, run: str, n: int) -> str:
    return fence_lines(0, family(run, n)) + bus.id_line(run, n, 0, 0)


async def _require_active(bus: Bus, run: str) -> None:
    record = await registry.get(bus, run)
    # None is what a broker says that has just taken over: a record is never removed.
    if record is not None and record.state not in ("active", "paused"):
        raise RunError(f"run {run!r} was {record.state} while rows were being submitted")
