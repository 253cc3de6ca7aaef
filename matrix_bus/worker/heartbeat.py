"""Heartbeats for all deliveries of a run from one timer: a task or a timer per message would cost more than a hop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..bus import Bus
from ..errors import BusError
from .delivery import Delivery

_SPOKES = 16


class Wheel:
    """Sends a heartbeat for each delivery on it every third of AckWait; adding and removing are O(1)."""

    def __init__(self, bus: Bus, ack_wait_s: float, on_overdue: Callable[[], None] = lambda: None) -> None:
        """`on_overdue` is called when the wheel stood still for so long that others may have been given our hops."""
        self._bus = bus
        self._period_s = ack_wait_s / 3
        self._overdue_s = ack_wait_s / 2
        self.overdue_at = time.monotonic() + self._overdue_s
        """On the monotonic clock: when the process must have been stopped, or its loop blocked, if it did not turn."""
        self._on_overdue = on_overdue
        self._spokes: list[set[Delivery]] = [set() for _ in range(_SPOKES)]
        self._at = 0

    def add(self, delivery: Delivery) -> None:
        """From now on the delivery is kept alive; its first heartbeat comes within one period."""
        delivery.spoke = self._at - 1
        self._spokes[delivery.spoke].add(delivery)

    def remove(self, delivery: Delivery) -> None:
        self._spokes[delivery.spoke].discard(delivery)

    def __len__(self) -> int:
        return sum(map(len, self._spokes))

    async def turn(self) -> None:
        """Runs until cancelled. Outages are waited out: the broker counts AckWait from its own restart."""
        while True:
            await asyncio.sleep(self._period_s / _SPOKES)
            if (now := time.monotonic()) > self.overdue_at:
                self._on_overdue()
            self.overdue_at = now + self._overdue_s
            self._at = (self._at + 1) % _SPOKES
            if not self._bus.connected:
                continue
            try:
                # In one write, so that none is settled between two of them: a NAK must be the last word.
                if spoke := self._spokes[self._at]:
                    self._bus.working([delivery.ack_subject for delivery in spoke])
                now = time.monotonic()
                for delivery in spoke:
                    delivery.beat_at = now
            except BusError:
                continue  # the connection went away in between; the next turn finds it back
