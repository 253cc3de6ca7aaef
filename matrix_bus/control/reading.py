"""Reading a stream where a message that is missed would be harm: a value that is freed, a row that is forgotten."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ..bus import Bus, Stored, patiently, pause


async def everything(bus: Bus, stream: str, start: int = 1) -> AsyncGenerator[Stored, None]:
    """All messages from stream sequence `start` on that the stream has when it is asked for. Raises `BusError`.

    Its leader knows the last of them; reads may be answered by a follower that lags behind.
    """
    while (newest := await patiently(bus, lambda: bus.last(stream, ">"))) is not None and newest.seq >= start:
        async for message in bus.read(stream, start):
            start = message.seq + 1
            yield message
        if start > newest.seq:
            return
        await pause(bus)  # or it is gone from the queue meanwhile, and what is the last now is asked anew
