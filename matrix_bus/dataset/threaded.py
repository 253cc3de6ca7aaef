"""A dataset that is read in a thread, while the event loop does other things."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncGenerator, Generator

from .lines import Line, Rejected

_AHEAD = 64
"""Lines that are read before somebody asks for the first of them."""
_AHEAD_BYTES = 1 << 20


async def in_thread(lines: Generator[Line | Rejected, None, None]) -> AsyncGenerator[Line | Rejected, None]:
    """Pulls in a thread: a generator that reads a database, a file or a pipe must not hold up the host's loop.

    It is one thread from the first row to the closing, since much of what generators hold (an sqlite3 cursor) may
    not change threads. A line that is there is given out, however long the next one takes.
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
        self._ended = False
        self._error: BaseException | None = None

    async def next_batch(self) -> list[Line | Rejected]:
        """What there is, at least one line; nothing at the end. Raises what the generator raised."""
        while True:
            with self._changed:
                if batch := self._ready:
                    self._ready = []
                    return batch
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return []
                self._quota, self._quota_bytes = _AHEAD, _AHEAD_BYTES
                self._waiter = waiter = self._loop.create_future()
                self._changed.notify()
            await waiter

    def close(self) -> None:
        """Has the thread close the generator, at the latest when it has given its next line."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def read(self) -> None:
        """The thread's work."""
        error: BaseException | None = None
        try:
            while self._is_asked():
                line = next(self._lines, None)
                if line is None:
                    break
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
        with self._changed:
            while not self._ended and (self._quota <= 0 or self._quota_bytes <= 0):
                self._changed.wait()
            return not self._ended

    def _give(self, line: Line | Rejected) -> None:
        with self._changed:
            self._ready.append(line)
            self._quota -= 1
            self._quota_bytes -= len(line.body) if isinstance(line, Line) else 0
            self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                self._loop.call_soon_threadsafe(_resolve, waiter)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
