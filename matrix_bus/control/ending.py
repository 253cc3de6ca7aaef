"""Ending runs from outside: cancel one that goes on, purge what one has left behind.

All of it can be repeated: what died in the middle is finished by the next call.
"""

from __future__ import annotations

import asyncio
import time

from msgspec import Raw

from .. import answers, registry
from ..bus import STREAM_NOT_FOUND, Bus, Stored, fence, is_lost_race, patiently, unwrapped_group
from ..errors import PublishRefused, RowError, RunError
from ..orchestrator import (
    LEASE_ROLE,
    Orchestrator,
    RowMessage,
    admit,
    decode,
    decode_row,
    encode_fitting,
    finish,
    outcome_stream,
    outcome_subject,
    work_stream,
)
from ..payload import Payloads, references, stream_of
from ..registry import RunRecord
from .reading import all_outcomes, all_queued

_AT_ONCE = 256


async def cancel(bus: Bus, run: str) -> int:
    """Ends a run now: every row that has no outcome gets `filtered: cancelled`, with its state and history so far.

    Returns how many rows that were. Outcomes stay and can be collected; the queue is deleted. Raises `RunError` if
    there is no such run, or if it is complete.
    """
    record = await registry.require(bus, run)
    if record.state != "cancelled":
        if (await registry.progress(bus, record)).done:
            raise RunError(f"run {run!r} is complete, there is nothing to cancel: its outcomes can be collected")
        record = await registry.update(bus, run, state="cancelled")
    ended = 0
    seen = -1
    while (end := await patiently(bus, lambda: _last_sequence(bus, record))) != seen:
        seen = end  # a submitter that has not noticed yet may still add rows: look once more
        # Rows that travel first: their row message would tell less, and finds the place taken then.
        for travelling in (True, False):
            ended += await _end_all(bus, record, travelling)
    await registry.update(bus, run, total=await _rows(bus, record))
    await _delete(bus, work_stream(run))
    return ended


async def purge(bus: Bus, run: str) -> None:
    """Deletes everything that the run has on the broker, its outcomes too. The id stays taken for ever.

    Raises `RunError` if there is no such run.
    """
    if await registry.get(bus, run) is None:
        await registry.require(bus, run)
    await registry.update(bus, run, state="deleted")
    await answers.purge(bus, run)
    for stream in (work_stream(run), stream_of(run), outcome_stream(run)):
        await _delete(bus, stream)


async def free_unreferenced(bus: Bus, run: str) -> int:
    """Frees the large values of a complete run that no outcome refers to; returns how many. Raises `RunError`."""
    record = await registry.require(bus, run)
    if not (await registry.progress(bus, record)).done:
        raise RunError(f"run {run!r} is not complete: its rows may still need their large values")
    payloads = Payloads(bus, run)
    loose = await payloads.names()
    async for message in all_outcomes(bus, run):
        loose -= references(message.data)
    for name in loose:
        await payloads.free(name)
    return len(loose)


async def _rows(bus: Bus, record: RunRecord) -> int:
    """Rows that have an outcome; of those that were sent again, the first generation counts."""
    if record.retried:
        return sum([message.subject.endswith(".0") async for message in all_outcomes(bus, record.id)])
    info = await bus.api(f"STREAM.INFO.{outcome_stream(record.id)}")
    return int(info["state"]["messages"])


async def _last_sequence(bus: Bus, record: RunRecord) -> int:
    try:
        return await bus.last_sequence(work_stream(record.id))
    except PublishRefused as error:
        if error.code != STREAM_NOT_FOUND:
            raise
        return -1  # cancelled before, up to the deletion


async def _end_all(bus: Bus, record: RunRecord, travelling: bool) -> int:
    ended = 0
    room = asyncio.Semaphore(_AT_ONCE)

    async def end(message: Stored) -> None:
        nonlocal ended
        try:
            written = await _end(bus, record, message)
            ended += written
        finally:
            room.release()

    try:
        async with unwrapped_group() as group:
            async for message in all_queued(bus, record.id):
                if (message.subject.split(".")[2] != LEASE_ROLE) == travelling:
                    await room.acquire()
                    group.create_task(end(message))
    except PublishRefused as error:
        if error.code != STREAM_NOT_FOUND:  # else somebody beside us cancels it too, and is at its end
            raise
    return ended


async def _end(bus: Bus, record: RunRecord, message: Stored) -> bool:
    """Writes the outcome of the row that the message is about, unless it has one."""
    _, _, role, n, _ = message.subject.split(".")
    row = _read(record, role, int(n), message.data)
    outcome = finish(row, record.workflow, record.config.trials, "filtered", "cancelled", time.time())
    body = encode_fitting(outcome, bus.max_body)
    subject = outcome_subject(record.id, row.n, row.generation)

    async def still_there() -> None:
        there = await registry.get(bus, record.id)
        if there is not None and there.state == "deleted":  # None: a broker that has just taken over
            raise RunError(f"run {record.id!r} was deleted meanwhile")

    try:
        await patiently(bus, lambda: bus.publish(subject, body, fence(0)), still_there)
    except PublishRefused as error:
        if not is_lost_race(error):
            raise
        return False
    return True


def _read(record: RunRecord, role: str, n: int, body: bytes) -> Orchestrator:
    try:
        if role != LEASE_ROLE:
            return decode(body)
        return admit(decode_row(body), record.id, n, record.start, b"", time.time(), hop=0)
    except RowError:  # of a newer version, or garbage: the row ends all the same
        unknown = RowMessage(input=Raw(b"null"), id=str(n), seed=0, submitted_at=0.0)
        return admit(unknown, record.id, n, record.start, b"", time.time(), hop=0)


async def _delete(bus: Bus, stream: str) -> None:
    try:
        await bus.api(f"STREAM.DELETE.{stream}")
    except PublishRefused as error:
        if error.code != STREAM_NOT_FOUND:
            raise
