"""A caller's rows as lines of a dataset, asked for one by one: whoever takes them sets the pace."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import Any

from ..dataset import EVERYTHING, Check, Intake, Line, Mixer, Rejected, Selection, in_thread, mixed, read
from ..errors import DatasetError

Rows = str | os.PathLike[str] | Iterable[Any] | AsyncIterable[Any]
"""A path to a dataset, or rows: mappings, msgspec structs, dataclasses, JSON objects as str or bytes."""

Lines = AsyncGenerator[Line | Rejected, None]
Taken = Generator[Line | Rejected, None, None]


def path_of(rows: Rows) -> str:
    """The path, where rows are named by one; else empty. Raises `DatasetError` for what cannot be rows."""
    if isinstance(rows, str | os.PathLike):
        return os.fspath(rows)
    if isinstance(rows, Mapping | bytes) or not isinstance(rows, Iterable | AsyncIterable):
        raise DatasetError(f"rows must be a path or an iterable of rows, not {type(rows).__name__}")
    return ""


def lines_of(rows: Rows, check: Check, select: Selection = EVERYTHING, shuffle: tuple[int, int] = (0, 0)) -> Lines:
    """The selected rows, numbered and checked; `shuffle` is the size of a buffer to mix them in, and the seed.

    What the caller's iterator raises comes out as it is.
    """
    size, seed = shuffle
    if isinstance(rows, AsyncIterable):
        taken = _taken_async(rows, Intake(check, select))
        return _mixed_async(taken, Mixer(size, seed)) if size else taken
    if path := path_of(rows):
        lines = read(path, check, select)
    else:
        assert isinstance(rows, Iterable)
        lines = _taken(rows, Intake(check, select))
    return in_thread(_closing_mixed(lines, size, seed) if size else lines)


def _closing_mixed(lines: Taken, size: int, seed: int) -> Taken:
    with contextlib.closing(lines):
        yield from mixed(lines, size, seed)


async def _mixed_async(lines: Lines, mixer: Mixer[Line | Rejected]) -> Lines:
    async with contextlib.aclosing(lines):
        async for line in lines:
            if (out := mixer.swap(line)) is not None:
                yield out
    for line in mixer.rest():
        yield line


def _taken(rows: Iterable[Any], intake: Intake) -> Generator[Line | Rejected, None, None]:
    closing: AbstractContextManager[Any] = nullcontext()
    if inspect.isgenerator(rows):
        closing = contextlib.closing(rows)
    with closing:
        for item in rows:
            if (line := intake.take(item)) is not None:
                yield line
            if intake.is_full:
                return


async def _taken_async(rows: AsyncIterable[Any], intake: Intake) -> Lines:
    closing: AbstractAsyncContextManager[Any] = nullcontext()
    if inspect.isasyncgen(rows):
        closing = contextlib.aclosing(rows)
    async with closing:
        async for item in rows:
            if (line := intake.take(item)) is not None:
                yield line
            if intake.is_full:
                return
