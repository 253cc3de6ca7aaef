"""Back-pressure: a submission does not run away from the workers.

The work stream itself has no limit: a full one would deadlock workers that hold what they cannot forward.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..bus import Bus, patiently
from ..orchestrator import work_stream
from ..registry import RunRecord
from ..telemetry import logger

_LOOK_EVERY = 4096
_LOOK_EVERY_BYTES = 32 << 20
_LOOK_AGAIN_S = 0.5

log = logger("run")


class Gauge:
    """Looks at the run's queue every so many rows and bytes, and waits while it is full."""

    def __init__(self, bus: Bus, record: RunRecord, still_wanted: Callable[[], Awaitable[None]]) -> None:
        """`still_wanted` raises if the run was ended."""
        self._bus = bus
        self._stream = work_stream(record.id)
        self._run = record.id
        self._most_messages = record.config.io.queue_messages
        self._most_bytes = record.config.io.queue_bytes
        self._still_wanted = still_wanted
        self._messages = 0
        """That may be published before the next look."""
        self._bytes = 0

    @property
    def is_due(self) -> bool:
        """Whether `look` comes before the next row."""
        return self._messages <= 0 or self._bytes <= 0

    def count(self, size: int) -> None:
        """A row of so many bytes is published."""
        self._messages -= 1
        self._bytes -= size

    async def look(self) -> None:
        """Returns when another row may be published."""
        waited = False
        while True:
            info = await patiently(self._bus, lambda: self._bus.api(f"STREAM.INFO.{self._stream}"))
            messages, size = info["state"]["messages"], info["state"]["bytes"]
            if messages < self._most_messages and size < self._most_bytes:
                break
            if not waited:
                waited = True
                full = f"io.queue_messages={self._most_messages}, io.queue_bytes={self._most_bytes}"
                log.warning("run.submission_waits", run=self._run, messages=messages, bytes=size, until_below=full)
            await asyncio.sleep(_LOOK_AGAIN_S)
            await self._still_wanted()
        if waited:
            log.warning("run.submission_goes_on", run=self._run, messages=messages, bytes=size)
        self._messages = min(_LOOK_EVERY, self._most_messages - messages)
        self._bytes = min(_LOOK_EVERY_BYTES, self._most_bytes - size)
