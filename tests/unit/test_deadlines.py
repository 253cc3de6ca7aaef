"""Handlers whose time is up are ended: each at its own time, whatever order they began in."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrix_bus.bus import Message
from matrix_bus.worker import deadlines as deadlines_module
from matrix_bus.worker.deadlines import EXPIRED, Deadlines
from matrix_bus.worker.delivery import Delivery

_FAR_S = 3600.0


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines_module, "_SWEEP_S", 0.002)


def _delivery(seq: int) -> Delivery:
    reply = f"$JS.ACK.W_r1.solver.1.{seq}.9.1700000000000000000.0"
    return Delivery(Message("q.r1.solver.7.3", reply, b"", b""), old_until=0, now=0.0)


class _Handlers:
    """Deliveries whose handlers wait for ever."""

    def __init__(self) -> None:
        self.held: dict[int, Delivery] = {}
        self.deadlines = Deadlines(self.held)

    def begin(self, seconds: float) -> Delivery:
        made = self.held[len(self.held)] = _delivery(len(self.held))
        made.task = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
        self.deadlines.begin(made, time.monotonic() + seconds)
        return made

    def settle(self, delivery: Delivery) -> None:
        del self.held[delivery.seq]
        delivery.deadline = 0.0
        delivery.task.cancel()


async def _ended(*deliveries: Delivery) -> None:
    async with asyncio.timeout(5):
        await asyncio.wait([delivery.task for delivery in deliveries])
    assert all(delivery.task.cancelled() and delivery.deadline == EXPIRED for delivery in deliveries)


async def test_one_that_begins_later_and_is_shorter_is_ended_first() -> None:
    handlers = _Handlers()
    watch = asyncio.create_task(handlers.deadlines.watch())
    long = handlers.begin(_FAR_S)
    short = handlers.begin(0.01)
    await _ended(short)
    del handlers.held[short.seq]
    await _ended(handlers.begin(0.01), handlers.begin(0.03))
    assert not long.task.done()
    assert long.deadline > time.monotonic()
    watch.cancel()
    long.task.cancel()


async def test_one_that_was_settled_is_left_alone_and_those_behind_it_are_not_forgotten() -> None:
    handlers = _Handlers()
    settled, later = handlers.begin(0.01), handlers.begin(0.02)
    waiting = _delivery(99)  # without a handler at work: it waits for its time, or publishes
    handlers.held[99] = waiting
    handlers.settle(settled)
    watch = asyncio.create_task(handlers.deadlines.watch())
    await _ended(later)
    assert settled.deadline == waiting.deadline == 0.0
    watch.cancel()


@given(st.lists(st.one_of(st.floats(-50, 50), st.just("sweep"), st.integers(0, 5)), max_size=40))
def test_a_look_is_never_left_out_that_would_have_ended_one(steps: list[float | str]) -> None:
    held: dict[int, Delivery] = {}
    deadlines = Deadlines(held)
    cancelled: set[int] = set()

    class Task:
        def __init__(self, seq: int) -> None:
            self.seq = seq

        def cancel(self) -> None:
            cancelled.add(self.seq)

    now = 100.0
    for seq, step in enumerate(steps):
        if step == "sweep":
            now += 10.0
            due = {seq for seq, one in held.items() if 0.0 < one.deadline < now}
            cancelled.clear()
            deadlines.sweep(now)
            assert cancelled == due
        elif isinstance(step, int):
            held.pop(step, None)
        else:
            held[seq] = _delivery(seq)
            held[seq].task = Task(seq)  # type: ignore[assignment]
            deadlines.begin(held[seq], now + float(step))
