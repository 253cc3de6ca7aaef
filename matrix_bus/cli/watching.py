"""What is seen of a run while a command waits for it: a line of progress, and who is missing."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator

from .. import registry, run
from ..bus import Bus
from ..errors import BusError
from .common import say
from .feeding import Feed
from .show import ProgressLine, progress_text
from .telling import paused_text, worker_command

_EVERY_S = 1.0
_SAY_MISSING_AFTER_S = 4.0


@contextlib.asynccontextmanager
async def watched(
    bus: Bus, feed: Feed, tally: run.Tally, worker: subprocess.Popen[bytes] | None, spec: str
) -> AsyncIterator[ProgressLine]:
    """Shows progress while the body runs, and says which roles nobody serves."""
    line = ProgressLine()
    record = feed.record

    async def keep_showing() -> None:
        missing_since = 0.0
        said: list[str] = []
        paused: str | None = None
        child = worker
        while True:
            await asyncio.sleep(_EVERY_S)
            if child is not None and child.poll() is not None:
                line.clear()
                say(f"the worker ended with exit code {child.returncode}; the run is kept: start matrix-bus worker")
                child = None
            try:
                now = await registry.require(bus, record.id)
                progress = await registry.progress(bus, now)
            except BusError as error:
                line.show(f"waiting for the broker: {error}")
                continue
            line.show(progress_text(progress, tally, feed.rows if feed.reading else None))
            if now.state == "paused":
                if paused != now.why:
                    paused = now.why
                    line.clear()
                    say(paused_text(now))
                continue
            paused = None
            if not progress.idle_roles or progress.idle_roles == said:
                missing_since = 0.0
                continue
            missing_since = missing_since or time.monotonic()
            if time.monotonic() - missing_since > _SAY_MISSING_AFTER_S:
                said = progress.idle_roles
                line.clear()
                say(f"no worker serves {', '.join(said)}: waiting for one. Start it in another terminal:")
                say(f"  {worker_command(record, said, spec)}")

    showing = asyncio.create_task(keep_showing())
    try:
        yield line
    finally:
        showing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await showing
        line.clear()
