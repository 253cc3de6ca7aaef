"""Reading a stream where a message that is missed would be harm: a value that is freed, a row that is forgotten."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ..bus import Bus, Stored, patiently, pause


async def everything(bus: Bus, stream: str, start: int = 1) -> AsyncGenerator[Stored, None]:
    """All messages from stream sequence `start` on, until the stream's leader has none that is newer.

    The leader is asked, since reads may be answered by a follower that lags behind. Raises `BusError`.
    """
    while True:
        async for message in bus.read(stream, start):
            start = message.seq + 1
            yield message
        newest = await patiently(bus, lambda: bus.last(stream, ">"))
        if newest is None or newest.seq < start:
            return
        await pause(bus)
