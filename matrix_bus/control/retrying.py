"""Failed rows, sent again: each as the next generation of its row, whose outcome takes the place of the old one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec
from msgspec import Raw, Struct

from .. import registry
from ..bus import Bus, Stored, fence, is_lost_race, patiently, unwrapped_group
from ..errors import PublishRefused, RunError
from ..orchestrator import (
    HEADER_GENERATION,
    RowMessage,
    encode,
    family,
    outcome_stream,
    row_subject,
)
from ..registry import RunRecord
from .reading import all_outcomes

_AT_ONCE = 256


class _Outcome(Struct):
    """What sending a row again needs of its last outcome."""

    row: int
    generation: int
    id: str
    seed: int
    outcome: str
    reason: str
    input: Raw


_decode = msgspec.json.Decoder(_Outcome)


async def retry_failed(bus: Bus, run: str, *, reason: str = "", rows: frozenset[int] | None = None) -> int:
    """Sends the failed rows of a run again, or those of them with this reason or these numbers; returns how many.

    They begin anew with their input, their id and their seed. The old outcomes stay in the outcome stream; a
    collector leaves them out where there is a newer one. It can be repeated after a crash. Raises `RunError` if rows
    are still being submitted, or the run is or was ended meanwhile; and `BusError`.
    """
    record = await registry.require(bus, run)
    _opened(record)

    def chosen(outcome: _Outcome) -> bool:
        return (
            outcome.outcome == "failed"
            and (not reason or outcome.reason == reason)
            and (rows is None or outcome.row in rows)
        )

    newest = await _newest(bus, run, chosen)
    if not newest and record.total is not None:
        return 0
    # Not sealed meanwhile: whoever follows it must not take it for complete.
    # And the stop rule must not hold their old outcomes against them.
    last = await patiently(bus, lambda: bus.last_sequence(outcome_stream(run)))
    opened = await registry.change(
        bus, run, lambda there: msgspec.structs.replace(_opened(there), retried=record.retried + 1, watch_from=last)
    )
    sent = await _send(bus, opened, newest)
    await registry.change(bus, run, lambda there: _sealed(there) if registry.is_open_since(there, opened) else there)
    return sent


def _opened(record: RunRecord) -> RunRecord:
    """The run without its total, which it gets back when the rows are sent. Raises `RunError`."""
    _refuse_ended(record)
    noted = record.retrying is not None  # versions that did not note it sent rows then, or else lines are added now
    if record.retrying or (record.total is None and record.total_before is not None and not noted):
        return msgspec.structs.replace(record, retrying=True)  # somebody died half-way
    if record.total is None:
        raise RunError(f"rows of run {record.id!r} are still being submitted: retry when it is sealed")
    return msgspec.structs.replace(record, total=None, total_before=record.total, retrying=True)


def _refuse_ended(record: RunRecord) -> None:
    if record.state not in ("active", "paused"):
        raise RunError(f"run {record.id!r} is {record.state}: submit its failed rows as a run of their own")


def _sealed(record: RunRecord) -> RunRecord:
    return msgspec.structs.replace(record, total=record.total_before, total_before=None, retrying=None)


async def _newest(bus: Bus, run: str, chosen: Callable[[_Outcome], bool]) -> dict[int, int]:
    """By row, the sequence of its last outcome, where that is to be retried."""
    found: dict[int, tuple[int, int]] = {}
    async for message in all_outcomes(bus, run):
        outcome = _decode.decode(message.data)
        if chosen(outcome):
            if found.get(outcome.row, (-1, 0))[0] < outcome.generation:
                found[outcome.row] = (outcome.generation, message.seq)
        elif found.get(outcome.row, (outcome.generation, 0))[0] < outcome.generation:
            del found[outcome.row]
    return {row: seq for row, (_, seq) in found.items()}


async def _send(bus: Bus, record: RunRecord, newest: dict[int, int]) -> int:
    sequences = set(newest.values())
    room = asyncio.Semaphore(_AT_ONCE)
    sent = 0

    async def send(message: Stored) -> None:
        nonlocal sent
        try:
            put = await _send_one(bus, record, _decode.decode(message.data))
            sent += put
        finally:
            room.release()

    async with unwrapped_group() as group:
        if sequences:
            async for message in all_outcomes(bus, record.id, min(sequences)):
                if message.seq in sequences:
                    await room.acquire()
                    group.create_task(send(message))
    return sent


async def _send_one(bus: Bus, record: RunRecord, outcome: _Outcome) -> bool:
    generation = outcome.generation + 1
    row = RowMessage(
        input=outcome.input,
        id=outcome.id,
        seed=outcome.seed,
        submitted_at=time.time(),
        generation=generation,
        schema=record.schema,
    )
    n = outcome.row
    headers = bus.named(fence(0, family(record.id, n)), record.id, n, generation, 0)
    headers[HEADER_GENERATION] = str(generation)

    async def still_wanted() -> None:
        if (there := await registry.get(bus, record.id)) is not None:  # None: a broker that has just taken over
            _refuse_ended(there)

    try:
        await patiently(bus, lambda: bus.publish(row_subject(record.id, n), encode(row), headers), still_wanted)
    except PublishRefused as error:
        if not is_lost_race(error):
            raise
        return False  # it travels already
    return True
