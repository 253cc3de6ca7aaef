"""The client in a host program: real brokers, real workers, rows of every kind, and everything that can be cut off."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest

import matrix_bus as mb
from matrix_bus import catalog, registry, run
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.errors import BusUnavailable, ConfigError, DatasetError, RunError, WorkflowError
from matrix_bus.orchestrator import outcome_stream, work_stream
from tests.helpers import connected, messages, unique, until, working
from tests.trip import Trip, trip

BATCH, WINDOW = 64, 1024


class Params(msgspec.Struct, frozen=True):
    max_turns: int = 20


class Told(msgspec.Struct):
    x: int


class Odd(mb.State):
    x: int

    def __post_init__(self) -> None:
        if self.x % 2 == 0:
            raise ValueError("x must be odd")


@dataclass
class Noted:
    x: int


def told(count: int) -> Iterator[dict[str, int]]:
    yield from ({"x": x} for x in range(count))


async def announced(bus: Bus, flow: mb.Workflow[Any]) -> str:
    assert await catalog.announce(bus, catalog.describe(flow))
    return flow.name


async def ids(stream: AsyncIterator[mb.OutcomeRecord]) -> list[str]:
    async with asyncio.timeout(30):
        return [outcome.id async for outcome in stream]


# --- submitting -------------------------------------------------------------------------------------------------


async def test_rows_of_every_kind_go_to_a_workflow_that_is_known_by_name(bus: Bus) -> None:
    flow = trip()
    rows = [
        {"x": 0},
        MappingProxyType({"x": 1}),
        Told(2),
        Noted(3),
        '{"x": 4}',
        b' {"x": 5}\n',
        "\n",
        {"x": 6, "id": "six"},
    ]
    async with working(bus.url, flow), mb.connect(bus.url) as client:
        await until(lambda: _knows(client, flow.name), "the announcement")
        made = await client.submit(flow.name, rows)
        outcomes = [outcome async for outcome in made.outcomes()]
        assert sorted(msgspec.json.decode(o.state)["x"] for o in outcomes) == list(range(7))
        assert {o.id for o in outcomes} == {"0", "1", "2", "3", "4", "5", "six"}
        status = await made.wait()
        assert (status.state, status.done, status.total, status.outcomes) == ("active", True, 7, 7)
        assert made.rejected == mb.Rejections()
        assert made.id in {r.id for r in await client.runs()}
        assert (await client.run(made.id)).workflow == flow.name


async def _knows(client: mb.Client, name: str) -> bool:
    return name in {info.name for info in await client.workflows()}


async def test_what_is_no_row_is_rejected_with_its_place_and_the_rest_goes_on(bus: Bus) -> None:
    name = await announced(bus, trip())
    seen: list[mb.Rejected] = []
    rows = [{"x": 0}, {"x": "no"}, 7, "[1]", None, {"x": {1j}}, Told, {"id": 1.5}, "", "{", {"x": 9}]
    async with mb.connect(bus.url) as client:
        made = await client.submit(name, rows, on_reject=seen.append)
        assert (await made.status()).total == 2
    assert [r.line for r in seen] == [2, 3, 4, 5, 6, 7, 8, 10]
    assert made.rejected.count == 8
    assert made.rejected.first == seen
    reasons = dict(zip([r.line for r in seen], [r.reason for r in seen], strict=True))
    assert "$.x" in reasons[2] and "integer" in reasons[2]
    assert reasons[3].endswith("not int")
    assert "object" in reasons[4]
    assert "NoneType" in reasons[5]
    assert "complex" in reasons[6]
    assert reasons[7].endswith("not Told")
    assert reasons[8].startswith("the id must be")


async def test_only_the_first_hundred_rejections_are_kept(bus: Bus) -> None:
    name = await announced(bus, trip())
    async with mb.connect(bus.url) as client:
        made = await client.submit(name, ["no"] * 250)
        assert (await made.wait()).total == 0
    assert made.rejected.count == 250
    assert [r.line for r in made.rejected.first] == list(range(1, 101))


async def test_a_workflow_object_checks_rows_with_its_own_code_and_needs_no_announcement(bus: Bus) -> None:
    flow = mb.Workflow(unique("odd"), state=Odd, start="end")
    flow.code_hash = "of-this-test"

    @flow.role(name="end")
    async def end(row: mb.Row[Odd]) -> mb.Outcome:
        return mb.success()

    async with mb.connect(bus.url) as client, working(bus.url, flow):
        made = await client.submit(flow, told(4))
        assert await ids(made.outcomes()) in (["1", "3"], ["3", "1"])
        assert "x must be odd" in made.rejected.first[0].reason


async def test_a_workflow_object_of_an_imported_module_gets_the_hash_that_its_workers_have(bus: Bus) -> None:
    from matrix_agents.coral import flow

    kept, flow.code_hash = flow.code_hash, ""
    try:
        async with mb.connect(bus.url) as client:
            made = await client.submit(flow, [{"question": "?", "options": ["a", "b"]}])
        made_for = (await registry.require(bus, made.id)).code_hash
        assert made_for == mb.load_workflow("coral").code_hash != ""
    finally:
        flow.code_hash = kept or flow.code_hash


async def test_a_workflow_without_a_file_is_refused(bus: Bus) -> None:
    flow = trip()
    flow.code_hash = ""
    for role in flow.roles.values():
        role.handler.__module__ = "nowhere"
    async with mb.connect(bus.url) as client:
        with pytest.raises(WorkflowError, match="put it into one that the workers load too"):
            await client.submit(flow, told(1))


async def test_a_workflow_that_nobody_announced_is_an_error_with_what_there_is(bus: Bus) -> None:
    name = await announced(bus, trip(name=unique("draft")))
    async with mb.connect(bus.url) as client:
        with pytest.raises(RunError) as caught:
            await client.submit(name[:-1], told(1))
        assert f"did you mean {name!r}" in str(caught.value)
        assert f"matrix-bus worker --workflow {name[:-1]}.py" in str(caught.value)
        with pytest.raises(RunError, match="no worker has announced a workflow 'a b'"):
            await client.submit("a b", told(1))


async def test_nothing_is_announced_on_a_fresh_broker(broker: Broker) -> None:
    async with mb.connect(broker.url) as client:
        assert await client.workflows() == []
        assert await client.runs() == []
        with pytest.raises(RunError, match="announced are: none"):
            await client.submit("draft", told(1))
        with pytest.raises(RunError, match="no run 'nightly'"):
            await client.run("nightly")


async def test_parameters_and_settings_are_checked_before_anything_is_published(bus: Bus) -> None:
    flow = mb.Workflow(unique("trip"), state=Trip, start="a", config=Params)
    flow.code_hash = "of-this-test"

    @flow.role(name="a")
    async def a(row: mb.Row[Trip], params: Params) -> mb.Outcome:
        return mb.success(str(params.max_turns))

    async def never() -> AsyncIterator[Any]:
        raise AssertionError("a row was asked for")
        yield

    name = await announced(bus, flow)
    async with mb.connect(bus.url) as client:
        mistakes: list[tuple[Any, Any, str]] = [
            ({"max_turn": 3}, None, "did you mean 'max_turns'"),
            ({"max_turns": "3"}, None, r"integer.*\$\.max_turns"),
            ({"max_turns": float("nan")}, None, "cannot be stored"),
            (None, {"trails": 3}, "did you mean 'trials'"),
            (None, {"trials": 0}, "trials"),
            (None, {"roles": {"b": {}}}, "no role .b.; there are a"),
            ({"max_turns": 3}, {"workflow": {"max_turns": 3}}, "give them once"),
            ([1], None, "a mapping or a struct"),
        ]
        for config, settings, message in mistakes:
            for known in (name, flow):
                if message.startswith("integer") and known is flow:
                    continue  # said in the decoder's own words
                with pytest.raises((ConfigError, RunError), match=message):
                    await client.submit(known, never(), config=config, settings=settings, run=unique("r"))
        assert not [r for r in await client.runs() if r.workflow == name]
        async with working(bus.url, flow):
            made = await client.submit(name, told(2), config=Params(max_turns=3), settings={"trials": 2})
            assert [o.reason async for o in made.outcomes()] == ["3"] * 4


@pytest.mark.parametrize("rows", [{"x": 1}, b'{"x": 1}', 7])
async def test_what_are_no_rows_at_all_is_said(bus: Bus, rows: Any) -> None:
    name = await announced(bus, trip())
    async with mb.connect(bus.url) as client:
        with pytest.raises(DatasetError, match="rows must be a path or an iterable of rows"):
            await client.submit(name, rows)


async def test_a_file_is_submitted_as_the_command_line_does_it(bus: Bus, tmp_path: Path) -> None:
    name = await announced(bus, trip())
    data = tmp_path / "data.jsonl"
    data.write_text('{"x": 0}\n\nno\n{"x": 2}\n')
    async with mb.connect(bus.url) as client:
        made = await client.submit(name, data)
        assert (await made.status()).total == 2
        assert [r.line for r in made.rejected.first] == [3]
        assert (await registry.require(bus, made.id)).dataset.startswith(f"{data}#")
        empty = tmp_path / "empty.jsonl"
        empty.touch()
        for path in (empty, tmp_path / "missing.jsonl"):
            with pytest.raises(DatasetError, match=str(path)):
                await client.submit(name, str(path), run=unique("empty"))
        assert not [r for r in await client.runs() if r.id.startswith("empty")]
        with pytest.raises(RunError, match="another dataset"):
            await client.submit(name, told(1), run=made.id)


async def test_a_run_that_is_sealed_is_left_as_it_is(bus: Bus) -> None:
    name = await announced(bus, trip())
    async with mb.connect(bus.url) as client:
        first = await client.submit(name, told(3), run=unique("r"))
        rows = told(100)
        again = await client.submit(name, rows, run=first.id)
        assert (await again.status()).total == 3
        assert next(rows) == {"x": 0}, "unread"


# --- back-pressure ----------------------------------------------------------------------------------------------


async def test_an_async_iterable_is_asked_for_no_more_than_the_window_holds(broker: Broker) -> None:
    pulled = 0

    async def rows() -> AsyncIterator[dict[str, int]]:
        nonlocal pulled
        for x in range(5000):
            pulled += 1
            if x == 100:
                broker.kill()
            yield {"x": x}

    async with mb.connect(broker.url) as client, connected(broker.url) as bus:
        name = await announced(bus, trip())
        submitting = asyncio.create_task(client.submit(name, rows()))
        await until(lambda: pulled > 100, "the kill")
        await _stands_still(lambda: pulled)
        assert pulled <= 100 + WINDOW + 1
        await asyncio.to_thread(broker.start)
        made = await submitting
        assert (await made.status()).total == pulled == 5000


async def test_so_is_a_plain_iterable_but_for_one_batch(broker: Broker) -> None:
    pulled = 0

    def rows() -> Iterator[dict[str, int]]:
        nonlocal pulled
        for x in range(5000):
            pulled += 1
            if x == 100:
                broker.kill()
            yield {"x": x}

    async with mb.connect(broker.url) as client, connected(broker.url) as bus:
        name = await announced(bus, trip())
        submitting = asyncio.create_task(client.submit(name, rows()))
        await until(lambda: pulled > 100, "the kill")
        await _stands_still(lambda: pulled)
        assert pulled <= 100 + WINDOW + 2 * BATCH
        await asyncio.to_thread(broker.start)
        made = await submitting
        assert (await made.status()).total == pulled == 5000


async def _stands_still(count: Any) -> None:
    for _ in range(5):  # as long as it changes, it may go on
        seen = count()
        await asyncio.sleep(0.1)
        if count() == seen:
            return
    raise AssertionError(f"rows are still being pulled: {count()}")


async def test_a_generator_that_blocks_does_not_hold_up_the_loop_and_keeps_its_thread(bus: Bus) -> None:
    name = await announced(bus, trip())
    gate = threading.Event()
    threads: set[int] = set()

    def rows() -> Iterator[dict[str, int]]:
        try:
            for x in range(200):
                threads.add(threading.get_ident())
                if x == 150:
                    assert gate.wait(20), "the loop stood still"
                yield {"x": x}
        finally:
            threads.add(threading.get_ident())

    async with mb.connect(bus.url) as client:
        submitting = asyncio.create_task(client.submit(name, rows(), run=unique("r")))
        await asyncio.sleep(0.05)
        gate.set()  # only a loop that turns gets here
        assert (await (await submitting).status()).total == 200
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


async def test_rows_that_come_slowly_are_published_as_they_come(bus: Bus) -> None:
    flow = trip()
    name = await announced(bus, flow)
    gate = threading.Event()

    def rows() -> Iterator[dict[str, int]]:
        yield {"x": 0}
        assert gate.wait(20)
        yield {"x": 1}

    async def slow() -> AsyncIterator[dict[str, int]]:
        yield {"x": 0}
        await asyncio.to_thread(gate.wait, 20)
        yield {"x": 1}

    async with mb.connect(bus.url) as client:
        submitting = asyncio.create_task(client.submit(name, slow(), run=(mine := unique("r"))))
        await until(lambda: _rows_there(bus, mine, 1), "the first row")
        gate.set()
        assert (await (await submitting).status()).total == 2
        made = await client.submit(name, rows())
        assert (await made.status()).total == 2


async def _rows_there(bus: Bus, name: str, count: int) -> bool:
    try:
        return await messages(bus, work_stream(name)) >= count
    except mb.BusError:
        return False


class Mine(Exception):
    pass


@pytest.mark.parametrize("how", ["plain", "async"])
async def test_what_the_callers_iterator_raises_comes_out_as_itself_and_the_run_goes_on_later(
    bus: Bus, how: str
) -> None:
    flow = trip()
    name = await announced(bus, flow)
    closed: list[str] = []

    def plain() -> Iterator[Any]:
        try:
            yield from told(500)
            try:
                raise KeyError("deep")
            except KeyError as error:
                raise Mine("the database went away") from error
        finally:
            closed.append("plain")

    async def later() -> AsyncIterator[Any]:
        for row in plain():
            yield row

    async with mb.connect(bus.url) as client:
        with pytest.raises(Mine, match="the database went away") as caught:
            await client.submit(name, plain() if how == "plain" else later(), run=(mine := unique("r")))
        assert isinstance(caught.value.__cause__, KeyError)
        assert caught.value.__context__ is caught.value.__cause__
        assert closed == ["plain"]
        assert (await (await client.run(mine)).status()).total is None
        made = await client.submit(name, told(600), run=mine)
        async with working(bus.url, flow):
            assert sorted(map(int, await ids(made.outcomes()))) == list(range(600))


# --- outcomes ---------------------------------------------------------------------------------------------------


async def test_outcomes_are_followed_over_a_broker_that_dies_none_lost_none_twice(broker: Broker) -> None:
    flow = trip()
    async with mb.connect(broker.url) as client, working(broker.url, flow):
        await until(lambda: _knows(client, flow.name), "the announcement")
        made = await client.submit(flow.name, told(2000))
        found: list[str] = []
        async with asyncio.timeout(50):
            async for outcome in made.outcomes():
                found.append(outcome.id)
                if len(found) in (200, 1200):
                    broker.kill()
                    await asyncio.to_thread(broker.start)
        assert sorted(map(int, found)) == list(range(2000))
        assert await ids(made.outcomes()) == found, "the same again, in the same order"


async def test_leaving_outcomes_early_leaves_nothing_behind(bus: Bus) -> None:
    flow = trip()
    async with mb.connect(bus.url) as client, working(bus.url, flow):
        made = await client.submit(flow, told(20))
        await made.wait()
        before = len(client._bus.nc._subs)
        async for _ in made.outcomes():
            break
        gc.collect()
        await until(lambda: len(client._bus.nc._subs) == before, "the subscription to end")
        assert client._bus._reconnected == []
        assert client._bus._batches == {}


async def test_a_cancelled_follower_is_gone_and_another_goes_on(bus: Bus) -> None:
    flow = trip()
    async with mb.connect(bus.url) as client:
        made = await client.submit(flow, told(20))
        followers = [asyncio.create_task(ids(made.outcomes())) for _ in range(2)]
        await until(lambda: len(client._bus._reconnected) == 2, "both to follow")
        followers[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await followers[0]
        async with working(bus.url, flow):
            assert len(await followers[1]) == 20


async def test_a_cancelled_run_ends_its_outcomes(bus: Bus) -> None:
    async with mb.connect(bus.url) as client:
        made = await client.submit(trip(), told(20))
        following = asyncio.create_task(ids(made.outcomes()))
        assert await made.cancel() == 20
        assert len(await following) == 20
        assert (await made.status()).state == "cancelled"


# --- closing ----------------------------------------------------------------------------------------------------


async def test_a_client_that_is_closed_ends_what_goes_on_with_an_error(bus: Bus) -> None:
    name = await announced(bus, trip())
    gate = asyncio.Event()

    async def rows() -> AsyncIterator[dict[str, int]]:
        for x in range(10_000):
            if x == 500:
                gate.set()
                await asyncio.sleep(0.05)
            yield {"x": x}

    async with mb.connect(bus.url) as client:
        other = await client.submit(name, told(1))
        following = asyncio.create_task(ids(other.outcomes()))
        await until(lambda: client._bus._reconnected, "the follower")
        submitting = asyncio.create_task(client.submit(name, rows(), run=(mine := unique("r"))))
        await gate.wait()
    async with asyncio.timeout(10):
        for task in (submitting, following):
            with pytest.raises(BusUnavailable, match="was closed"):
                await task
        for call in (other.status(), ids(other.outcomes()), client.runs(), client.submit(name, told(1))):
            with pytest.raises(BusUnavailable, match="was closed"):
                await call
    assert (await registry.require(bus, mine)).total is None


async def test_a_cancelled_submission_stops_at_once_and_can_be_continued(bus: Bus) -> None:
    flow = trip()
    name = await announced(bus, flow)
    gate = threading.Event()
    closed = threading.Event()

    def rows() -> Iterator[dict[str, int]]:
        try:
            for x in range(1000):
                if x == 300:
                    gate.wait(20)
                yield {"x": x}
        finally:
            closed.set()

    async with mb.connect(bus.url) as client:
        submitting = asyncio.create_task(client.submit(name, rows(), run=(mine := unique("r"))))
        await until(lambda: _rows_there(bus, mine, 200), "some rows")
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        assert not closed.is_set(), "it still blocks"
        gate.set()
        assert await asyncio.to_thread(closed.wait, 10), "the generator is closed in its thread"
        made = await client.submit(name, told(1000), run=mine)
        async with working(bus.url, flow):
            assert len(set(await ids(made.outcomes()))) == 1000


async def test_two_clients_that_submit_one_run_at_once_make_one_run(bus: Bus) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(mb.connect(bus.url)) for _ in range(4)]
        for _ in range(5):
            flow, mine = trip(), unique("r")
            name = await announced(bus, flow)
            made = await asyncio.gather(*(client.submit(name, told(300), run=mine) for client in clients))
            assert {one.id for one in made} == {mine}
            assert (await made[0].status()).total == 300
            assert await messages(bus, work_stream(mine)) == 300
        async with working(bus.url, flow):
            assert sorted(map(int, await ids(made[1].outcomes()))) == list(range(300))
            assert await messages(bus, outcome_stream(mine)) == 300


async def test_of_two_that_make_one_run_with_other_settings_one_is_refused(bus: Bus) -> None:
    name = await announced(bus, trip())
    async with mb.connect(bus.url) as one, mb.connect(bus.url) as two:
        mine = unique("r")
        found = await asyncio.gather(
            one.submit(name, told(3), run=mine),
            two.submit(name, told(3), run=mine, settings={"seed": 1}),
            return_exceptions=True,
        )
        [refused] = [each for each in found if isinstance(each, BaseException)]
        assert isinstance(refused, RunError)
        assert "seed was" in str(refused)


# --- connecting -------------------------------------------------------------------------------------------------


async def test_a_client_needs_an_address(shared_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MATRIX_BUS_SERVER", raising=False)
    with pytest.raises(ConfigError, match="MATRIX_BUS_SERVER"):
        async with mb.connect():
            pass
    monkeypatch.setenv("MATRIX_BUS_SERVER", shared_broker.url)
    async with mb.connect(start_broker=True) as client:  # named: none is started
        await client.runs()
    with pytest.raises(BusUnavailable, match="no broker answers"):
        async with mb.connect("nats://127.0.0.1:1"):
            pass


async def test_a_broker_is_started_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matrix_bus.broker import local_broker

    monkeypatch.delenv("MATRIX_BUS_SERVER", raising=False)
    monkeypatch.setenv("MATRIX_BUS_HOME", str(tmp_path))
    with pytest.raises(ConfigError):
        async with mb.connect():
            pass
    assert local_broker().status() is None
    try:
        async with mb.connect(start_broker=True) as client:
            assert await client.runs() == []
        assert local_broker().status() is not None, "it is shared: others may use it"
    finally:
        local_broker().stop()


# --- announcements ----------------------------------------------------------------------------------------------


async def test_the_newest_announcement_wins_and_an_equal_one_is_not_written_again(bus: Bus) -> None:
    flow = trip()
    other = trip(name=flow.name)
    other.code_hash = "newer"
    await announced(bus, flow)
    wrote = await bus.last_sequence(catalog.STREAM)
    await announced(bus, flow)
    assert await bus.last_sequence(catalog.STREAM) == wrote
    await announced(bus, other)
    await catalog.announce(bus, catalog.describe(flow), replace=False)
    assert (await catalog.find(bus, flow.name)).code_hash == "newer"
    async with mb.connect(bus.url) as client:
        made = await client.submit(flow.name, told(1))
    assert (await registry.require(bus, made.id)).code_hash == "newer"


async def test_a_worker_that_may_not_announce_works_all_the_same(broker: Broker) -> None:
    flow = trip()
    async with connected(broker.url) as bus:
        # A bucket that takes nothing stands in for one that the worker has no right to.
        settings = {"name": catalog.STREAM, "subjects": [f"$KV.{catalog.BUCKET}.>"], "max_msg_size": 8}
        settings |= {"max_msgs_per_subject": 1, "discard": "new", "allow_rollup_hdrs": True, "deny_delete": True}
        await bus.api(f"STREAM.CREATE.{catalog.STREAM}", {**settings, "allow_direct": True, "storage": "file"})
        assert not await catalog.announce(bus, catalog.describe(flow))
        async with working(broker.url, flow):
            record = run.new_record(flow, mb.RunConfig(), run=unique("trip"))
            await registry.create(bus, record)


async def test_a_worker_announces_again_on_a_broker_that_lost_its_data(broker: Broker) -> None:
    import shutil

    flow = trip()
    async with working(broker.url, flow), mb.connect(broker.url) as client:
        await until(lambda: _knows(client, flow.name), "the announcement")
        broker.kill()
        shutil.rmtree(broker.directory)
        broker.directory.mkdir()
        await asyncio.to_thread(broker.start)
        await until(lambda: _knows(client, flow.name), "the announcement after the loss")


async def test_a_state_without_a_schema_is_announced_without_one(bus: Bus) -> None:
    class Strange(mb.State):
        x: int = 0
        page: mb.Large[str] = msgspec.field(default_factory=lambda: mb.Large(""))
        kind: type = int

    flow = mb.Workflow(unique("odd"), state=Strange, start="a")
    info = catalog.describe(flow)
    assert info.input is None
    info.row_check()(b'{"x": "anything"}')


async def test_an_announcement_of_a_newer_version_is_refused_with_advice(bus: Bus) -> None:
    name = await announced(bus, trip())
    newer = msgspec.structs.replace(await catalog.find(bus, name), schema=2)
    await bus.publish(f"$KV.{catalog.BUCKET}.{name}", msgspec.json.encode(newer))
    with pytest.raises(RunError, match="upgrade"):
        await catalog.find(bus, name)
    await bus.publish(f"$KV.{catalog.BUCKET}.{name}", b"{}")
    with pytest.raises(RunError, match="cannot be read"):
        await catalog.find(bus, name)
    assert name not in {info.name for info in await catalog.workflows(bus)}
    await announced(bus, trip(name=name))
    assert await consumerless(bus)


async def consumerless(bus: Bus) -> bool:
    """Reading announcements leaves no consumer behind."""
    info = await bus.api(f"STREAM.INFO.{catalog.STREAM}")
    return bool(info["state"]["consumer_count"] == 0)
