"""Reading in a thread: every line once and in order, however fast the lines come and however they end."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Generator

import pytest

from matrix_bus.dataset import Line, Rejected, in_thread
from matrix_bus.dataset.threaded import _Reader

Rows = Generator[Line | Rejected, None, None]


def line(number: int, size: int = 10) -> Line:
    return Line(number, b"x" * size, str(number))


async def test_no_line_is_lost_or_doubled_where_the_pace_changes() -> None:
    draw = random.Random(1)

    def uneven() -> Rows:
        for number in range(5_000):
            if draw.random() < 0.01:
                time.sleep(draw.choice([0.0, 0.001, 0.012]))
            yield line(number, draw.choice([10, 10, 10, 100_000]))

    seen = []
    async for found in in_thread(uneven()):
        assert isinstance(found, Line)
        seen.append(found.number)
        if found.number % 97 == 0:
            await asyncio.sleep(draw.choice([0.0, 0.003]))
    assert seen == list(range(5_000))


async def test_a_line_is_given_out_while_the_next_one_does_not_come() -> None:
    gate = threading.Event()

    def stuck() -> Rows:
        yield line(0)
        yield line(1)
        gate.wait(20)
        yield line(2)

    lines = in_thread(stuck())
    assert [(await anext(lines)).number, (await anext(lines)).number] == [0, 1]  # type: ignore[union-attr]
    third = asyncio.ensure_future(anext(lines))
    await asyncio.sleep(0.05)
    assert not third.done()
    gate.set()
    assert (await third) == line(2)
    with pytest.raises(StopAsyncIteration):
        await anext(lines)


async def test_a_wake_up_without_a_line_is_not_the_end() -> None:
    """It would cut the dataset off, and the run would be sealed with what had come."""
    gate = threading.Event()

    def late() -> Rows:
        gate.wait(20)
        yield line(0)

    reader = _Reader(late())
    thread = threading.Thread(target=reader.read)
    thread.start()
    first = asyncio.ensure_future(reader.next_batch())
    for _ in range(3):
        await asyncio.sleep(0.01)
        with reader._changed:
            reader._wake()
    await asyncio.sleep(0.01)
    assert not first.done()
    gate.set()
    assert [await first, await reader.next_batch()] == [[line(0)], []]
    thread.join(5)


async def test_what_was_read_comes_before_the_error() -> None:
    def broken() -> Rows:
        yield line(0)
        raise OSError("the disk is gone")

    lines = in_thread(broken())
    assert await anext(lines) == line(0)
    with pytest.raises(OSError, match="the disk is gone"):
        await anext(lines)


async def test_it_reads_ahead_no_more_than_is_asked_for() -> None:
    given: list[int] = []

    def large() -> Rows:
        for number in range(1_000):
            given.append(number)
            yield line(number, 400_000)

    lines = in_thread(large())
    await anext(lines)
    await asyncio.sleep(0.05)
    assert len(given) <= 4, "1 MiB ahead, and the line that passes it"
    await lines.aclose()
    await asyncio.sleep(0.05)
    assert len(given) <= 4
