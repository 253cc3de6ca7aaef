"""Following a run, collecting it and what else reads outcomes, while the broker has troubles of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from matrix_bus import Outcome, Row, Workflow, control, registry, run
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus, Stored
from matrix_bus.config import parse_run
from matrix_bus.errors import PublishRefused
from matrix_bus.orchestrator import outcome_stream, work_stream
from matrix_bus.payload import Payloads
from matrix_bus.registry import RunRecord
from tests.helpers import all_outcomes, connected, done, submitted, until, working
from tests.trip import Trip, rows, trip


async def test_a_registry_without_a_leader_is_waited_for(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a cluster says it between two leaders of that bucket, while outcomes can be read."""
    flow = trip()
    record = await submitted(bus, flow, rows(4))
    last, refused = Bus.last, asyncio.Event()

    async def leaderless(self: Bus, stream: str, subject: str) -> Stored | None:
        if refused.is_set():
            return await last(self, stream, subject)
        refused.set()
        raise PublishRefused(stream, 10008, "JetStream system temporarily unavailable")

    monkeypatch.setattr(Bus, "last", leaderless)
    following = asyncio.create_task(all_outcomes(bus, record))
    await refused.wait()
    async with working(bus.url, flow):
        assert len(await following) == 4


@pytest.mark.parametrize(("place", "name"), [(Bus, "read"), (registry, "get"), (registry, "require")])
async def test_collecting_goes_on_over_a_broker_that_dies_at_any_look(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> None:
    flow, path = trip(), tmp_path / "out.jsonl"
    async with connected(broker.url) as bus:
        record = await _half_collected(bus, flow, path)
        starting = _dies_before(broker, monkeypatch, place, name)
        tally = run.Tally(flow)
        await run.collect(bus, record, path, follow=True, tally=tally)  # which counts first what is in the file
        await starting.get_nowait()
    assert tally.rows == 4


async def _half_collected(bus: Bus, flow: Workflow[Trip], path: Path) -> RunRecord:
    """A complete run of four rows, which are in the file of a collector that did not know that they are all."""
    record = await submitted(bus, flow, rows(4))
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
    await registry.update(bus, record.id, total=None)
    await run.collect(bus, record, path, follow=False)
    return await registry.update(bus, record.id, total=4)


def _dies_before(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> asyncio.Queue[asyncio.Task[Broker]]:
    """Has the broker killed before the next such call, and started again beside it; returns where that task is put."""
    call: Callable[..., Any] = getattr(place, name)
    starting: asyncio.Queue[asyncio.Task[Broker]] = asyncio.Queue()

    def dying(*arguments: Any, **more: Any) -> Any:
        if starting.empty():
            broker.kill()
            starting.put_nowait(asyncio.create_task(asyncio.to_thread(broker.start)))
        return call(*arguments, **more)

    monkeypatch.setattr(place, name, dying)
    return starting


# --- a follower that lags behind --------------------------------------------------------------------------------------


def _lagging(monkeypatch: pytest.MonkeyPatch, stream: str, *, reads: int = 2, known: int = 1) -> None:
    """Has the next reads of the stream end after those `known`, as reads that a follower answers may do."""
    read = Bus.read

    async def behind(self: Bus, of: str, start: int = 1, **more: Any) -> AsyncIterator[Stored]:
        nonlocal reads
        lags = of == stream and reads > 0
        reads -= lags
        async for message in read(self, of, start, **more):
            if not lags or message.seq <= known:
                yield message

    monkeypatch.setattr(Bus, "read", behind)


async def test_no_value_is_freed_that_an_outcome_refers_to(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = trip()
    record = await submitted(bus, flow, [b'{"x": 1, "text": "%b"}' % (letter * 100_000) for letter in (b"y", b"z")])
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
    values = await Payloads(bus, record.id).names()
    _lagging(monkeypatch, outcome_stream(record.id))
    assert await control.free_unreferenced(bus, record.id) == 0
    assert await Payloads(bus, record.id).names() == values


async def test_what_was_sent_again_is_followed_to_its_last_outcome(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    record = await _sent_again(bus)
    monkeypatch.setattr("matrix_bus.run.following._POLL_S", 0.1)
    _lagging(monkeypatch, outcome_stream(record.id), known=3)
    found = sorted(await all_outcomes(bus, record), key=lambda o: (o.row, o.generation))
    assert [(o.row, o.generation) for o in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]


async def test_what_is_in_the_file_is_counted_to_its_end(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, path = trip(), tmp_path / "out.jsonl"
    record = await _half_collected(bus, flow, path)
    _lagging(monkeypatch, outcome_stream(record.id), reads=1)
    tally = run.Tally(flow)
    await run.collect(bus, record, path, follow=True, tally=tally)
    assert tally.rows == 4


async def test_every_failed_row_is_found(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    record = await _sent_again(bus)
    _lagging(monkeypatch, outcome_stream(record.id), reads=1)
    assert await control.retry_failed(bus, record.id) == 2


async def test_a_cancelled_run_counts_all_of_its_rows(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    record = await _sent_again(bus, to_the_end=False)
    _lagging(monkeypatch, outcome_stream(record.id))
    await control.cancel(bus, record.id)
    assert (await registry.require(bus, record.id)).total == 2


async def test_no_row_of_a_cancelled_run_is_left_without_an_outcome(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    record = await submitted(bus, trip(), rows(5))
    _lagging(monkeypatch, work_stream(record.id), reads=4)
    assert await control.cancel(bus, record.id) == 5
    assert {o.reason for o in await all_outcomes(bus, record)} == {"cancelled"}


async def _sent_again(bus: Bus, to_the_end: bool = True) -> RunRecord:
    """A run whose two rows have failed and were sent again, to fail once more."""

    async def fail(row: Row[Trip]) -> Outcome:
        raise ValueError

    flow = trip(fail)
    record = await submitted(bus, flow, rows(2), parse_run({"limits": {"failed_window": 0}}))
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
    assert await control.retry_failed(bus, record.id) == 2
    if to_the_end:
        async with working(bus.url, flow):
            await until(lambda: done(bus, record), "the rows to fail again")
    return record
