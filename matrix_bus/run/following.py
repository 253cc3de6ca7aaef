"""Outcomes of a run: as they come, as numbers, and as a file."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .. import registry
from ..agent import Workflow
from ..bus import Bus, Stored, patiently
from ..dataset import Output, Written, suffix_of, write_json
from ..errors import BusTimeout, BusUnavailable, NobodyListens, RunError
from ..orchestrator import decode_outcome, outcome_stream, outcome_subject, outcome_subjects, row_of
from ..payload import Payloads, whole
from ..registry import RunRecord
from ..telemetry import logger
from .opening import versions
from .shaping import Shape, claim, journal_of, newest_lines, write_shaped
from .tally import Tally

if TYPE_CHECKING:
    from nats.aio.msg import Msg

PLAIN = Shape()
_POLL_S = 1.0
_FLUSH_S = 1.0

log = logger("run")


async def outcomes(bus: Bus, run: str, start: int = 1, seen: int = 0) -> AsyncGenerator[Stored | None, None]:
    """The run's outcomes from stream sequence `start` on, as they come; ends when the run is complete.

    `seen` is how many came before `start`. None is yielded whenever there is nothing new at the moment, so that
    a caller can write what it has.
    """
    arrived = asyncio.Event()

    async def wake(_: Msg | None = None) -> None:
        arrived.set()

    await bus.wait_connected()
    subscription = await bus.nc.subscribe(outcome_subjects(run), cb=wake)
    forget = bus.on_reconnect(wake)
    try:
        while True:
            arrived.clear()
            async with contextlib.aclosing(_read(bus, run, start)) as there:
                async for message in there:
                    start = message.seq + 1
                    seen += message.subject.endswith(".0")
                    yield message
            record = await patiently(bus, lambda: registry.get(bus, run))
            _refuse_deleted(record)
            # None is what a broker says that has just taken over: a record is never removed.
            if record is not None and await _is_complete(bus, record, start, seen):
                return
            yield None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await arrived.wait()
    finally:
        forget()
        if not bus.nc.is_closed:
            await subscription.unsubscribe()


async def _read(bus: Bus, run: str, start: int = 1) -> AsyncGenerator[Stored, None]:
    """Outcomes from stream sequence `start` on, up to the newest at this moment; waits while the broker is away.

    Raises `RunError` if the run was deleted.
    """
    while True:
        try:
            async for message in bus.read(outcome_stream(run), start):
                start = message.seq + 1
                yield message
            return
        except (BusTimeout, BusUnavailable) as error:
            await bus.wait_connected()
            if isinstance(error, NobodyListens):  # a broker that is starting, or a stream that is gone
                _refuse_deleted(await patiently(bus, lambda: registry.get(bus, run)))
            await asyncio.sleep(0.1)


def _refuse_deleted(record: RunRecord | None) -> None:
    if record is not None and record.state == "deleted":
        raise RunError(f"run {record.id!r} was deleted")


async def _is_complete(bus: Bus, record: RunRecord, start: int, seen: int) -> bool:
    """Whether every row has its outcome, and all outcomes lie before `start`."""
    if record.total is None or seen < record.total:
        return False
    if not record.retried:
        return True
    # Of rows that were sent again nobody knows how many outcomes there will be.
    if not (await patiently(bus, lambda: registry.progress(bus, record))).done:
        return False
    return await _newest(bus, record.id) < start


async def _newest(bus: Bus, run: str) -> int:
    """Sequence of the last outcome, 0 without any; reads may be answered by a follower that does not have it yet."""

    async def still_there() -> None:
        _refuse_deleted(await registry.get(bus, run))

    return await patiently(bus, lambda: bus.last_of(outcome_subject(run, 0, 0), outcome_subjects(run)), still_there)


async def collect(
    bus: Bus,
    record: RunRecord,
    path: Path,
    *,
    follow: bool,
    tally: Tally | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
    shape: Shape = PLAIN,
    flow: Workflow[Any] | None = None,
) -> Written:
    """Writes the run's outcomes to `path`, one line each or in another `shape`; continues what was begun.

    With `follow` it returns when the run is complete, else when it has what is there. `flow` is the run's workflow,
    for the chats that it declares. Raises `RunError`, `DatasetError`, `BusError`.
    """
    plain = shape.is_plain(path)
    if not plain:
        claim(path, record.id, shape)
    output = Output(path if plain else journal_of(path, shape), record.id)
    payloads = Payloads(bus, record.id)
    if tally is not None and output.next_seq > 1:
        await _tally_up_to(bus, record.id, output.next_seq, tally, shape)
    flushed_at = time.monotonic()
    complete = True
    try:
        async with contextlib.aclosing(outcomes(bus, record.id, output.next_seq, output.seen)) as stream:
            async for message in stream:
                if message is not None and not shape.shard.has(row_of(message.subject)):
                    output.pass_over(message.seq)
                elif message is not None:
                    line = await whole(message.data, payloads)
                    output.add(line, message.seq)
                    if tally is not None:
                        tally.add(decode_outcome(line))
                if message is None or time.monotonic() - flushed_at > _FLUSH_S:
                    output.flush()
                    flushed_at = time.monotonic()
                    on_progress(output.lines)
                if message is None and not follow:
                    complete = False
                    break
        retried = complete and (await patiently(bus, lambda: registry.require(bus, record.id))).retried > 0
        output.flush()
        if plain and complete:
            output.finish(newest_only=retried)
        if retried and tally is not None:  # what counts is what the file says in the end
            tally.clear()
            for line in output.read_lines() if plain else newest_lines(output.path):
                tally.add(decode_outcome(line))
        if plain:
            written = Written([path], output.lines, output.kept)
        else:
            making = functools.partial(write_shaped, output.path, path, shape, flow, ours=output.continued)
            written = await asyncio.to_thread(making)
            if complete:
                output.discard()
    finally:
        output.close()
    on_progress(written.rows)
    return written


async def _tally_up_to(bus: Bus, run: str, stop: int, tally: Tally, shape: Shape) -> None:
    payloads = Payloads(bus, run)
    start = 1
    while start < stop and start <= await _newest(bus, run):
        async with contextlib.aclosing(_read(bus, run, start)) as there:
            async for message in there:
                if message.seq >= stop:
                    return
                start = message.seq + 1
                if shape.shard.has(row_of(message.subject)):
                    tally.add(decode_outcome(await whole(message.data, payloads)))
        await asyncio.sleep(0.1)


async def write_manifest(bus: Bus, run: str, path: Path, tally: Tally, extra: dict[str, Any], label: str = "") -> Path:
    """Writes `<output>.manifest.json`: what made the output, and its counts; `label` tells apart who shares one."""
    record = await patiently(bus, lambda: registry.require(bus, run))
    manifest = {
        "run": msgspec.to_builtins(record),
        "output": path.name,
        "rows": tally.rows,
        "outcomes": dict(tally.kinds),
        "reasons": {f"{kind}: {reason}" if reason else kind: n for (kind, reason), n in tally.reasons.items()},
        "hops": tally.hops,
        "usage": tally.usage,
        "usage_by_role": tally.usage_by_role,
        "endpoints": tally.endpoints,
        "metrics": tally.metrics,
        "seconds": tally.seconds,
        "collected_with": versions(),
        **extra,
    }
    name = path.name[: path.name.lower().rindex(suffix_of(path.name))] if suffix_of(path.name) else path.name
    target = path.with_name(name + (f".{label}" if label else "") + ".manifest.json")
    write_json(target, manifest)
    return target
