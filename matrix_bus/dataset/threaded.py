"""A dataset that is read in a thread, while the event loop does other things."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncGenerator, Generator

from .lines import Line, Rejected

_AHEAD = 256
"""Lines that are read before somebody asks for the first of them."""
_AHEAD_BYTES = 1 << 20
_PATIENCE_S = 0.01
"""After so long what there is is given out, however little."""


async def in_thread(lines: Generator[Line | Rejected, None, None]) -> AsyncGenerator[Line | Rejected, None]:
    """Pulls in a thread: a generator that reads a database, a file or a pipe must not hold up the host's loop.

    It is one thread from the first row to the closing, since much of what generators hold (an sqlite3 cursor) may
    not change threads. A line that is there is given out, however long the next one takes; but where lines come
    fast, the thread reads while the loop waits, and the loop works while the thread does: two that want the
    interpreter's lock at once took three times as long for the same lines.
    """
    reader = _Reader(lines)
    # A daemon: one that waits for a pipe must not keep the process from ending.
    run = contextvars.copy_context().run
    threading.Thread(target=run, args=(reader.read,), name="matrix-bus-rows", daemon=True).start()
    try:
        while batch := await reader.next_batch():
            for line in batch:
                yield line
    finally:
        reader.close()


class _Reader:
    """What the thread and the loop share."""

    def __init__(self, lines: Generator[Line | Rejected, None, None]) -> None:
        self._lines = lines
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._ready: list[Line | Rejected] = []
        self._quota = self._quota_bytes = 0
        """What may still be read of what was asked for."""
        self._waiter: asyncio.Future[None] | None = None
        self._is_late = False
        """Whether the next line is to be given out at once."""
        self._ended = False
        self._error: BaseException | None = None

    async def next_batch(self) -> list[Line | Rejected]:
        """What there is, at least one line; nothing at the end. Raises what the generator raised."""
        while True:
            with self._changed:
                if self._ready:
                    batch, self._ready = self._ready, []
                    return batch
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return []
                self._quota, self._quota_bytes, self._is_late = _AHEAD, _AHEAD_BYTES, False
                self._waiter = waiter = self._loop.create_future()
                self._changed.notify()
            timer = self._loop.call_later(_PATIENCE_S, self._hurry)
            try:
                await waiter
            finally:
                timer.cancel()

    def _hurry(self) -> None:
        with self._changed:
            self._is_late = True
            if self._ready:
                self._wake()

    def close(self) -> None:
        """Has the thread close the generator, at the latest when it has given its next line."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def read(self) -> None:
        """The thread's work."""
        error: BaseException | None = None
        try:
            while self._is_asked() and (line := next(self._lines, None)) is not None:
                self._give(line)
        except BaseException as raised:  # it belongs to whoever waits for lines
            error = raised
        with contextlib.suppress(Exception):
            self._lines.close()
        with self._changed:
            self._error = error
            self._ended = True
            self._wake()

    def _is_asked(self) -> bool:
        """Waits for it; False at the end."""
        with self._changed:
            while not self._ended and self._is_spent:
                self._changed.wait()
            return not self._ended

    def _give(self, line: Line | Rejected) -> None:
        with self._changed:
            self._ready.append(line)
            self._quota -= 1
            self._quota_bytes -= len(line.body) if isinstance(line, Line) else 0
            if self._is_late or self._is_spent:
                self._wake()

    @property
    def _is_spent(self) -> bool:
        return self._quota <= 0 or self._quota_bytes <= 0

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                self._loop.call_soon_threadsafe(_resolve, waiter)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
