"""Who has a hop: asked before the handler of a delivery is called that somebody may have had before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from ..bus import Bus
from ..errors import BusError
from .delivery import Delivery
from .moves import Moves

if TYPE_CHECKING:
    from nats.aio.msg import Msg

OWNER_ANSWERS_WITHIN_S = 0.3
_OWNER_RETURNS_WITHIN_S = 2.0


class Ownership:
    """For one run in one worker. A worker that holds a hop takes over the ack subject of whoever asks."""

    def __init__(self, bus: Bus, run: str, moves: Moves, held: Mapping[int, Delivery]) -> None:
        self._bus = bus
        self._subject = f"own.{run}"
        self._moves = moves
        self._held = held

    async def listen(self) -> Callable[[], Awaitable[None]]:
        """Answers others from now on; returns what ends that."""
        subscription = await self._bus.nc.subscribe(self._subject, cb=self._answer)
        return subscription.unsubscribe

    async def needs_handler(self, delivery: Delivery, generation: int, lease: str) -> bool:
        """Whether a delivery that may have been handled before still needs a handler. If not, it is settled."""
        if not await self._is_current(delivery, generation, lease):
            return False
        while True:
            asked_at = time.monotonic()
            if await self._has_owner(delivery):
                return False
            # After an outage the owner may come back a moment later than we do.
            if asked_at - self._bus.reconnected_at > _OWNER_RETURNS_WITHIN_S:
                break
            await asyncio.sleep(OWNER_ANSWERS_WITHIN_S)
        # An owner that moved the row on between our look-up and our question has nothing left to answer for.
        return await self._is_current(delivery, generation, lease)

    async def _is_current(self, delivery: Delivery, generation: int, lease: str) -> bool:
        """Whether the row still stands where the delivery says. If not, the delivery is settled."""
        if not await self._moves.is_last(delivery):
            self._moves.ack(delivery)
            return False
        if await self._moves.has_outcome(delivery.n, generation):
            await self._moves.free(delivery, lease)
            return False
        return True

    async def _has_owner(self, delivery: Delivery) -> bool:
        """True if a living worker has the hop: it has taken over the new ack subject."""
        query = msgspec.json.encode({"seq": delivery.seq, "ack": delivery.ack_subject})
        try:
            async with asyncio.timeout(OWNER_ANSWERS_WITHIN_S):
                await self._bus.call(self._subject, query)
        except (TimeoutError, BusError):
            return False
        return True

    async def _answer(self, message: Msg) -> None:
        query = msgspec.json.decode(message.data)
        held = self._held.get(query["seq"])
        if held is not None and held.running:
            held.ack_subject = query["ack"]
            held.beat_at = time.monotonic()
            self._bus.send(message.reply, b"mine")
