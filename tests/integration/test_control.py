"""Runs held up, changed, cancelled and purged, also half-way and twice."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from matrix_bus import Next, Outcome, Row, RunConfig, control, registry, run, success, to
from matrix_bus.bus import Bus
from matrix_bus.config import parse_run
from matrix_bus.dataset import Line
from matrix_bus.errors import ConfigError, PublishRefused, RunError
from matrix_bus.orchestrator import outcome_stream, work_stream
from matrix_bus.payload import Payloads, stream_of
from tests.helpers import all_outcomes, consumer, messages, submitted, until, working
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
    assert written.rows == 20


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


async def test_a_submitter_learns_that_its_run_was_purged_before_a_large_row(bus: Bus) -> None:
    record = await run.open_run(bus, run.new_record(trip(), RunConfig()))

    async def lines() -> AsyncIterator[Line]:
        yield Line(0, b'{"x": 1}', "0")
        await control.purge(bus, record.id)
        yield Line(1, b'{"x": 1, "text": "%b"}' % (b"y" * 100_000), "1")

    with pytest.raises(RunError, match="was deleted while rows were being submitted"):
        await asyncio.wait_for(run.submit(bus, record, lines()), 20)


@pytest.mark.parametrize(
    ("end", "said"),
    [(control.cancel, "is cancelled: submit its failed rows as a run of their own"), (control.purge, "is deleted")],
)
async def test_a_retry_learns_that_its_run_was_ended(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, end: Callable[[Bus, str], Awaitable[object]], said: str
) -> None:
    async def fail(row: Row[Trip]) -> Next:
        raise ValueError

    flow = trip(fail)
    record = await submitted(bus, flow, rows(3), parse_run({"limits": {"failed_window": 0}}))
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
    began, gate = _held_back(monkeypatch, f"q.{record.id}._.")
    retrying = asyncio.create_task(control.retry_failed(bus, record.id))
    await began.wait()
    await end(bus, record.id)
    gate.set()
    with pytest.raises(RunError, match=said):
        await asyncio.wait_for(retrying, 20)


async def test_who_cancels_a_run_learns_that_it_was_purged(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    record = await submitted(bus, trip(), rows(3))
    began, gate = _held_back(monkeypatch, f"out.{record.id}.")
    cancelling = asyncio.create_task(control.cancel(bus, record.id))
    await began.wait()
    await control.purge(bus, record.id)
    gate.set()
    with pytest.raises(RunError, match="was deleted meanwhile"):
        await asyncio.wait_for(cancelling, 20)


async def test_who_cancels_a_run_may_find_its_queue_deleted_by_another(bus: Bus) -> None:
    record = await submitted(bus, trip(), rows(3))
    await bus.api(f"STREAM.DELETE.{work_stream(record.id)}")
    assert await control.ending._end_all(bus, record, travelling=True) == 0


async def test_every_row_of_a_cancelled_run_is_found_behind_those_that_have_ended(bus: Bus) -> None:
    """The newest message of the queue is gone then: it was the hop of a row that has an outcome."""
    others = asyncio.Event()

    async def wait(row: Row[Trip]) -> Outcome:
        if row.number < 4:
            await others.wait()
        return success()

    flow = trip(wait)
    record = await submitted(bus, flow, rows(5))
    async with working(bus.url, flow):
        await until(partial(messages, bus, outcome_stream(record.id)), "the last row to end")
    assert await control.cancel(bus, record.id) == 4
    assert sorted(outcome.outcome for outcome in await all_outcomes(bus, record)) == ["filtered"] * 4 + ["success"]


def _held_back(monkeypatch: pytest.MonkeyPatch, subject: str) -> tuple[asyncio.Event, asyncio.Event]:
    """(set at the first publish to what begins so, lets them all go on)"""
    publish, began, gate = Bus.publish, asyncio.Event(), asyncio.Event()

    async def held(self: Bus, to: str, *more: object) -> object:
        if to.startswith(subject):
            began.set()
            await gate.wait()
        return await publish(self, to, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Bus, "publish", held)
    return began, gate


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


# --- held up and changed ------------------------------------------------------------------------------------


async def test_a_paused_run_starts_nothing_more_and_goes_on_where_it_was(bus: Bus) -> None:
    started: list[int] = []
    gate = asyncio.Event()

    async def wait(row: Row[Trip]) -> Next:
        started.append(row.number)
        await gate.wait()
        return to("b")

    flow = trip(wait)
    record = await submitted(bus, flow, rows(30), RunConfig(max_in_flight=5))
    async with working(bus.url, flow):
        await until(lambda: len(started) == 5, "as many rows as may be under way")
        await control.pause(bus, record.id)
        await until(lambda: _idle(bus, record, "b"), "the worker to notice")
        gate.set()  # what is at work finishes, and its results are stored
        await until(lambda: _queued(bus, record, "b", 5), "five hops that nobody takes")
        await asyncio.sleep(0.3)
        assert len(started) == 5
        assert await messages(bus, outcome_stream(record.id)) == 0
        assert (await registry.require(bus, record.id)).why == "by hand"
        async with working(bus.url, flow):  # nor does a worker that comes later take any
            await asyncio.sleep(0.5)
        assert len(started) == 5
        await control.pause(bus, record.id)
        await control.resume(bus, record.id)
        assert len(await all_outcomes(bus, record)) == 30
        await control.resume(bus, record.id)
    assert sorted(started) == list(range(30)), "and no handler was called twice"
    with pytest.raises(RunError, match="is complete: nothing to pause"):
        await control.pause(bus, record.id)


async def _idle(bus: Bus, record: registry.RunRecord, role: str) -> bool:
    return int((await consumer(bus, work_stream(record.id), role))["num_waiting"]) == 0


async def _queued(bus: Bus, record: registry.RunRecord, role: str, count: int) -> bool:
    return int((await consumer(bus, work_stream(record.id), role))["num_pending"]) == count


async def test_rows_can_be_submitted_to_a_paused_run(bus: Bus) -> None:
    flow = trip()
    record = await run.open_run(bus, run.new_record(flow, RunConfig()))
    await control.pause(bus, record.id)
    async with working(bus.url, flow):
        record = await run.open_run(bus, run.new_record(flow, RunConfig(), run=record.id))
        await run.submit(bus, record, [Line(n, body, str(n)) for n, body in enumerate(rows(10))])
        await asyncio.sleep(0.3)
        assert await messages(bus, outcome_stream(record.id)) == 0
        await control.resume(bus, record.id)
        assert len(await all_outcomes(bus, record)) == 10


async def test_limits_of_a_live_run_are_changed(bus: Bus) -> None:
    working_on = most = 0

    async def note(row: Row[Trip]) -> Next:
        nonlocal working_on, most
        working_on += 1
        most = max(most, working_on)
        await asyncio.sleep(0.02)
        working_on -= 1
        return to("b")

    async def most_of(seconds: float) -> int:
        nonlocal most
        most = 0
        await asyncio.sleep(seconds)
        return most

    flow = trip(note)
    record = await submitted(bus, flow, rows(20_000), RunConfig(max_in_flight=6))
    async with working(bus.url, flow):
        await until(lambda: most > 0, "the first rows")
        assert await most_of(0.5) <= 6
        await control.change(bus, record.id, max_in_flight=40)
        await until(lambda: most > 20, "more rows under way")
        await control.change(bus, record.id, slots={"a": 3})
        await asyncio.sleep(1.0)
        assert await most_of(0.5) <= 3
        await control.change(bus, record.id, slots={"a": 100}, max_in_flight=8)
        await asyncio.sleep(1.5)
        assert 3 < await most_of(0.5) <= 8
        changed = (await registry.require(bus, record.id)).changed
        assert (changed.max_in_flight, changed.slots, changed.weight) == (8, {"a": 100}, None)
        await control.cancel(bus, record.id)
    with pytest.raises(RunError, match="cancelled: there is nothing left to change"):
        await control.change(bus, record.id, weight=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_in_flight": 0}, "max_in_flight=0 must be 1 to"),
        ({"slots": {"aa": 3}}, "no role 'aa'; did you mean 'a'"),
        ({"slots": {"a": 0}}, "pause the run to stop it"),
        ({"weight": 0}, "weight=0 must be above 0"),
    ],
)
async def test_a_change_that_makes_no_sense_is_refused(bus: Bus, change: dict[str, Any], said: str) -> None:
    record = await submitted(bus, trip(), rows(1))
    with pytest.raises(ConfigError, match=said):
        await control.change(bus, record.id, **change)
    assert (await registry.require(bus, record.id)).changed == registry.Changed()


async def test_two_runs_share_slots_by_weight(bus: Bus) -> None:
    at_work: Counter[str] = Counter()
    seen: list[tuple[int, int]] = []

    async def note(row: Row[Trip]) -> Next:
        name = row.state.text
        at_work[name] += 1
        seen.append((at_work["heavy"], at_work["light"]))
        await asyncio.sleep(0.05)
        at_work[name] -= 1
        return to("b")

    flow = trip(note)

    def named(name: str) -> list[bytes]:
        return [b'{"text": "%b"}' % name.encode()] * 3000

    heavy = await submitted(bus, flow, named("heavy"), RunConfig(weight=3))
    light = await submitted(bus, flow, named("light"))
    async with working(bus.url, flow, slots=40):
        await until(lambda: len(seen) > 3000, "many calls")
        await control.cancel(bus, heavy.id)
        await control.cancel(bus, light.id)
    both = [(ours, theirs) for ours, theirs in seen[1000:] if ours and theirs]
    share = sum(ours for ours, _ in both) / sum(map(sum, both))
    assert len(both) > 1500
    assert 0.6 < share < 0.9, "three quarters"
