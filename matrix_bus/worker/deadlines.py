"""Ends handlers whose time is up. A timer for each would cost more than it ends, and so would looking at each."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping

from .delivery import Delivery

_SWEEP_S = 0.5
EXPIRED = -1.0
"""The deadline of a delivery whose handler was ended because its time was up."""


class Deadlines:
    """Of all deliveries of a run that are held: nobody is looked at before the earliest of them is over."""

    def __init__(self, held: Mapping[int, Delivery]) -> None:
        self._held = held
        self._earliest = math.inf
        """No deadline is before it; the one that it came from may be settled already."""

    def begin(self, delivery: Delivery, deadline: float) -> None:
        """The handler is given until `deadline`, on the monotonic clock; it may take `_SWEEP_S` more."""
        delivery.deadline = deadline
        self._earliest = min(self._earliest, deadline)

    async def watch(self) -> None:
        """Runs until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.sweep(time.monotonic())

    def sweep(self, now: float) -> None:
        """Ends those whose deadline is over, if there may be any."""
        if now <= self._earliest:
            return
        self._earliest = math.inf
        for delivery in list(self._held.values()):
            if 0.0 < delivery.deadline < now:
                delivery.deadline = EXPIRED
                delivery.task.cancel()
            elif delivery.deadline > 0.0:
                self._earliest = min(self._earliest, delivery.deadline)
