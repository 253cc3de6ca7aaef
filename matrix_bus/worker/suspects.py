"""Hops that came back from more than one dead worker: sent on in small groups, to find the one that kills."""

from __future__ import annotations

import asyncio

from .delivery import Delivery
from .moves import Moves

_FIRST_GROUP = 16
_LOOK_AGAIN_S = (0.02, 0.05, 0.1, 0.2, 0.3, 0.33)
"""How long after it was sent on a suspect may keep its place in the group; a handler may take much longer."""


class Suspects:
    """The gate of one run in one worker.

    A worker that dies takes all its hops with it, and thousands of them are innocent. Under suspicion for the first
    time they go in a small group, so that a killer takes few others with it; those go one by one.
    """

    def __init__(self, moves: Moves) -> None:
        self._moves = moves
        self._group = asyncio.Semaphore(_FIRST_GROUP)
        self._single = asyncio.Semaphore(1)

    async def send_on(self, delivery: Delivery) -> None:
        """Notes the crashes where that lasts, and sends the hop on; returns once it was executed, or had its time."""
        async with self._single if delivery.noted else self._group:
            sequence = await self._moves.again(delivery, delivery.crashes)
            for wait_s in _LOOK_AGAIN_S:
                await asyncio.sleep(wait_s)
                if await self._moves.newest_of(delivery.n) != sequence:
                    return
