"""A queue that is full enough, and a store that has no room left."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from matrix_bus import Next, Outcome, Row, RunConfig, control, registry, run, success, to
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.config import IoConfig
from matrix_bus.errors import PublishRefused, RunError
from matrix_bus.orchestrator import outcome_stream, work_stream
from tests.helpers import (
    all_outcomes,
    connected,
    messages,
    numbered,
    server_with,
    submitted,
    unique,
    until,
    work_stream_of,
    working,
)
from tests.trip import Trip, rows, trip


@pytest.mark.parametrize("io", [IoConfig(queue_messages=50), IoConfig(queue_bytes=6000)], ids=["messages", "bytes"])
async def test_a_submission_waits_for_the_workers_while_the_queue_is_full(
    bus: Bus, io: IoConfig, caplog: pytest.LogCaptureFixture
) -> None:
    flow = trip()
    record = await run.open_run(bus, run.new_record(flow, RunConfig(io=io), run=unique("trip")))
    submitting = asyncio.create_task(run.submit(bus, record, numbered(rows(6000))))
    await until(lambda: "submission_waits" in caplog.text, "the submission to wait")
    waiting = await messages(bus, work_stream(record.id))
    assert 50 <= waiting < 3000, "as many as it says, and those that were on their way"
    await asyncio.sleep(0.7)
    assert await messages(bus, work_stream(record.id)) == waiting
    async with working(bus.url, flow):
        assert (await asyncio.wait_for(submitting, 60)).rows == 6000
        assert len(await all_outcomes(bus, record, 60)) == 6000


async def test_a_submission_that_waits_learns_that_its_run_was_cancelled(bus: Bus) -> None:
    record = await run.open_run(bus, run.new_record(trip(), RunConfig(io=IoConfig(queue_messages=10))))
    submitting = asyncio.create_task(run.submit(bus, record, numbered(rows(500))))
    await until(lambda: _holds(bus, record, 10), "a full queue")
    await control.cancel(bus, record.id)
    with pytest.raises(RunError, match="was cancelled while rows were being submitted"):
        await asyncio.wait_for(submitting, 10)


async def _holds(bus: Bus, record: registry.RunRecord, count: int) -> bool:
    return await messages(bus, work_stream(record.id)) >= count


async def _fill(bus: Bus) -> str:
    """Takes all the room that the store has; returns the stream that does."""
    subject = unique("junk")
    stream = await work_stream_of(bus, f"{subject}.>")
    number = 0
    for size in (200_000, 2_000, 10):  # up to the last byte
        while True:
            try:
                await bus.publish(f"{subject}.{number}", os.urandom(size))
            except PublishRefused:
                break
            number += 1
    return stream


def _small_server(directory: Path) -> AbstractContextManager[str]:
    return server_with(directory, "", "max_file_store: 12MB")


def _small_account(directory: Path) -> AbstractContextManager[str]:
    account = "jetstream { max_file: 12MB, max_mem: 1MB }, users [{ user: me, password: secret }]"
    return server_with(directory, f"accounts {{ mine {{ {account} }} }}", user="me:secret")


@pytest.mark.parametrize("full", [_small_server, _small_account], ids=["server", "account"])
async def test_a_store_without_room_costs_nothing_but_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, full: Callable[[Path], AbstractContextManager[str]]
) -> None:
    calls: Counter[tuple[str, int]] = Counter()
    gate = asyncio.Event()

    async def first(row: Row[Trip]) -> Next:
        calls["a", row.number] += 1
        await gate.wait()
        row.state.text = "y" * 2_000
        return to("b")

    async def second(row: Row[Trip]) -> Outcome:
        calls["b", row.number] += 1
        return success("done")

    flow = trip(first, second)
    with full(tmp_path / "broker") as url:
        async with connected(url) as bus, working(url, flow), working(url, flow):
            record = await submitted(bus, flow, rows(40), RunConfig(ack_wait_s=1))
            await until(lambda: len(calls) == 40, "all rows to be at work")
            stream = await _fill(bus)
            more = asyncio.create_task(submitted(bus, flow, rows(20)))
            gate.set()
            await until(lambda: "store_full" in caplog.text, "somebody to say that the store is full")
            assert "matrix-bus purge" in caplog.text
            await asyncio.sleep(3.0)  # several times AckWait: the hops must stay where they are
            assert set(calls.values()) == {1}
            assert await messages(bus, outcome_stream(record.id)) == 0
            assert not more.done()
            await bus.api(f"STREAM.PURGE.{stream}")
            outcomes = await all_outcomes(bus, record, 60)
            second_run = await asyncio.wait_for(more, 60)
            assert len(await all_outcomes(bus, second_run, 60)) == 20
    assert [(o.row, o.outcome, o.attempts, o.errors) for o in outcomes] == [(n, "success", 2, []) for n in range(40)]
    assert {calls[role, n] for role in "ab" for n in range(20, 40)} == {1}, "no handler was called twice"


async def test_a_store_that_fills_up_while_rows_move(tmp_path: Path) -> None:
    """Whatever is under way at that moment: admissions, hops, outcomes, large values."""
    calls: Counter[tuple[int, int]] = Counter()

    async def grow(row: Row[Trip]) -> Next:
        calls[row.number, row.hop] += 1
        row.state.text = "y" * (100_000 if row.number % 3 == 0 else 1_000)
        await asyncio.sleep(0.02)
        return to("a") if row.turn < 4 else to("b")

    flow = trip(grow)
    with Broker(tmp_path / "broker", max_file_store="40MB") as broker:
        async with connected(broker.url) as bus, working(broker.url, flow):
            record = await submitted(bus, flow, rows(600), RunConfig(ack_wait_s=1, max_in_flight=30))
            for _ in range(2):
                before = sum(calls.values())
                await until(lambda before=before: sum(calls.values()) > before + 20, "some hops")  # type: ignore[misc]
                stream = await _fill(bus)
                await asyncio.sleep(1.5)
                await bus.api(f"STREAM.DELETE.{stream}")
            outcomes = await all_outcomes(bus, record, 60)
    assert [(o.row, o.outcome, o.errors) for o in outcomes] == [(n, "success", []) for n in range(600)]
    assert set(calls.values()) == {1}
