"""Outcomes, where one that is missed would be harm: a value that is freed, a row that is forgotten."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ..bus import Bus, Stored, patiently, pause
from ..orchestrator import outcome_stream


async def all_outcomes(bus: Bus, run: str, start: int = 1) -> AsyncGenerator[Stored, None]:
    """Every outcome from stream sequence `start` on that the run has when it is asked for. Raises `BusError`.

    The stream's leader knows the last of them; a follower, which may answer the reads, may lag behind.
    """
    stream = outcome_stream(run)
    last = await patiently(bus, lambda: bus.last_sequence(stream))
    while True:
        async for message in bus.read(stream, start):
            start = message.seq + 1
            yield message
        if start > last:
            return
        await pause(bus)
