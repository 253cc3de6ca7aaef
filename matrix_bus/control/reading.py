"""Reading where a message that is missed would be harm: a value that is freed, a row that is forgotten."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ..bus import Bus, Stored, patiently, pause
from ..orchestrator import outcome_stream, outcome_subject, outcome_subjects, row_subject, work_stream, work_subjects


def all_outcomes(bus: Bus, run: str, start: int = 1) -> AsyncGenerator[Stored, None]:
    """The outcomes from stream sequence `start` on that there are when it is asked for. Raises `BusError`."""
    return _everything(bus, outcome_stream(run), start, outcome_subject(run, 0, 0), outcome_subjects(run))


def all_queued(bus: Bus, run: str) -> AsyncGenerator[Stored, None]:
    """The rows and hops that are in the queue when it is asked for. Raises `BusError`."""
    return _everything(bus, work_stream(run), 1, row_subject(run, 0), work_subjects(run))


async def _everything(bus: Bus, stream: str, start: int, subject: str, within: str) -> AsyncGenerator[Stored, None]:
    """Reads may be answered by a follower that lags behind; where they should end is known to who takes publishes."""

    async def newest() -> int:
        return await patiently(bus, lambda: bus.last_of(subject, within), lambda: bus.last_sequence(stream))

    while (end := await newest()) >= start:
        async for message in bus.read(stream, start):
            start = message.seq + 1
            yield message
        if start > end:
            return
        await pause(bus)  # or it is gone from the queue meanwhile, and what is the last now is asked anew
