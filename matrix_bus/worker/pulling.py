"""Back-pressure as arithmetic: each role has slots, and lanes are asked for as many messages as slots are free."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from ..bus import Lane
from ..errors import BusError

_TICK_S = 1.0
_IDLE_AFTER_S = 2.0
_IDLE_ASK = 8
"""What a lane may ask for that has been silent: it must not keep slots from the runs that have work."""


@dataclass(eq=False)
class Pool:
    """The slots of one role in this process, shared by the runs that use the role."""

    capacity: int
    busy: int = 0
    """Deliveries held, from arrival to settling, retries that wait for their time not counted."""
    lanes: dict[Lane, float] = field(default_factory=dict)
    """Each with the time of its last message."""
    _first: int = 0

    def asks(self, now: float) -> list[tuple[Lane, int]]:
        """(lane, messages to ask for), so that what is under way fills the free slots and never more."""
        spare = self.capacity - self.busy
        free = spare - sum(lane.outstanding for lane in self.lanes)
        active = [lane for lane, heard_at in self.lanes.items() if now - heard_at < _IDLE_AFTER_S]
        idle = [lane for lane in self.lanes if lane not in active]
        self._first = (self._first + 1) % len(self.lanes) if self.lanes else 0
        idle = idle[self._first :] + idle[: self._first]  # where slots are few, each lane is first in its turn
        result = []
        weights = sum(lane.weight for lane in active)
        shares = [(lane, max(1, int(spare * lane.weight / weights))) for lane in active]
        for lane, wanted in [*((lane, min(_IDLE_ASK, spare)) for lane in idle), *shares]:
            room = min(lane.room(wanted), free)
            if room > 0 and (room * 2 >= wanted or lane.outstanding == 0):
                result.append((lane, room))
                free -= room
        return result


class Pump:
    """Asks for messages whenever slots are free. One task for all lanes of the process."""

    def __init__(self) -> None:
        self._pools: set[Pool] = set()
        self._dirty: set[Pool] = set()
        self._wake = asyncio.Event()
        self._stopped = False

    def add(self, pool: Pool, lane: Lane) -> None:
        pool.lanes[lane] = 0.0
        self._pools.add(pool)
        self.touch(pool)

    def remove(self, pool: Pool, lane: Lane) -> None:
        pool.lanes.pop(lane, None)
        if not pool.lanes:
            self._pools.discard(pool)
            self._dirty.discard(pool)

    def touch(self, pool: Pool) -> None:
        """Something about the pool changed: look at it again soon."""
        self._dirty.add(pool)
        self._wake.set()

    def touch_all(self) -> None:
        """Look at everything again: the broker was away and has forgotten what was asked for."""
        self._dirty |= self._pools
        self._wake.set()

    def stop(self) -> None:
        """Nothing is asked for any more."""
        self._stopped = True

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with the event.
                async with asyncio.timeout(_TICK_S):
                    await self._wake.wait()
                pools = self._dirty
            except TimeoutError:
                pools = set(self._pools)  # lanes whose requests got lost notice it here
            self._wake.clear()
            self._dirty = set()
            if self._stopped:
                continue
            now = time.monotonic()
            for pool in pools:
                for lane, count in pool.asks(now):
                    try:
                        await lane.ask(count)
                    except BusError:
                        continue  # disconnected: the epoch changes and the next tick asks anew
