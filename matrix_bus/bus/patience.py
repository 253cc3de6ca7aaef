"""Waiting for the broker: what may be repeated is repeated until it is answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..errors import BusTimeout, BusUnavailable, NobodyListens, PublishRefused
from ..telemetry import logger
from .jetstream import Bus

_FULL = frozenset({10077, 10023, 10002, 10028, 10047})
"""No room in a stream (10077), a server (10023), an account (10002), its memory (10028), its files (10047)."""
_TRY_AGAIN = _FULL | {10164, 10158, 10008, 10009}
"""Codes after which the same bytes may be stored later: besides, in process (10158, 10164), and a cluster between two
leaders (10008, 10009)."""
_SAY_FULL_EVERY_S = 10.0
FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 2.0

T = TypeVar("T")
log = logger("bus")


async def patiently(
    bus: Bus, work: Callable[[], Awaitable[T]], still_wanted: Callable[[], Awaitable[object]] | None = None
) -> T:
    """Repeats an idempotent call until the broker answers it. Raises `PublishRefused` for a refusal that stays.

    Where nobody listens the broker is starting, or what is published to is gone for good: `still_wanted` raises then.
    """
    wait_s = FIRST_WAIT_S
    while True:
        try:
            return await work()
        except NobodyListens:
            if still_wanted is not None:
                await patiently(bus, still_wanted)
        except (BusTimeout, BusUnavailable):
            pass
        except PublishRefused as error:
            note_refusal(bus, error)
        wait_s = await pause(bus, wait_s)


def note_refusal(bus: Bus, error: PublishRefused) -> None:
    """Raises the error again unless the same bytes may be stored later; a full store is said every few seconds."""
    if error.code not in _TRY_AGAIN:
        raise error
    if error.code not in _FULL:
        log.debug("bus.broker_refuses", reason=str(error))
    elif time.monotonic() - bus.full_said_at > _SAY_FULL_EVERY_S:
        bus.full_said_at = time.monotonic()
        log.warning(
            "bus.store_full",
            reason=str(error),
            advice="nothing is lost, all of it waits for room: purge old runs (matrix-bus runs, matrix-bus purge RUN), "
            "or give the broker's store, or the account, more (max_file_store, max_file)",
        )


async def pause(bus: Bus, wait_s: float = FIRST_WAIT_S) -> float:
    """Waits for the broker, then a jittered moment; returns the next wait, in seconds."""
    await bus.wait_connected()
    await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
    return min(_LONGEST_WAIT_S, wait_s * 2)
