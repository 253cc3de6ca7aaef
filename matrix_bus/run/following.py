"""Outcomes of a run: as they come, as numbers, and as a file."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.msg import Msg

from .. import registry
from ..bus import Bus, Stored, patiently
from ..dataset import Output, write_json
from ..errors import BusTimeout, BusUnavailable, RunError
from ..orchestrator import decode_outcome, outcome_stream
from ..payload import Payloads, whole
from ..registry import RunRecord
from ..telemetry import logger
from .opening import versions
from .tally import Tally

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

    stream = outcome_stream(run)
    settled = False
    await bus.wait_connected()
    subscription = await bus.nc.subscribe(f"out.{run}.>", cb=wake)
    forget = bus.on_reconnect(wake)
    try:
        while True:
            arrived.clear()
            try:
                async for message in bus.read(stream, start):
                    start = message.seq + 1
                    settled = False
                    seen += message.subject.endswith(".0")
                    yield message
                record = await registry.get(bus, run)
            except (BusTimeout, BusUnavailable):
                await bus.wait_connected()
                await asyncio.sleep(0.1)
                continue
            if record is not None and record.state == "deleted":
                raise RunError(f"run {run!r} was deleted")
            # None is what a broker says that has just taken over: a record is never removed.
            if record is not None and record.total is not None and seen >= record.total:
                # Of rows that were sent again nobody knows how many outcomes there will be: look once more.
                if settled or not record.retried:
                    return
                if settled := await _is_done(bus, record):
                    continue
            yield None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await arrived.wait()
    finally:
        forget()
        if not bus.nc.is_closed:
            await subscription.unsubscribe()


async def _is_done(bus: Bus, record: RunRecord) -> bool:
    return (await patiently(bus, lambda: registry.progress(bus, record))).done


async def collect(
    bus: Bus,
    record: RunRecord,
    path: Path,
    *,
    follow: bool,
    tally: Tally | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Output:
    """Writes the run's outcomes to `path`, one line each; continues a file that was begun.

    With `follow` it returns when the run is complete, else when it has what is there. Raises `RunError`,
    `DatasetError`, `BusError`.
    """
    output = Output(path, record.id)
    payloads = Payloads(bus, record.id)
    if tally is not None and output.next_seq > 1:
        await _tally_up_to(bus, record.id, output.next_seq, tally)
    flushed_at = time.monotonic()
    complete = True
    try:
        async with contextlib.aclosing(outcomes(bus, record.id, output.next_seq, output.lines)) as stream:
            async for message in stream:
                if message is not None:
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
        if complete:
            retried = (await registry.require(bus, record.id)).retried > 0
            output.finish(newest_only=retried)
            if retried and tally is not None:  # what counts is what the file says in the end
                tally.clear()
                for line in output.read_lines():
                    tally.add(decode_outcome(line))
        else:
            output.flush()
    finally:
        output.close()
    on_progress(output.lines)
    return output


async def _tally_up_to(bus: Bus, run: str, stop: int, tally: Tally) -> None:
    payloads = Payloads(bus, run)
    async for message in bus.read(outcome_stream(run)):
        if message.seq >= stop:
            return
        tally.add(decode_outcome(await whole(message.data, payloads)))


async def write_manifest(bus: Bus, run: str, path: Path, tally: Tally, extra: dict[str, Any]) -> Path:
    """Writes `<output>.manifest.json`: what made the output, and its counts."""
    record = await registry.require(bus, run)
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
    target = path.with_name(path.name.split(".jsonl")[0] + ".manifest.json")
    write_json(target, manifest)
    return target
