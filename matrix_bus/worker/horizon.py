"""Which deliveries somebody else may have had, or may have been given meanwhile."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ..bus import Bus, patiently
from .delivery import Delivery
from .heartbeat import Wheel

_EVERYTHING = 1 << 63


class Horizon:
    """The queue's end when this process connected to the broker last, or woke up after standing still.

    What is older may have been handled before: a restarted broker forgets delivery counts, and what waited in the
    socket of a process that stood still was given to others in the meantime.
    """

    def __init__(self, bus: Bus, stream: str, wheel: Wheel, held: Mapping[int, Delivery]) -> None:
        self._bus = bus
        self._stream = stream
        self._wheel = wheel
        self._held = held
        self._end = 0
        self._epoch = -1

    def end(self, now: float) -> int:
        """Deliveries up to this sequence are old: all of them, as long as the queue's end is not known again."""
        return self._end if self._is_known(now) else _EVERYTHING

    def doubts(self, delivery: Delivery) -> bool:
        """Whether others may have been given the delivery while we had it: our heartbeats may not have arrived."""
        return delivery.doubtful or not self._is_known(time.monotonic())

    def forget(self) -> None:
        """From now on everything is old, until `note` has looked."""
        self._epoch = -1

    async def note(self) -> None:
        """Asks for the queue's end, and doubts all that is held. Raises `PublishRefused`."""
        epoch, end = -1, 0
        while epoch != self._bus.epoch:  # else the answer may be from before a reconnect
            epoch = self._bus.epoch
            end = await patiently(self._bus, lambda: self._bus.last_sequence(self._stream))
        for delivery in self._held.values():
            delivery.doubtful = True
        self._end, self._epoch = end, epoch

    def _is_known(self, now: float) -> bool:
        return self._epoch == self._bus.epoch and now < self._wheel.overdue_at
