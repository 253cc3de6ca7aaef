"""Back-pressure as arithmetic: each role has slots, and lanes are asked for as many messages as slots are free."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from ..bus import Lane
from ..errors import BusError

_TICK_S = 1.0
_IDLE_AFTER_S = 2.0
_MOST_BYTES = 32 << 20
"""Under way to this process, all lanes together: half of what a broker keeps for a client before it cuts it off."""
_IDLE_ASK = 8
"""What a lane may ask for that has been silent: it must not keep slots from the runs that have work."""


@dataclass(eq=False)
class Share:
    """What one run has of the slots of a role."""

    pool: Pool
    role: str = ""
    lane: Lane | None = None
    """None while the run is paused."""
    weight: float = 1.0
    busy: int = 0
    heard_at: float = 0.0
    """When its lane brought the last message."""

    def take(self) -> None:
        """A delivery occupies a slot, from its arrival to its settling."""
        self.busy += 1
        self.pool.busy += 1

    def free(self) -> None:
        """It does not need the slot any more, or not while it waits."""
        self.busy -= 1
        self.pool.busy -= 1

    def move_to(self, pool: Pool) -> None:
        """Takes slots from another pool, for what is held already too."""
        self.pool.busy -= self.busy
        pool.busy += self.busy
        self.pool = pool


@dataclass(eq=False)
class Pool:
    """The slots of one role in this process, shared by the runs that use the role."""

    capacity: int
    busy: int = 0
    shares: list[Share] = field(default_factory=list)
    """Of runs that pull."""
    _first: int = 0

    def asks(self, now: float) -> list[tuple[Lane, int]]:
        """(lane, messages to ask for), so that what is under way fills the free slots and never more.

        Whoever has least for its weight is first, up to its part of all slots; of what is still free then, each has
        its part again, so that slots which one run has no use for go to the others.
        """
        spare = self.capacity - self.busy
        lanes = [(share, share.lane) for share in self.shares if share.lane is not None]
        free = spare - sum(lane.outstanding for _, lane in lanes)
        active = [(share, lane) for share, lane in lanes if now - share.heard_at < _IDLE_AFTER_S]
        idle = [(share, lane) for share, lane in lanes if now - share.heard_at >= _IDLE_AFTER_S]
        self._first = (self._first + 1) % len(lanes) if lanes else 0
        idle = idle[self._first :] + idle[: self._first]  # where slots are few, each lane is first in its turn
        active.sort(key=lambda pair: (pair[0].busy + pair[1].outstanding) / pair[0].weight)
        weights = sum(share.weight for share, _ in active)
        wanted = [(lane, _IDLE_ASK) for _, lane in idle]
        for share, lane in active:
            part = share.weight / weights
            wanted.append((lane, max(1, int(self.capacity * part) - share.busy, int(spare * part))))
        result = []
        for lane, count in wanted:
            most = min(count, spare, lane.fitting)
            room = min(lane.room(most), free)
            if room > 0 and (room * 2 >= most or lane.outstanding == 0):
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
        self._divided = True

    def add(self, share: Share) -> None:
        """Begins to ask for the share's messages."""
        share.pool.shares.append(share)
        self._pools.add(share.pool)
        self._divided = False
        self.touch(share.pool)

    def remove(self, share: Share) -> None:
        """Asks for them no more."""
        pool = share.pool
        if share in pool.shares:
            pool.shares.remove(share)
            self._divided = False
        if not pool.shares:
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
            if not self._divided:
                self._divide()
            now = time.monotonic()
            for pool in pools:
                for lane, count in pool.asks(now):
                    try:
                        await lane.ask(count)
                    except BusError:
                        continue  # disconnected: the epoch changes and the next tick asks anew

    def _divide(self) -> None:
        """Gives each lane its part of what may be under way."""
        self._divided = True
        lanes = [share.lane for pool in self._pools for share in pool.shares if share.lane is not None]
        for lane in lanes:
            lane.most_bytes = _MOST_BYTES // len(lanes)
