"""Failed rows sent again, and what nobody could read."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from matrix_bus import Outcome, Row, RunConfig, Workflow, control, dataset, registry, run, success
from matrix_bus.bus import Bus
from matrix_bus.config import parse_run
from matrix_bus.errors import RunError
from matrix_bus.orchestrator import hop_subject, work_stream
from matrix_bus.registry import RunRecord
from matrix_bus.worker import Worker
from tests.helpers import all_outcomes, done, messages, numbered, submitted, unique, until, working
from tests.trip import Trip, rows, trip

NO_PAUSE = parse_run({"limits": {"failed_window": 0}})


class Luck:
    """A handler that fails for these rows, as long as it is told to."""

    def __init__(self, *unlucky: int) -> None:
        self.unlucky = set(unlucky)
        self.calls: list[int] = []

    async def __call__(self, row: Row[Trip]) -> Outcome:
        self.calls.append(row.number)
        row.state.draw = row.rng.random()
        if row.number in self.unlucky:
            raise ValueError("no luck") if row.number % 2 else KeyError("nor this")
        return success("done")


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.zst"])
async def test_failed_rows_are_sent_again_and_their_new_outcomes_take_the_place_of_the_old(
    bus: Bus, tmp_path: Path, name: str
) -> None:
    luck = Luck(1, 2, 5, 6)
    flow = trip(luck)
    record = await submitted(bus, flow, rows(10), NO_PAUSE)
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
        luck.calls.clear()
        luck.unlucky = {5}
        assert await control.retry_failed(bus, record.id) == 4
        await until(lambda: done(bus, record), "the rows to end again")
        assert sorted(luck.calls) == [1, 2, 5, 6], "finished rows are left alone"
        outcomes = await all_outcomes(bus, record)
        luck.unlucky = set()
        assert await control.retry_failed(bus, record.id) == 1
        await until(lambda: done(bus, record), "the last row to end")
        assert await control.retry_failed(bus, record.id) == 0
    again = {o.row: o for o in outcomes if o.generation == 1}
    assert {row: o.outcome for row, o in again.items()} == {1: "success", 2: "success", 5: "failed", 6: "success"}
    for before in (o for o in outcomes if o.generation == 0 and o.row in again):
        assert (before.seed, before.id, before.input) == (
            again[before.row].seed,
            str(before.row),
            again[before.row].input,
        )
    path = tmp_path / name
    written = await run.collect(bus, record, path, follow=True)
    lines = [json.loads(line) for line in written_lines(path)]
    assert sorted(line["row"] for line in lines) == list(range(10))
    assert {line["outcome"] for line in lines} == {"success"}
    assert {line["row"]: line["generation"] for line in lines if line["generation"]} == {1: 1, 2: 1, 5: 2, 6: 1}
    old = [json.loads(line) for line in (tmp_path / f"{name}.superseded.jsonl").read_text().splitlines()]
    assert sorted((line["row"], line["generation"]) for line in old) == [(1, 0), (2, 0), (5, 0), (5, 1), (6, 0)]
    assert {line["outcome"] for line in old} == {"failed"}
    assert written.rows == 10


def written_lines(path: Path) -> list[bytes]:
    from matrix_bus.dataset import open_lines

    with open_lines(str(path)) as file:
        return file.read().splitlines()


async def test_only_those_that_failed_for_a_reason(bus: Bus) -> None:
    luck = Luck(1, 2, 3, 4)
    flow = trip(luck)
    record = await submitted(bus, flow, rows(6), NO_PAUSE)
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
        luck.unlucky = set()
        assert await control.retry_failed(bus, record.id, reason="error: KeyError") == 2
        await until(lambda: done(bus, record), "the rows to end again")
        assert await control.retry_failed(bus, record.id, reason="limit") == 0
    reasons = {(o.row, o.generation): o.reason for o in await all_outcomes(bus, record)}
    assert reasons[2, 1] == reasons[4, 1] == "done"
    assert (1, 1) not in reasons


async def test_rows_that_travel_again_already_are_not_sent_twice(bus: Bus) -> None:
    luck = Luck(0, 1)
    flow = trip(luck)
    record = await submitted(bus, flow, rows(2), NO_PAUSE)
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
    assert await control.retry_failed(bus, record.id) == 2
    assert await control.retry_failed(bus, record.id) == 0
    assert await asyncio.gather(*(control.retry_failed(bus, record.id) for _ in range(3))) == [0, 0, 0]
    luck.unlucky = set()
    async with working(bus.url, flow):
        await until(lambda: done(bus, record), "the rows to end")
    assert luck.calls.count(0) == luck.calls.count(1) == 2


async def test_a_retry_that_died_half_way_is_repeated_and_nobody_thinks_it_complete(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = trip(Luck(*range(10)))
    record = await submitted(bus, flow, rows(10), NO_PAUSE)
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
    publish, sent = Bus.publish, []

    async def dies(self: Bus, subject: str, *more: object) -> object:
        if "._." in subject:
            sent.append(subject)
            if len(sent) > 3:
                raise ConnectionError("killed")
        return await publish(self, subject, *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(BaseException):  # noqa: B017 - a group, or the error
        patched.setattr(Bus, "publish", dies)
        await control.retry_failed(bus, record.id)
    assert not await done(bus, record)
    flow = trip(name=flow.name)
    async with working(bus.url, flow):
        await control.retry_failed(bus, record.id)
        await until(lambda: done(bus, record), "all rows to end again")
        outcomes = await all_outcomes(bus, record)
    assert {o.row for o in outcomes if o.generation == 1} == set(range(10))
    assert len(outcomes) == 20


async def test_a_worker_that_has_left_the_complete_run_comes_back(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matrix_bus.worker._FINISHED_CHECK_S", 0.2)
    luck = Luck(0)
    flow = trip(luck)
    record = await submitted(bus, flow, rows(1), NO_PAUSE)
    async with working(bus.url, flow) as worker:
        await all_outcomes(bus, record)
        await until(lambda: _left(worker), "the worker to leave the run")
        luck.unlucky = set()
        assert await control.retry_failed(bus, record.id) == 1
        await until(lambda: done(bus, record), "the row to end again")
        assert luck.calls == [0, 0]


def _left(worker: Worker) -> bool:
    return not worker.serving


async def test_a_run_that_was_cancelled_after_a_retry_has_an_end(bus: Bus, tmp_path: Path) -> None:
    flow = trip(Luck(0, 1))
    record = await submitted(bus, flow, rows(4), NO_PAUSE)
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
    assert await control.retry_failed(bus, record.id) == 2
    assert await control.cancel(bus, record.id) == 2
    written = await asyncio.wait_for(run.collect(bus, record, tmp_path / "out.jsonl", follow=True), 10)
    assert written.rows == 4
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 4
    with pytest.raises(RunError, match="is cancelled: submit its failed rows as a run of their own"):
        await control.retry_failed(bus, record.id)


async def test_nothing_is_sent_again_while_rows_are_still_submitted(bus: Bus) -> None:
    record = await run.open_run(bus, run.new_record(trip(), RunConfig()))
    with pytest.raises(RunError, match="still being submitted"):
        await control.retry_failed(bus, record.id)


async def _opened(bus: Bus, flow: Workflow[Trip], name: str, path: Path, lines: int) -> RunRecord:
    """The run, opened by a submitter that finds so many lines in its file."""
    path.write_bytes(b"\n".join(rows(lines)) + b"\n")
    return await run.open_run(bus, run.new_record(flow, NO_PAUSE, run=name, source=dataset.identity(str(path))))


async def test_nothing_is_sent_again_while_rows_are_added(bus: Bus, tmp_path: Path) -> None:
    luck = Luck(0)
    flow, name, path = trip(luck), unique("trip"), tmp_path / "data.jsonl"
    record = await _opened(bus, flow, name, path, 2)
    await run.submit(bus, record, numbered(rows(2)))
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
        assert await control.retry_failed(bus, name) == 1, "so that it counts as retried once"
        added = await _opened(bus, flow, name, path, 5)
        with pytest.raises(RunError, match="still being submitted"):
            await control.retry_failed(bus, name)
        await run.submit(bus, added, numbered(rows(5)))
        assert (await registry.require(bus, name)).total == 5
        await until(lambda: done(bus, record), "all rows to end")
        luck.unlucky = set()
        assert await control.retry_failed(bus, name) == 1


async def test_sending_again_that_an_older_version_did_not_finish_is_taken_up(bus: Bus) -> None:
    flow = trip(Luck(0))
    record = await submitted(bus, flow, rows(2))
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
        await registry.update(bus, record.id, total=None, total_before=2, retried=1, retrying=None)
        assert await control.retry_failed(bus, record.id) == 1
        there = await registry.require(bus, record.id)
        assert (there.total, there.total_before, there.retrying) == (2, None, None)


async def test_a_run_stays_open_for_rows_that_are_added_while_others_are_sent_again(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, name, path = trip(Luck(0)), unique("trip"), tmp_path / "data.jsonl"
    record = await _opened(bus, flow, name, path, 2)
    await run.submit(bus, record, numbered(rows(2)))
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
    publish, gate, sending = Bus.publish, asyncio.Event(), asyncio.Event()

    async def waits(self: Bus, subject: str, *more: object) -> object:
        if subject.startswith(f"q.{name}._."):
            sending.set()
            await gate.wait()
        return await publish(self, subject, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Bus, "publish", waits)
    retrying = asyncio.create_task(control.retry_failed(bus, name))
    await sending.wait()
    added = await _opened(bus, flow, name, path, 5)
    gate.set()
    assert await retrying == 1
    assert (await registry.require(bus, name)).total is None
    await run.submit(bus, added, numbered(rows(5)))
    assert (await registry.require(bus, name)).total == 5


# --- dead letters -------------------------------------------------------------------------------------------


async def test_what_nobody_could_read_is_listed_requeued_and_dropped(bus: Bus) -> None:
    flow = trip()
    name = unique("trip")
    record = await submitted(bus, flow, rows(3), RunConfig(ack_wait_s=1), name=name)
    for n in range(2):
        await bus.publish(hop_subject(name, "a", n, 1), b"\xff not a hop %d" % n)
    async with working(bus.url, flow):
        outcomes = await all_outcomes(bus, record)
        assert [o.outcome for o in outcomes] == ["failed", "failed", "success"]
        letters = [letter async for letter in control.dead_letters(bus, name)]
        assert [(letter.row, letter.subject) for letter in letters] == [
            (n, hop_subject(name, "a", n, 1)) for n in range(2)
        ]
        assert [letter.data for letter in letters] == [b"\xff not a hop 0", b"\xff not a hop 1"]
        assert all(letter.reason for letter in letters)
        assert await control.find(bus, letters[0].number) == letters[0]
        with pytest.raises(RunError, match=r"row 0 of run .* is not failed any more, or travels already"):
            await control.requeue(bus, letters[0].number)
        await until(lambda: _is_empty(bus, name), "the rows themselves to be acked: their hops had forgotten them")
        await control.requeue(bus, letters[1].number)
        await until(lambda: done(bus, record), "the row to end again")
        await control.drop(bus, letters[0].number)
        assert [letter async for letter in control.dead_letters(bus, name)] == []
        with pytest.raises(RunError, match=f"no dead letter {letters[0].number}"):
            await control.drop(bus, letters[0].number)
    await until(lambda: _is_empty(bus, name), "the queue to be empty")
    newest = {o.row: o.outcome for o in sorted(await all_outcomes(bus, record), key=lambda o: o.generation)}
    assert newest == {0: "failed", 1: "success", 2: "success"}


async def _is_empty(bus: Bus, name: str) -> bool:
    return await messages(bus, work_stream(name)) == 0
