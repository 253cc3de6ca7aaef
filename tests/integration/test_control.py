"""Cancelling and purging, also half-way and twice."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from matrix_bus import Next, Row, RunConfig, control, registry, run, to
from matrix_bus.bus import Bus
from matrix_bus.dataset import Line
from matrix_bus.errors import PublishRefused, RunError
from matrix_bus.orchestrator import outcome_stream, work_stream
from matrix_bus.payload import Payloads, stream_of
from tests.helpers import all_outcomes, messages, submitted, until, working
from tests.trip import Trip, rows, trip


async def missing(bus: Bus, stream: str) -> bool:
    try:
        await messages(bus, stream)
    except PublishRefused:
        return True
    return False


async def test_cancel_ends_every_row_that_has_not_ended(bus: Bus, tmp_path: Path) -> None:
    held = asyncio.Event()

    async def stay(row: Row[Trip]) -> Next:
        if row.number >= 3:
            await held.wait()
        return to("b")

    flow = trip(stay)
    record = await submitted(bus, flow, rows(20), RunConfig(max_in_flight=8))
    async with working(bus.url, flow):
        await until(lambda: _outcomes(bus, record.id, 3), "three outcomes")
        assert await control.cancel(bus, record.id) == 17
        assert await control.cancel(bus, record.id) == 0, "once more changes nothing"
        outcomes = await all_outcomes(bus, record)
    assert [o.row for o in outcomes] == list(range(20))
    assert [(o.outcome, o.reason) for o in outcomes[:3]] == [("success", "done")] * 3
    assert {(o.outcome, o.reason) for o in outcomes[3:]} == {("filtered", "cancelled")}
    assert [json.loads(bytes(o.input)) for o in outcomes] == [{"x": n} for n in range(20)]
    travelled = [o for o in outcomes[3:] if o.hops == 1]
    assert len(travelled) == 8, "those that were under way tell how far they came"
    assert {bytes(o.state) == b"null" for o in travelled} == {False}
    assert await missing(bus, work_stream(record.id))
    progress = await registry.progress(bus, await registry.require(bus, record.id))
    assert progress.done and (progress.total, progress.in_flight, progress.waiting) == (20, 0, 0)
    written = await run.collect(bus, record, tmp_path / "out.jsonl", follow=True)
    assert written.lines == 20


async def _outcomes(bus: Bus, run_id: str, count: int) -> bool:
    return await messages(bus, outcome_stream(run_id)) >= count


async def test_a_complete_run_cannot_be_cancelled(bus: Bus) -> None:
    flow = trip()
    record = await submitted(bus, flow, rows(1))
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
    with pytest.raises(RunError, match="is complete"):
        await control.cancel(bus, record.id)


async def test_a_submitter_learns_that_its_run_was_cancelled(bus: Bus) -> None:
    record = await run.open_run(bus, run.new_record(trip(), RunConfig()))
    gate = asyncio.Event()

    def lines() -> Any:
        for number in range(10**9):
            if number == 2000:
                gate.set()
            yield Line(number, b'{"x": 1}', str(number))

    submitting = asyncio.create_task(run.submit(bus, record, lines()))
    await asyncio.wait_for(gate.wait(), 20)
    await control.cancel(bus, record.id)
    with pytest.raises(RunError, match="was cancelled while rows were being submitted"):
        await asyncio.wait_for(submitting, 20)
    progress = await registry.progress(bus, await registry.require(bus, record.id))
    assert progress.done and progress.outcomes >= 2000 - 1024


async def test_purge_deletes_everything_and_keeps_the_id_taken(bus: Bus) -> None:
    flow = trip()
    record = await submitted(bus, flow, rows(3))
    await control.purge(bus, record.id)
    await control.purge(bus, record.id)
    for stream in (work_stream(record.id), outcome_stream(record.id), stream_of(record.id)):
        assert await missing(bus, stream)
    with pytest.raises(RunError, match="no run"):
        await registry.require(bus, record.id)
    with pytest.raises(RunError, match="choose another --run"):
        await run.open_run(bus, run.new_record(flow, RunConfig(), run=record.id))
    with pytest.raises(RunError, match="no run"):
        await control.purge(bus, "never-was")


async def test_values_that_no_outcome_refers_to_are_freed(bus: Bus) -> None:
    flow = trip()
    line = b'{"x": 1, "text": "%b"}' % (b"y" * 100_000)
    record = await submitted(bus, flow, [line])
    payloads = Payloads(bus, record.id)
    loose = await payloads.put(b"1" * 10_000)
    with pytest.raises(RunError, match="is not complete"):
        await control.free_unreferenced(bus, record.id)
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
    kept = await payloads.names() - {loose.sha256}
    assert kept
    assert await control.free_unreferenced(bus, record.id) == 1
    assert await payloads.names() == kept
