"""Rows leave nothing behind that only the garbage collector can free; and how often a worker has it look."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator

import pytest

from matrix_bus import Next, Row, to
from matrix_bus.bus import Bus, fence
from matrix_bus.errors import PublishRefused, Retry
from matrix_bus.worker import garbage
from tests.helpers import all_outcomes, submitted, unique, until, working
from tests.trip import Trip, rows, trip


@contextlib.contextmanager
def uncollected() -> Iterator[list[int]]:
    """Holds the objects in cycles that were left meanwhile, once it is over."""
    found: list[int] = []
    gc.collect()
    gc.disable()
    try:
        yield found
        found.append(gc.collect())
    finally:
        gc.enable()


async def test_a_row_leaves_no_cycles(bus: Bus) -> None:
    async with working(bus.url, flow := trip()):
        await all_outcomes(bus, await submitted(bus, flow, rows(10)))  # what is made once is made
        with uncollected() as found:
            outcomes = await all_outcomes(bus, await submitted(bus, flow, rows(300)))
    assert {outcome.outcome for outcome in outcomes} == {"success"}
    assert found[0] < 300  # a cycle is a dozen objects; there were two in each row


async def test_a_refused_publish_leaves_no_cycle(bus: Bus) -> None:
    stream = unique("s")
    await bus.api(f"STREAM.CREATE.{stream}", {"name": stream, "subjects": [f"{stream}.>"], "storage": "memory"})
    await bus.publish(f"{stream}.a", b"")
    with uncollected() as found:
        for _ in range(100):
            assert await bus.last_of(f"{stream}.a") == 1
            with pytest.raises(PublishRefused):
                await bus.publish(f"{stream}.a", b"", fence(7))
    assert found[0] < 100
    await bus.api(f"STREAM.DELETE.{stream}")


async def test_the_more_is_held_the_later_garbage_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "_EVERY_S", 0.001)
    before = gc.get_threshold()
    held = 0
    pacing = asyncio.create_task(garbage.pace(lambda: held))
    try:
        held = 50_000
        await until(lambda: gc.get_threshold() == (400_000, *before[1:]), "a threshold for many rows")
        held = 10
        await until(lambda: gc.get_threshold() == before, "the threshold as it was")
    finally:
        pacing.cancel()
        gc.set_threshold(*before)


async def test_a_failed_call_leaves_no_cycle(bus: Bus) -> None:
    async def flaky(row: Row[Trip]) -> Next:
        if row.attempt == 1:
            raise Retry("busy", after_s=0.001)
        return to("b")

    async with working(bus.url, flow := trip(flaky)):
        await all_outcomes(bus, await submitted(bus, flow, rows(10)))
        with uncollected() as found:
            outcomes = await all_outcomes(bus, await submitted(bus, flow, rows(200)))
    assert {(outcome.outcome, len(outcome.errors)) for outcome in outcomes} == {("success", 1)}
    assert found[0] < 200
