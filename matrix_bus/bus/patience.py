"""Waiting for the broker: what may be repeated is repeated until it is answered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..errors import BusTimeout, BusUnavailable, PublishRefused
from ..telemetry import logger
from .connection import Bus

TRY_AGAIN = frozenset({10164, 10158, 10077, 10023, 10008, 10009})
"""Codes after which the same bytes may be stored later: in process (10158, 10164), full (10077), no resources (10023),
a cluster between two leaders (10008, 10009)."""
FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 2.0

T = TypeVar("T")
log = logger("bus")


async def patiently(bus: Bus, work: Callable[[], Awaitable[T]]) -> T:
    """Repeats an idempotent call until the broker answers it. Raises `PublishRefused` for a refusal that stays."""
    wait_s = FIRST_WAIT_S
    while True:
        try:
            return await work()
        except (BusTimeout, BusUnavailable):
            pass
        except PublishRefused as error:
            if error.code not in TRY_AGAIN:
                raise
            log.warning("bus.broker_refuses", reason=str(error), advice="nothing is lost, it is sent again")
        wait_s = await pause(bus, wait_s)


async def pause(bus: Bus, wait_s: float = FIRST_WAIT_S) -> float:
    """Waits for the broker, then a jittered moment; returns the next wait, in seconds."""
    await bus.wait_connected()
    await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
    return min(_LONGEST_WAIT_S, wait_s * 2)
