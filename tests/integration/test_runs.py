"""Runs against real brokers: submitted, continued, limited and complete."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from matrix_bus import LLM, Next, Outcome, RoleConfig, Row, RunConfig, Workflow, dataset, registry, run, success, to
from matrix_bus.broker import Broker
from matrix_bus.bus import STREAM_NOT_FOUND, Bus
from matrix_bus.config import BrokerConfig, LlmConfig
from matrix_bus.dataset import Rejected
from matrix_bus.errors import BusUnsuitable, ConfigError, NobodyListens, PublishRefused, RunError
from matrix_bus.orchestrator import (
    SCHEMA,
    outcome_stream,
    row_seed,
    work_stream,
)
from matrix_bus.registry import RunRecord
from matrix_bus.worker import Worker
from tests.helpers import (
    all_outcomes,
    connected,
    consumer,
    done,
    messages,
    numbered,
    submitted,
    unique,
    until,
    working,
)
from tests.trip import Trip, rows, trip


def asking() -> Workflow[Trip]:
    """Needs a model, and never gets to ask it."""
    flow = Workflow(unique("asking"), state=Trip, start="ask")
    flow.code_hash = "of-this-test"

    @flow.role
    async def ask(row: Row[Trip], llm: LLM) -> Outcome:
        return success()

    return flow


async def _is_empty(bus: Bus, record: RunRecord) -> bool:
    return await messages(bus, work_stream(record.id)) == 0


# --- runs ---------------------------------------------------------------------------------------------------


async def test_trials_have_seeds_of_their_own_that_every_run_repeats(bus: Bus) -> None:
    async def draw(row: Row[Trip]) -> Next:
        row.state.draw = row.rng.random()
        return to("b")

    flow = trip(draw)
    config = RunConfig(trials=3, seed=7)
    results = []
    async with working(bus.url, flow):
        for _ in range(2):
            record = await submitted(bus, flow, rows(4), config)
            outcomes = await all_outcomes(bus, record)
            results.append([(o.row, o.line, o.trial, o.seed, bytes(o.state)) for o in outcomes])
    assert [r[:3] for r in results[0]] == [(n, n // 3, n % 3) for n in range(12)]
    assert [r[3] for r in results[0]] == [row_seed(7, n // 3, n % 3) for n in range(12)]
    assert len({r[3] for r in results[0]}) == 12
    assert results[0] == results[1]


async def test_no_more_rows_than_max_in_flight_are_under_way(bus: Bus) -> None:
    under_way: set[int] = set()
    most = 0

    async def enter(row: Row[Trip]) -> Next:
        nonlocal most
        under_way.add(row.number)
        most = max(most, len(under_way))
        await asyncio.sleep(0.005)
        return to("b")

    async def leave(row: Row[Trip]) -> Outcome:
        under_way.discard(row.number)
        return success()

    flow = trip(enter, leave)
    record = await submitted(bus, flow, rows(60), RunConfig(max_in_flight=5))
    async with working(bus.url, flow), working(bus.url, flow):
        assert len(await all_outcomes(bus, record)) == 60
    assert most == 5


async def test_a_run_of_other_code_waits_for_a_worker_that_has_it(bus: Bus) -> None:
    mine = trip()
    other = trip(name=mine.name)
    other.code_hash = "something-else"
    record = await submitted(bus, mine, rows(3))
    async with working(bus.url, other) as worker:
        reason = await until(lambda: worker._refused.get(record.id), "the refusal")
        assert reason is not None
        assert "of-this-test" in reason
        assert "something-else" in reason
        assert record.id not in worker.serving
    assert (await registry.progress(bus, record)).waiting == 3
    async with working(bus.url, mine):
        assert {o.outcome for o in await all_outcomes(bus, record)} == {"success"}


async def test_a_submission_is_continued_and_doubles_nothing(bus: Bus) -> None:
    flow = trip()
    record = run.new_record(flow, RunConfig(), run=unique("trip"))
    lines = numbered(rows(10))
    record = await run.open_run(bus, record)

    await run.submit(bus, record, lines[:6])
    await registry.update(bus, record.id, total=None)  # as if it had been killed before the seal
    async with working(bus.url, flow):
        await until(partial(_outcomes, bus, record, 1), "some rows to be through")
        again = await run.open_run(bus, run.new_record(flow, RunConfig(), run=record.id))
        assert (await run.submit(bus, again, lines)).rows == 10
        assert [o.row for o in await all_outcomes(bus, record)] == list(range(10))
        await run.submit(bus, again, lines)  # and once more, after the end
        await until(partial(_is_empty, bus, record), "the queue to be empty")
    assert len(await all_outcomes(bus, record)) == 10


async def test_lines_that_were_added_to_the_file_are_added_to_the_run(bus: Bus, tmp_path: Path) -> None:
    flow = trip()
    data = tmp_path / "data.jsonl"
    data.write_text('{"x": 0}\n{"x": "bad"}\n{"x": 2}\n')
    config, name = RunConfig(trials=2), unique("trip")

    async def submit() -> tuple[RunRecord, run.Submitted]:
        source = dataset.identity(str(data))
        record = await run.open_run(bus, run.new_record(flow, config, run=name, source=source))
        return record, await run.submit(bus, record, dataset.read(str(data), check=flow.begin))

    async with working(bus.url, flow):
        record, told = await submit()
        assert (told.rows, told.rejected) == (4, 1)
        before = await all_outcomes(bus, record)
        data.write_text(data.read_text() + '{"x": 3}\nnot json\n{"x": 5}\n')
        record, told = await submit()
        assert (told.rows, told.rejected) == (8, 2)
        after = await all_outcomes(bus, record)
        assert [o for o in after if o.line < 3] == before, "rows that were there are not run again"
        assert [(o.row, o.line) for o in after[4:]] == [(6, 3), (7, 3), (10, 5), (11, 5)]
        assert await done(bus, await registry.require(bus, name))
        data.write_text('{"x": 1}' + data.read_text()[8:])
        with pytest.raises(RunError, match=r"another dataset: the first \d+ bytes of .* are not what they were"):
            await submit()


async def test_lines_are_added_also_if_the_submitter_dies_on_the_way(bus: Bus, tmp_path: Path) -> None:
    flow = trip()
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n".join(rows(4)) + b"\n")
    name = unique("trip")

    async def opened() -> RunRecord:
        source = dataset.identity(str(data))
        return await run.open_run(bus, run.new_record(flow, RunConfig(), run=name, source=source))

    def lines(at_most: int) -> Iterator[dataset.Line | dataset.Rejected]:
        for line in dataset.read(str(data)):
            if isinstance(line, dataset.Line) and line.number == at_most:
                raise ConnectionError("dies")
            yield line

    async with working(bus.url, flow):
        await run.submit(bus, await opened(), lines(99))
        await all_outcomes(bus, await registry.require(bus, name))
        data.write_bytes(b"\n".join(rows(9)) + b"\n")
        with pytest.raises(ConnectionError):
            await run.submit(bus, await opened(), lines(7))
        record = await opened()
        assert (record.total, record.total_before, record.lines) == (None, 4, 4)
        data.write_bytes(b"\n".join(rows(10)) + b"\n")  # and grows once more before it is continued
        assert (await run.submit(bus, await opened(), lines(99))).rows == 10
        assert [o.row for o in await all_outcomes(bus, record)] == list(range(10))


class Growing:
    """A run whose file grows."""

    def __init__(self, bus: Bus, folder: Path, shards: int = 1) -> None:
        self.bus = bus
        self.flow = trip()
        self.name = unique("trip")
        self.path = folder / "data.jsonl"
        self.shards = shards

    async def opened(self, lines: int) -> RunRecord:
        """Opened by a submitter that finds so many lines."""
        self.path.write_bytes(b"\n".join(rows(lines)) + b"\n")
        source = dataset.identity(str(self.path))
        record = run.new_record(self.flow, RunConfig(), run=self.name, source=source, shards=self.shards)
        return await run.open_run(self.bus, record)

    async def submitted(self, record: RunRecord, lines: int, shard: int = 1) -> int | None:
        """Submitted by who opened it as `record`; the total of the run after that."""
        part = numbered(rows(lines))[shard - 1 :: self.shards]
        await run.submit(self.bus, record, part, shard=shard)
        return await self.total()

    async def total(self) -> int | None:
        return (await registry.require(self.bus, self.name)).total


async def test_two_submitters_that_add_the_same_lines_are_as_one(bus: Bus, tmp_path: Path) -> None:
    growing = Growing(bus, tmp_path)
    await growing.submitted(await growing.opened(4), 4)
    first, second = await growing.opened(6), await growing.opened(6)
    assert await growing.submitted(first, 6) == 6
    assert await growing.submitted(second, 6) == 6
    await registry.seal(bus, second, 1, rows=2, lines=6)  # as if the confirmation had been lost
    assert await growing.total() == 6


async def test_lines_are_added_in_shards_of_which_one_is_sealed_twice(bus: Bus, tmp_path: Path) -> None:
    growing = Growing(bus, tmp_path, shards=2)
    before = await growing.opened(4)
    assert [await growing.submitted(before, 4, shard) for shard in (1, 2)] == [None, 4]
    added = await growing.opened(8)
    assert [await growing.submitted(added, 8, shard) for shard in (2, 2, 1, 1, 2)] == [None, None, 8, 8, 8]


@pytest.mark.parametrize("shards", [1, 2])
async def test_a_file_that_grows_while_it_is_submitted_is_sealed_by_who_has_all_of_it(
    bus: Bus, tmp_path: Path, caplog: pytest.LogCaptureFixture, shards: int
) -> None:
    growing = Growing(bus, tmp_path, shards)
    first = await growing.opened(4)
    for shard in range(1, shards + 1):
        await growing.submitted(first, 4, shard)
    shorter = await growing.opened(6)
    longer = await growing.opened(10)
    parts = range(1, shards + 1)
    assert [await growing.submitted(shorter, 6, shard) for shard in parts][-1] is None
    assert "its dataset has grown meanwhile" in caplog.text
    assert [await growing.submitted(longer, 10, shard) for shard in parts][-1] == 10
    assert [await growing.submitted(shorter, 6, shard) for shard in parts][-1] == 10


async def test_a_run_that_is_sealed_while_somebody_opens_it_for_more_lines(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = Growing(bus, tmp_path)
    await growing.submitted(await growing.opened(4), 4)
    first = await growing.opened(6)
    get = registry.get

    async def get_and_wait(bus: Bus, name: str) -> RunRecord | None:
        found = await get(bus, name)
        monkeypatch.setattr(registry, "get", get)
        await growing.submitted(first, 6)
        return found

    monkeypatch.setattr(registry, "get", get_and_wait)
    assert await growing.submitted(await growing.opened(10), 10) == 10


async def _outcomes(bus: Bus, record: RunRecord, count: int) -> bool:
    return await messages(bus, outcome_stream(record.id)) >= count


async def test_another_config_under_the_same_id_is_refused_with_the_difference(bus: Bus) -> None:
    flow = trip()
    record = await submitted(bus, flow, rows(1))
    with pytest.raises(RunError, match=r"config: .*trials was 1, now 2"):
        await run.open_run(bus, run.new_record(flow, RunConfig(trials=2), run=record.id))
    with pytest.raises(RunError, match="dataset"):
        await run.open_run(bus, run.new_record(flow, RunConfig(), run=record.id, source="other.jsonl"))


async def test_rejected_lines_leave_holes_and_the_total_counts_what_was_accepted(bus: Bus, tmp_path: Path) -> None:
    flow = trip()
    record = await run.open_run(bus, run.new_record(flow, RunConfig(trials=2), run=unique("trip")))
    data = tmp_path / "data.jsonl"
    data.write_text('{"x": 0}\n\n{"x": "bad"}\n{"x": 2}\nnot json\n')
    rejected: list[Rejected] = []
    lines = dataset.read(str(data), check=flow.begin)
    told = await run.submit(bus, record, lines, on_reject=rejected.append)
    assert (told.rows, told.rejected) == (4, 2)
    assert [r.line for r in rejected] == [3, 5]
    async with working(bus.url, flow):
        assert [(o.row, o.line) for o in await all_outcomes(bus, record)] == [(0, 0), (1, 0), (4, 2), (5, 2)]
        assert await done(bus, record)


async def test_a_run_without_rows_is_complete(bus: Bus) -> None:
    record = await submitted(bus, trip(), [])
    assert await all_outcomes(bus, record) == []
    assert await done(bus, record)


async def test_a_run_that_waits_for_rows_does_not_hold_up_another(bus: Bus) -> None:
    flow = trip()
    waiting = await run.open_run(bus, run.new_record(flow, RunConfig(), run=unique("trip")))
    async with working(bus.url, flow) as worker:
        await until(lambda: waiting.id in worker.serving, "the waiting run to be served")
        await until(partial(_asked, bus, waiting), "the worker to ask for its rows")
        record = await submitted(bus, flow, rows(20))
        assert len(await all_outcomes(bus, record, timeout_s=8)) == 20


async def _asked(bus: Bus, record: RunRecord) -> bool:
    info = await consumer(bus, work_stream(record.id), "a")
    return bool(info["num_waiting"])


async def test_leases_and_hops_are_all_acked_at_the_end(bus: Bus) -> None:
    flow = trip()
    record = await submitted(bus, flow, rows(50))
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
        await until(partial(_is_empty, bus, record), "the queue to be empty")
    for name in ("_", "a", "b"):
        info = await consumer(bus, work_stream(record.id), name)
        assert (info["num_pending"], info["num_ack_pending"], info["num_redelivered"]) == (0, 0, 0)


async def test_a_run_of_a_newer_schema_is_left_to_newer_workers(bus: Bus) -> None:
    flow = trip()
    record = await submitted(bus, flow, rows(2))
    await registry.update(bus, record.id, schema=SCHEMA + 1)
    async with working(bus.url, flow) as worker:
        await until(lambda: worker._refused.get(record.id), "the refusal")
        assert "upgrade" in worker._refused[record.id]
        assert await messages(bus, work_stream(record.id)) == 2, "nothing was taken"
        await registry.update(bus, record.id, schema=SCHEMA)
        assert len(await all_outcomes(bus, record)) == 2


async def test_a_complete_run_is_left_while_a_cancelled_one_is_being_left(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrix_bus.worker._FINISHED_CHECK_S", 0.2)
    leaving, go, end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def wait(row: Row[Trip]) -> Outcome:
        await end.wait()
        return success()

    flow = trip(wait)
    async with working(bus.url, flow) as worker:
        cancelled, complete = [await _served(bus, worker, flow) for _ in range(2)]
        session = worker._sessions[cancelled.id]
        close = session.close

        async def close_slowly(grace_s: float) -> None:
            leaving.set()
            await go.wait()
            await close(grace_s)

        monkeypatch.setattr(session, "close", close_slowly)
        await registry.update(bus, cancelled.id, state="cancelled")
        await leaving.wait()
        end.set()
        await until(lambda: complete.id not in worker.serving, "the complete run to be left")
        go.set()
        assert len(await all_outcomes(bus, await submitted(bus, flow, rows(1)))) == 1


async def test_a_run_that_is_cancelled_while_it_is_looked_whether_it_is_complete(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matrix_bus.worker._FINISHED_CHECK_S", 0.2)
    asked, go, progress = asyncio.Event(), asyncio.Event(), registry.progress

    async def progress_slowly(bus: Bus, record: RunRecord) -> registry.Progress:
        found = await progress(bus, record)
        if found.done and not found.queued:
            asked.set()
            await go.wait()
        return found

    monkeypatch.setattr(registry, "progress", progress_slowly)
    flow = trip()
    async with working(bus.url, flow) as worker:
        record = await _served(bus, worker, flow)
        await asked.wait()
        await registry.update(bus, record.id, state="cancelled")
        await until(lambda: record.id not in worker.serving, "the cancelled run to be left")
        go.set()
        assert len(await all_outcomes(bus, await submitted(bus, flow, rows(1)))) == 1


async def test_a_session_that_is_left_pulls_no_more_whatever_it_hears_of_its_run(bus: Bus) -> None:
    flow = trip()
    async with working(bus.url, flow) as worker:
        record = await _served(bus, worker, flow)
        session = worker._sessions[record.id]
        await session.close(0.0)
        await session.follow(record, {})
        assert not session._lanes.is_open


async def _served(bus: Bus, worker: Worker, flow: Workflow[Trip]) -> RunRecord:
    record = await submitted(bus, flow, rows(1))

    def knows_all() -> bool:
        session = worker._sessions.get(record.id)
        return session is not None and session.record.total == 1

    await until(knows_all, "the run to be served, with all its rows")
    return record


# --- runs that cannot be served ---------------------------------------------------------------------------------


async def test_a_run_whose_model_has_an_odd_address_is_refused_alone(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever submits is told; but a record may be of another version, or an address of numbers that are too large."""
    flow = asking()
    odd = [LlmConfig(model="m", urls=[url], transport="sdk") for url in ("http://gpu:port/v1", "http://10.0.0.300/v1")]
    async with working(bus.url, flow) as worker:
        records = [await submitted(bus, flow, [b"{}"], RunConfig(llm=llm)) for llm in odd]
        await until(lambda: {record.id for record in records} <= worker._refused.keys(), "both runs to be refused")
        assert all(llm.urls[0] in caplog.text for llm in odd)
        await submitted(bus, flow, [b"{}"], RunConfig(llm=LlmConfig(model="m", urls=["http://a/v1"])))
        await until(lambda: worker.serving, "a run beside them to be served")


async def test_a_run_whose_model_cannot_be_started_is_tried_again(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    full = True

    def embedded() -> str:
        if full:
            raise OSError(errno.ENOSPC, "no space left on device")
        return "http://a/v1"

    flow = asking()
    async with working(bus.url, flow, embedded_model=embedded) as worker:
        record = await submitted(bus, flow, [b"{}"])
        await until(lambda: record.id in worker._refused, "the refusal")
        assert "OSError: [Errno 28] no space left on device" in worker._refused[record.id]
        assert "Traceback" in caplog.text
        full = False
        await until(lambda: worker.serving == [record.id], "the run to be served")


async def test_runs_that_nobody_can_tell_of_are_not_taken_for_gone(broker: Broker) -> None:
    """As in a cluster, when the servers that have the bucket are down: its direct gets have no responder then."""
    async with connected(broker.url) as bus, contextlib.aclosing(registry.watch(bus)) as seen:
        assert await anext(seen) == await registry.runs(bus) == [], "no run was ever submitted"
        record = await submitted(bus, trip(), rows(2))
        await until(lambda: _sees(seen, record), "the run")
        bucket = (await bus.api("STREAM.INFO.KV_mb_runs"))["config"]
        await bus.api("STREAM.UPDATE.KV_mb_runs", {**bucket, "allow_direct": False})
        with pytest.raises(NobodyListens):
            await registry.runs(bus)
        next_look = asyncio.create_task(anext(seen))
        await registry.update(bus, record.id, why="somebody changed it")
        with pytest.raises(NobodyListens):
            await registry.runs(bus)
        await bus.api("STREAM.UPDATE.KV_mb_runs", bucket)
        assert [found.id for found in await next_look] == [record.id]


async def _sees(seen: AsyncIterator[list[RunRecord]], record: RunRecord) -> bool:
    return record.id in [found.id for found in await anext(seen)]


# --- settings of a run ------------------------------------------------------------------------------------------


async def test_slots_of_a_role_limit_its_hops_in_flight_for_this_run_alone(bus: Bus) -> None:
    now, most, gate = 0, {"limited": 0, "free": 0}, asyncio.Event()

    async def wait(row: Row[Trip]) -> Next:
        nonlocal now
        kind = row.state.text
        now += 1
        most[kind] = max(most[kind], now)
        await gate.wait()
        now -= 1
        return to("b")

    flow = trip(wait)
    limited = RunConfig(roles={"a": RoleConfig(slots=3)})
    async with working(bus.url, flow):
        first = await submitted(bus, flow, [b'{"text": "limited"}'] * 20, limited)
        await until(lambda: now == 3, "three hops to be in flight")
        await until(partial(_pulled, bus, first), "the rest to wait in the queue")
        free = await submitted(bus, flow, [b'{"text": "free"}'] * 20)
        await until(lambda: now == 23, "all hops of the other run to be in flight")
        assert most["limited"] == 3
        gate.set()
        for record in (first, free):
            assert len(await all_outcomes(bus, record)) == 20
    assert most["limited"] == 3


async def _pulled(bus: Bus, record: RunRecord) -> bool:
    role = await consumer(bus, work_stream(record.id), "a")
    return int(role["num_ack_pending"]) == 3 and int(role["num_pending"]) == 17


async def test_shared_streams_may_be_an_operators_own(tmp_path: Path) -> None:
    with Broker(tmp_path / "broker") as broker:
        async with connected(broker.url) as bus:
            theirs = {"name": "KV_mb_runs", "subjects": ["$KV.mb_runs.>"], "max_bytes": 1 << 30, "discard": "new"}
            await bus.api("STREAM.CREATE.KV_mb_runs", theirs)
            with pytest.raises(BusUnsuitable, match=r"KV_mb_runs at .* needs max_msgs_per_subject=1"):
                await registry.prepare(bus)
            good = {"max_msgs_per_subject": 1, "allow_rollup_hdrs": True, "deny_delete": True, "allow_direct": True}
            await bus.api("STREAM.DELETE.KV_mb_runs")
            await bus.api("STREAM.CREATE.KV_mb_runs", {**theirs, **good})
            flow = trip()
            async with working(bus.url, flow):
                record = await submitted(bus, flow, rows(3))
                assert len(await all_outcomes(bus, record)) == 3


async def test_settings_that_do_not_fit_into_a_message_make_no_run(bus: Bus) -> None:
    config = RunConfig(workflow={"prompt": "x" * bus.max_payload})
    record = msgspec.structs.replace(run.new_record(trip(), RunConfig(), run=unique("trip")), config=config)
    with pytest.raises(ConfigError, match=rf"the settings of run '{record.id}' are \d+ bytes.*{bus.max_body}"):
        async with asyncio.timeout(10):
            await run.open_run(bus, record)
    with pytest.raises(PublishRefused) as refused:
        await messages(bus, work_stream(record.id))
    assert refused.value.code == STREAM_NOT_FOUND


async def test_more_copies_than_servers_is_said(bus: Bus) -> None:
    with pytest.raises(BusUnsuitable, match=r"broker\.replicas=3 needs a cluster of at least 3 JetStream servers"):
        await submitted(bus, trip(), rows(1), RunConfig(broker=BrokerConfig(replicas=3)))


async def test_what_does_not_fit_into_the_grace_period_is_at_work_elsewhere_at_once(bus: Bus) -> None:
    """With an AckWait of a minute: only what was handed back can come within seconds, a second time too."""
    gate = asyncio.Event()
    attempts: list[int] = []

    async def hold(row: Row[Trip]) -> Next:
        attempts.append(row.attempt)
        await gate.wait()
        return to("b")

    flow = trip(hold)
    record = await submitted(bus, flow, rows(30), RunConfig(ack_wait_s=60))
    async with working(bus.url, flow):
        await until(lambda: len(attempts) == 30, "all rows to be at work")
    async with working(bus.url, flow):
        await until(lambda: len(attempts) == 60, "all of them to be at work again")
    async with working(bus.url, flow):
        await until(lambda: len(attempts) == 90, "and again")
        gate.set()
        outcomes = await all_outcomes(bus, record)
    assert set(attempts) == {1}
    assert {(o.outcome, o.attempts, len(o.errors)) for o in outcomes} == {("success", 2, 0)}, (
        "what was handed back counts as no attempt"
    )
