"""Names the role that blocks the event loop: one handler that computes for seconds stalls every other row."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from types import CodeType, FrameType

from ..metrics import LOOP_BLOCKED
from ..telemetry import logger

BLOCKED_AFTER_S = 1.0
_TICK_S = 0.25

log = logger("watchdog")


class Watchdog:
    """A thread that sees when the loop stops ticking, and looks on its stack for a role's handler."""

    def __init__(self, roles: Mapping[CodeType, str], blocked_after_s: float = BLOCKED_AFTER_S) -> None:
        self._roles = roles
        """Handlers' code objects; may grow while running."""
        self._blocked_after_s = blocked_after_s
        self._ticked_at = time.monotonic()
        self._loop_thread = threading.get_ident()
        self._stop = threading.Event()
        self.blocked: dict[str, int] = {}
        """How often each role was caught."""

    async def run(self) -> None:
        """Ticks until cancelled, with the thread beside it."""
        self._ticked_at = time.monotonic()
        thread = threading.Thread(target=self._watch, name="matrix-bus-watchdog", daemon=True)
        thread.start()
        try:
            while True:
                await asyncio.sleep(_TICK_S)
                self._ticked_at = time.monotonic()
        finally:
            self._stop.set()

    def _watch(self) -> None:
        caught_at = 0.0
        while not self._stop.wait(_TICK_S):
            ticked_at = self._ticked_at
            late_s = time.monotonic() - ticked_at
            if late_s < self._blocked_after_s or ticked_at == caught_at:
                continue
            caught_at = ticked_at
            frame = sys._current_frames().get(self._loop_thread)
            role, where = self._blame(frame)
            self.blocked[role] = self.blocked.get(role, 0) + 1
            LOOP_BLOCKED.labels(role).inc(late_s)
            log.warning(
                "worker.loop_blocked",
                role=role,
                seconds=round(late_s, 1),
                where=where,
                advice="make the handler a plain def (runs in a thread), or role(process=True) if it burns CPU",
            )

    def _blame(self, frame: FrameType | None) -> tuple[str, str]:
        where = ""
        if frame is not None:
            top = traceback.extract_stack(frame, limit=1)[-1]
            where = f"{top.filename}:{top.lineno}"
        while frame is not None:
            if (role := self._roles.get(frame.f_code)) is not None:
                return role, where
            frame = frame.f_back
        return "unknown", where
