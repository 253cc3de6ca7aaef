"""The parts of a worker, each by itself: slots, deliveries, heartbeats, backoff, watchdog, threads, processes."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import os
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matrix_bus.agent import Next, Outcome, Workflow, failed, filtered, load_workflow, success
from matrix_bus.bus import Bus, Lane, Message, delivery_facts
from matrix_bus.config import ModelConfig, Sampling, parse_run
from matrix_bus.errors import (
    BusUnavailable,
    EndpointGone,
    HandlerError,
    LimitReached,
    ModelError,
    RateLimited,
    Retry,
    WorkerCrashed,
)
from matrix_bus.llm import LLM
from matrix_bus.orchestrator import Orchestrator, RowMessage, Usage, admit
from matrix_bus.worker import models as models_module
from matrix_bus.worker import watchdog as watchdog_module
from matrix_bus.worker.delivery import Delivery
from matrix_bus.worker.failure import backoff_s
from matrix_bus.worker.handlers import Caller, Executors
from matrix_bus.worker.heartbeat import Wheel
from matrix_bus.worker.limits import check
from matrix_bus.worker.models import Models
from matrix_bus.worker.pulling import Pool, Pump, Share
from matrix_bus.worker.watchdog import Watchdog
from tests.helpers import until

# --- slots --------------------------------------------------------------------------------------------------

NOW = 1000.0
SILENT = NOW - 60
IDLE_ASK = 8


class FakeLane:
    """What a pool sees of a lane: how much was asked for and has not come."""

    def __init__(self, outstanding: int = 0, open_: bool = True, weight: float = 1.0) -> None:
        self.outstanding = outstanding
        self.weight = weight
        self.asked = asyncio.Event()
        self.most_bytes = 0
        self.fitting = 1 << 30
        self._open = open_

    def room(self, wanted: int) -> int:
        return max(0, wanted - self.outstanding) if self._open else 0

    async def ask(self, count: int) -> None:
        self.outstanding += count
        self.asked.set()


def pool(capacity: int, *lanes: tuple[FakeLane, float], busy: int = 0) -> Pool:
    """The first lane's run is what keeps it busy."""
    made = Pool(capacity, busy)
    made.shares = [Share(made, "", cast(Lane, lane), lane.weight, heard_at=heard_at) for lane, heard_at in lanes]
    if made.shares:
        made.shares[0].busy = busy
    return made


def asks(of: Pool) -> dict[FakeLane, int]:
    return {cast(FakeLane, lane): count for lane, count in of.asks(NOW)}


def test_one_lane_gets_all_free_slots() -> None:
    lane = FakeLane()
    assert asks(pool(100, (lane, NOW), busy=30)) == {lane: 70}


def test_active_lanes_share_alike() -> None:
    lanes = [FakeLane() for _ in range(3)]
    assert asks(pool(100, *((lane, NOW) for lane in lanes), busy=10)) == {lanes[0]: 24, lanes[1]: 33, lanes[2]: 33}


def test_silent_lanes_ask_for_few_so_that_one_that_wakes_up_finds_slots() -> None:
    lanes = [FakeLane() for _ in range(4)]
    assert asks(pool(100, *((lane, SILENT) for lane in lanes))) == dict.fromkeys(lanes, IDLE_ASK)


def test_active_lanes_share_by_weight() -> None:
    light, heavy = FakeLane(), FakeLane(weight=3.0)
    assert asks(pool(100, (light, NOW), (heavy, NOW))) == {light: 25, heavy: 75}


def test_a_silent_lane_keeps_few_slots_from_those_that_have_work() -> None:
    active, silent = FakeLane(), FakeLane()
    found = asks(pool(100, (active, NOW), (silent, SILENT)))
    assert found[silent] == IDLE_ASK
    assert found[active] >= 100 - IDLE_ASK


def test_what_is_under_way_counts() -> None:
    lane = FakeLane(outstanding=40)
    assert asks(pool(100, (lane, NOW))) == {lane: 60}
    assert asks(pool(100, (FakeLane(outstanding=51), NOW))) == {}, "small refills wait to become larger ones"
    assert asks(pool(100, (FakeLane(outstanding=100), NOW))) == {}


def test_a_lane_that_cannot_be_asked_is_not() -> None:
    well, gone = FakeLane(), FakeLane(open_=False)
    assert asks(pool(10, (well, NOW), (gone, SILENT))).keys() == {well}


@settings(deadline=None)
@given(
    capacity=st.integers(1, 300),
    busy=st.integers(0, 400),
    heard=st.lists(st.sampled_from([NOW, NOW - 1.9, SILENT]), max_size=6),
    outstanding=st.lists(st.integers(0, 300), min_size=6, max_size=6),
)
def test_no_lane_is_asked_for_more_than_is_free(
    capacity: int, busy: int, heard: list[float], outstanding: list[int]
) -> None:
    lanes = [(FakeLane(under_way), at) for at, under_way in zip(heard, outstanding, strict=False)]
    free = capacity - busy
    for lane, count in asks(pool(capacity, *lanes, busy=busy)).items():
        assert count > 0
        assert count + lane.outstanding <= free


@pytest.mark.parametrize(
    ("capacity", "heard"),
    [
        pytest.param(2, [NOW] * 3, id="more active lanes than slots"),
        pytest.param(2, [SILENT] * 3, id="more silent lanes than slots"),
        pytest.param(100, [NOW] + [SILENT] * 3, id="silent lanes beside an active one"),
    ],
)
def test_all_lanes_together_are_not_asked_for_more_than_is_free(capacity: int, heard: list[float]) -> None:
    found = asks(pool(capacity, *((FakeLane(), at) for at in heard)))
    assert sum(found.values()) <= capacity


def test_a_full_pool_asks_for_nothing() -> None:
    assert asks(pool(4, (FakeLane(), NOW), busy=4)) == {}
    assert asks(pool(4, (FakeLane(), NOW), busy=9)) == {}


def test_large_messages_are_asked_for_in_small_numbers() -> None:
    lane = FakeLane()
    lane.fitting = 6
    made = pool(100, (lane, NOW))
    assert asks(made) == {lane: 6}
    lane.outstanding = 4
    assert asks(made) == {}, "small refills wait to become larger ones"
    lane.outstanding = 3
    assert asks(made) == {lane: 3}


async def test_the_lanes_of_a_process_divide_what_may_be_under_way() -> None:
    pump, lanes = Pump(), [FakeLane() for _ in range(4)]
    slots = Pool(1000)
    shares = [Share(slots, "", cast(Lane, lane)) for lane in lanes]
    running = asyncio.create_task(pump.run())
    try:
        for share in shares:
            pump.add(share)
        await asyncio.wait_for(lanes[0].asked.wait(), 5)
        assert {lane.most_bytes for lane in lanes} == {8 << 20}
        for share in shares[1:]:
            pump.remove(share)
        pump.touch(slots)
        await asyncio.sleep(0.01)
        assert lanes[0].most_bytes == 32 << 20
    finally:
        running.cancel()


async def test_the_pump_asks_when_slots_get_free() -> None:
    pump, lane = Pump(), FakeLane()
    slots = Pool(4)
    running = asyncio.create_task(pump.run())
    try:
        pump.add(Share(slots, "", cast(Lane, lane)))
        await asyncio.wait_for(lane.asked.wait(), 5)
        assert lane.outstanding == 4
        lane.outstanding, slots.busy = 0, 4
        lane.asked.clear()
        slots.busy = 1
        pump.touch(slots)
        await asyncio.wait_for(lane.asked.wait(), 5)
        assert lane.outstanding == 3
    finally:
        running.cancel()


# --- deliveries ---------------------------------------------------------------------------------------------

SHORT = "$JS.ACK.W_r1.solver.{deliveries}.{seq}.9.1700000000000000000.0"
LONG = "$JS.ACK.hub.AbCd.W_r1.solver.{deliveries}.{seq}.9.1700000000000000000.0"
LONGEST = LONG + ".t0k3n"
each_form = pytest.mark.parametrize("form", [SHORT, LONG, LONGEST], ids=["short", "domain", "domain and token"])


def message(form: str = SHORT, deliveries: int = 1, seq: int = 50, raw_headers: bytes = b"") -> Message:
    reply = form.format(deliveries=deliveries, seq=seq)
    return Message("q.r1.solver.7.3", reply, b"body", raw_headers)


def delivery(seq: int = 50) -> Delivery:
    return Delivery(message(seq=seq), old_until=0, now=0.0)


@each_form
def test_a_delivery_knows_its_place(form: str) -> None:
    found = Delivery(message(form, 1, 50, b"NATS/1.0\r\nMb-Lease: x\r\nMb-Generation: 2\r\n\r\n"), old_until=0, now=0.0)
    assert (found.role, found.n, found.hop, found.seq, found.data) == ("solver", 7, 3, 50, b"body")
    assert (found.lease, found.generation, found.noted) == ("x", 2, 0)
    assert found.ack_subject == form.format(deliveries=1, seq=50)
    assert not found.running
    assert found.beat_at == 0.0
    bare = Delivery(message(form), old_until=0, now=0.0)
    assert (bare.lease, bare.generation, bare.noted) == ("", 0, 0)


@each_form
@pytest.mark.parametrize(
    ("deliveries", "seq", "old_until", "old"),
    [(1, 50, 0, False), (1, 50, 49, False), (1, 50, 50, True), (2, 50, 0, True), (12, 50, 99, True)],
)
def test_a_delivery_is_old_if_somebody_may_have_had_it(
    form: str, deliveries: int, seq: int, old_until: int, old: bool
) -> None:
    assert delivery_facts(form.format(deliveries=deliveries, seq=seq)) == (deliveries, seq)
    assert Delivery(message(form, deliveries, seq), old_until, 0.0).old is old


# --- heartbeats ---------------------------------------------------------------------------------------------


class FakeBus:
    """Takes heartbeats, and says when a number of them has come."""

    def __init__(self) -> None:
        self.connected = True
        self.beats: list[tuple[str, float]] = []
        self.failing = 0
        self.enough = asyncio.Event()
        self.wanted = 0

    def working(self, ack_subjects: Iterable[str]) -> None:
        if self.failing:
            self.failing -= 1
            raise BusUnavailable("away")
        self.beats.extend((ack_subject, time.monotonic()) for ack_subject in ack_subjects)
        if self.wanted and len(self.beats) >= self.wanted:
            self.enough.set()

    async def count(self, wanted: int) -> None:
        """Returns when that many more have come."""
        self.enough.clear()
        self.wanted = len(self.beats) + wanted
        await asyncio.wait_for(self.enough.wait(), 10)


@pytest.fixture
def fake_bus() -> FakeBus:
    return FakeBus()


ACK_WAIT_S = 0.6


@pytest.fixture
async def wheel(fake_bus: FakeBus) -> AsyncIterator[Wheel]:
    made = Wheel(cast(Bus, fake_bus), ACK_WAIT_S)
    turning = asyncio.create_task(made.turn())
    yield made
    turning.cancel()


async def test_a_wheel_that_stood_still_says_so_once_and_knows_it_before(fake_bus: FakeBus) -> None:
    told: list[bool] = []
    made = Wheel(cast(Bus, fake_bus), 0.4, lambda: told.append(made.overdue_at < time.monotonic()))
    turning = asyncio.create_task(made.turn())
    await asyncio.sleep(0.1)
    assert made.overdue_at > time.monotonic()
    time.sleep(0.25)
    assert made.overdue_at < time.monotonic(), "messages that are read before the wheel turns again count as old"
    await asyncio.sleep(0.1)
    turning.cancel()
    assert told == [True]
    assert made.overdue_at > time.monotonic()


async def test_adding_and_removing(fake_bus: FakeBus) -> None:
    wheel = Wheel(cast(Bus, fake_bus), ACK_WAIT_S)
    one, two = delivery(1), delivery(2)
    assert len(wheel) == 0
    wheel.add(one)
    wheel.add(two)
    assert len(wheel) == 2
    wheel.remove(one)
    wheel.remove(one)
    assert len(wheel) == 1
    wheel.remove(two)
    assert len(wheel) == 0
    wheel.remove(delivery(3))


async def test_every_delivery_is_kept_alive(wheel: Wheel, fake_bus: FakeBus) -> None:
    held = [delivery(seq) for seq in range(40)]
    added_at = time.monotonic()
    for number, one in enumerate(held):
        wheel.add(one)
        if number % 5 == 0:
            await fake_bus.count(1)  # so that they come to lie on different spokes
    assert len({one.spoke % 16 for one in held}) > 1
    await fake_bus.count(3 * len(held))
    beats = {one.ack_subject: [at for subject, at in fake_bus.beats if subject == one.ack_subject] for one in held}
    assert all(len(at) >= 2 for at in beats.values())
    gaps = [b - a for at in beats.values() for a, b in itertools.pairwise(at)]
    assert sorted(gaps)[len(gaps) // 2] < ACK_WAIT_S, "or others would get them"
    assert all(one.beat_at > added_at for one in held)


async def test_the_first_heartbeat_comes_within_one_period(wheel: Wheel, fake_bus: FakeBus) -> None:
    for _ in range(4):  # wherever the wheel stands
        added_at = time.monotonic()
        one = delivery()
        wheel.add(one)
        await fake_bus.count(1)
        assert fake_bus.beats[-1][1] - added_at < ACK_WAIT_S
        wheel.remove(one)


async def test_what_was_removed_is_left_alone(wheel: Wheel, fake_bus: FakeBus) -> None:
    gone, kept = delivery(1), delivery(2)
    wheel.add(gone)
    wheel.add(kept)
    await fake_bus.count(2)
    wheel.remove(gone)
    fake_bus.beats.clear()
    await fake_bus.count(3)
    assert {subject for subject, _ in fake_bus.beats} == {kept.ack_subject}


async def test_a_new_ack_subject_gets_the_heartbeats(wheel: Wheel, fake_bus: FakeBus) -> None:
    one = delivery(1)
    wheel.add(one)
    await fake_bus.count(1)
    one.ack_subject = "new"
    fake_bus.beats.clear()
    await fake_bus.count(2)
    assert {subject for subject, _ in fake_bus.beats} == {"new"}


async def test_the_wheel_turns_on_after_an_error(wheel: Wheel, fake_bus: FakeBus) -> None:
    fake_bus.failing = 3
    wheel.add(delivery())
    await fake_bus.count(2)
    assert fake_bus.failing == 0


async def test_nothing_is_sent_while_the_broker_is_away(wheel: Wheel, fake_bus: FakeBus) -> None:
    fake_bus.connected = False
    one = delivery()
    before = one.beat_at
    wheel.add(one)
    await asyncio.sleep(ACK_WAIT_S)  # there is nothing to wait for but that nothing comes
    assert (fake_bus.beats, one.beat_at) == ([], before)
    fake_bus.connected = True
    await fake_bus.count(1)
    assert one.beat_at > before


async def test_the_heartbeats_of_a_turn_are_one_write() -> None:
    """So nothing can be handed back between two of them: the heartbeat after a NAK would take the message back."""

    class Counting(FakeBus):
        writes = 0

        def working(self, ack_subjects: Iterable[str]) -> None:
            self.writes += 1
            super().working(ack_subjects)

    bus = Counting()
    turned = Wheel(cast(Bus, bus), ACK_WAIT_S)
    for seq in range(1, 31):
        turned.add(delivery(seq))
    turning = asyncio.create_task(turned.turn())
    await bus.count(30)
    turning.cancel()
    assert (bus.writes, len(bus.beats)) == (1, 30)


# --- backoff ------------------------------------------------------------------------------------------------

GONE = EndpointGone("gone")


@pytest.mark.parametrize(
    ("attempt", "most"), [(1, 1.0), (2, 2.0), (3, 4.0), (6, 32.0), (7, 60.0), (50, 60.0), (1000, 60.0)]
)
def test_backoff_doubles_up_to_a_minute(attempt: int, most: float) -> None:
    waits = [backoff_s(attempt, GONE) for _ in range(400)]
    assert 0.1 <= min(waits) < most / 2 < max(waits) <= most, "with full jitter"


def test_backoff_of_a_very_late_attempt() -> None:
    assert backoff_s(1025, GONE) <= 60


@settings(deadline=None)
@given(st.floats(0, 3600), st.integers(1, 100), st.sampled_from([RateLimited, Retry]))
def test_what_the_server_or_the_handler_asks_for_is_kept(
    asked: float, attempt: int, kind: type[RateLimited] | type[Retry]
) -> None:
    assert asked <= backoff_s(attempt, kind("busy", asked)) <= asked * 1.25


def test_a_server_cannot_put_a_row_off_for_ever() -> None:
    assert backoff_s(1, RateLimited("busy", float("inf"))) <= 4500


def test_a_limit_without_a_time_backs_off() -> None:
    assert 0.1 <= backoff_s(1, RateLimited("busy")) <= 1.0
    assert backoff_s(1, RateLimited("busy", 0.0)) == 0.0


# --- watchdog -----------------------------------------------------------------------------------------------


def compute(seconds: float) -> None:
    time.sleep(seconds)


async def blocking() -> None:
    compute(0.6)


async def test_the_role_that_blocks_the_loop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "_TICK_S", 0.05)
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(watchdog_module.log, "warning", lambda _, **values: said.append(values), raising=False)
    watchdog = Watchdog({blocking.__code__: "solver"}, blocked_after_s=0.2)
    running = asyncio.create_task(watchdog.run())
    await asyncio.sleep(0)
    await blocking()
    running.cancel()
    assert watchdog.blocked == {"solver": 1}
    assert said[0]["role"] == "solver"
    assert said[0]["seconds"] >= 0.2
    assert said[0]["where"].startswith(f"{__file__}:"), "where it is, not where the handler begins"
    assert "plain def" in said[0]["advice"]


async def test_what_blocks_and_is_no_handler_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "_TICK_S", 0.05)
    watchdog = Watchdog({}, blocked_after_s=0.2)
    running = asyncio.create_task(watchdog.run())
    await asyncio.sleep(0)
    compute(0.4)
    running.cancel()
    assert watchdog.blocked == {"unknown": 1}


# --- the embedded model -------------------------------------------------------------------------------------


async def test_the_embedded_model_is_looked_after_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "_LOOK_AGAIN_S", 0.01)
    trouble = [OSError("no space left"), ModelError("no answer")]
    looks = itertools.count()

    def embedded() -> str:
        look = next(looks)
        if 1 <= look <= len(trouble):
            raise trouble[look - 1]
        return "http://a" if look == 0 else "http://b"

    models = Models(embedded)
    pool = await models.pool(ModelConfig())
    assert [endpoint.url for endpoint in pool.endpoints] == ["http://a"]
    await until(lambda: [endpoint.url for endpoint in pool.endpoints] == ["http://b"], "the model to come back")
    await models.close()


# --- threads and processes ----------------------------------------------------------------------------------

SOURCE = """
import os
import signal
import time

import msgspec

import matrix_bus as mb


class Work(mb.State):
    todo: str
    pid: int = 0
    seen: list = []


class Settings(msgspec.Struct):
    factor: int = 2


flow = mb.Workflow("parts", state=Work, start="burn", config=Settings)


@flow.role(process=True)
def burn(row: mb.Row[Work], settings: Settings):
    if row.state.todo == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if row.state.todo.startswith("hang"):
        with open(row.state.todo.removeprefix("hang "), "x") as note:
            note.write(str(os.getpid()))
        while True:
            time.sleep(0.01)
    if row.state.todo == "raise":
        raise ValueError("no")
    row.state.pid = os.getpid()
    row.state.seen = [row.turn, row.trial, settings.factor]
    return mb.to("burn")
"""


@pytest.fixture
def flow(tmp_path: Path) -> Workflow[Any]:
    path = tmp_path / "parts.py"
    path.write_text(SOURCE)
    return load_workflow(str(path))


@pytest.fixture
def executors() -> Iterator[Executors]:
    made = Executors(threads=2, processes=1)
    yield made
    made.close()
    for process in made._idle:
        process.shutdown()


def row(todo: str = "", role: str = "burn") -> Orchestrator:
    state = msgspec.json.encode({"todo": todo})
    return admit(RowMessage(msgspec.Raw(state), "a", 42, 1.0), "r1", 7, role, state, 2.0)


async def called(caller: Caller, message: Orchestrator, llm: LLM | None = None) -> tuple[Next | Outcome, bytes]:
    row, work = caller.begin(message, llm)
    return caller.end(row, await work)


async def test_a_process_handler_runs_elsewhere(flow: Workflow[Any], executors: Executors) -> None:
    config = flow.parse_config({"factor": 5})
    call = Caller(flow, flow.roles["burn"], {flow.config: config}, executors, trials=2)
    result, state = await called(call, row())
    assert result == Next("burn")
    found = flow.decode_state(state)
    assert found.pid not in (0, os.getpid())
    assert found.seen == [1, 1, 5]
    _, state = await called(call, row())
    assert flow.decode_state(state).pid == found.pid, "one process serves many rows"
    with pytest.raises(ValueError, match="no"):
        await called(call, row("raise"))


async def test_a_process_that_dies_is_replaced(flow: Workflow[Any], executors: Executors) -> None:
    call = Caller(flow, flow.roles["burn"], {flow.config: flow.parse_config({})}, executors, trials=1)
    with pytest.raises(WorkerCrashed, match="killed, or out of memory"):
        await called(call, row("die"))
    assert WorkerCrashed.transient
    _, state = await called(call, row())
    assert flow.decode_state(state).pid not in (0, os.getpid())


async def hung(call: Caller, note: Path) -> tuple[asyncio.Task[Any], int]:
    """A call that does not return, and the process that it is in."""
    task = asyncio.create_task(called(call, row(f"hang {note}")))
    await until(lambda: note.exists() and note.read_text(), "the handler to start")
    return task, int(note.read_text())


async def test_a_process_that_hangs_is_killed_with_its_call(
    flow: Workflow[Any], executors: Executors, tmp_path: Path
) -> None:
    call = Caller(flow, flow.roles["burn"], {flow.config: flow.parse_config({})}, executors, trials=1)
    hanging, pid = await hung(call, tmp_path / "started")
    hanging.cancel()
    _, state = await asyncio.wait_for(called(call, row()), 20)
    assert flow.decode_state(state).pid not in (0, os.getpid(), pid)
    await until(lambda: not psutil.pid_exists(pid), "the process to be gone")


async def test_a_process_that_dies_takes_no_other_call_with_it(flow: Workflow[Any], tmp_path: Path) -> None:
    executors = Executors(threads=1, processes=2)
    call = Caller(flow, flow.roles["burn"], {flow.config: flow.parse_config({})}, executors, trials=1)
    beside, _ = await hung(call, tmp_path / "started")
    with pytest.raises(WorkerCrashed):
        await called(call, row("die"))
    await called(call, row())
    assert not beside.done()
    beside.cancel()
    await asyncio.wait({beside})
    executors.close()


async def test_a_process_that_dies_while_it_waits_costs_the_next_call_nothing(
    flow: Workflow[Any], executors: Executors
) -> None:
    call = Caller(flow, flow.roles["burn"], {flow.config: flow.parse_config({})}, executors, trials=1)
    _, state = await called(call, row())
    (idle,) = executors._idle
    psutil.Process(flow.decode_state(state).pid).kill()
    await until(lambda: idle._broken, "its end to be known")
    await called(call, row())


async def test_a_thread_handler_leaves_the_loop_free(executors: Executors) -> None:
    loop = asyncio.get_running_loop()
    started, let_go = asyncio.Event(), threading.Event()

    def handler() -> str:
        loop.call_soon_threadsafe(started.set)
        assert let_go.wait(10)
        return threading.current_thread().name

    call = asyncio.ensure_future(executors.in_thread(handler))
    await asyncio.wait_for(started.wait(), 5)
    assert not call.done()
    let_go.set()
    assert (await call).startswith("matrix-bus-handler")
    with pytest.raises(ZeroDivisionError):
        await executors.in_thread(lambda: 1 / 0)
    assert await executors.in_thread(max, 1, 2) == 2


hop: contextvars.ContextVar[str] = contextvars.ContextVar("hop", default="none")


async def test_context_variables_reach_threads(executors: Executors) -> None:
    async def one(name: str) -> Any:
        hop.set(name)
        return await executors.in_thread(hop.get)

    assert await asyncio.gather(*(asyncio.create_task(one(name)) for name in "abc")) == ["a", "b", "c"]

    def change() -> None:
        hop.set("changed")

    await executors.in_thread(change)
    assert hop.get() == "none", "a handler's own changes stay with it"


class Note(msgspec.Struct, kw_only=True):
    todo: str = ""


def noted(handler: Any, executors: Executors) -> Caller:
    made = Workflow("noted", state=Note, start="burn")
    made.role(name="burn")(handler)
    return Caller(made, made.roles["burn"], {}, executors, trials=1)


async def test_the_state_comes_back_as_the_handler_left_it(executors: Executors) -> None:
    async def on_the_loop(row: Any) -> Outcome:
        row.state.todo = threading.current_thread().name
        return success("fine")

    def in_a_thread(row: Any) -> Outcome:
        row.state.todo = threading.current_thread().name
        return success("fine")

    here = msgspec.json.encode({"todo": threading.current_thread().name})
    assert await called(noted(on_the_loop, executors), row()) == (success("fine"), here)
    result, state = await called(noted(in_a_thread, executors), row())
    assert result == success("fine")
    assert state != here


async def test_all_models_that_a_handler_asks_for_are_one(executors: Executors) -> None:
    seen = []

    async def handler(row: Any, llm: LLM, other: LLM) -> Outcome:
        seen.extend([llm, other])
        return success()

    caller = noted(handler, executors)
    assert caller.wants_llm
    await called(caller, row(), LLM(cast(Any, None), "default", Sampling(), [], "burn", 1, 1, 42))
    assert seen[0] is seen[1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("done", "'done'"),
        (None, "None"),
        (Next("nobody"), "to 'nobody'"),
        (Outcome(cast(Any, "skipped")), "as 'skipped'"),
        (Outcome(cast(Any, [])), r"as \[\]"),
        (filtered(cast(Any, ValueError("x"))), r"reason ValueError\('x'\)"),
        (failed(cast(Any, None)), "reason None"),
    ],
)
async def test_a_handler_returns_a_decision(executors: Executors, value: Any, said: str) -> None:
    async def handler(row: Any) -> Any:
        return value

    with pytest.raises(HandlerError, match=f"role 'burn' .*{said}"):
        await called(noted(handler, executors), row())


async def test_the_pump_ends_when_it_is_cancelled_in_the_moment_it_is_woken() -> None:
    """A worker that stops wakes its pump and cancels it in one go."""
    pump = Pump()
    task = asyncio.create_task(pump.run())
    await asyncio.sleep(0)
    pump.touch(pool(1))
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()


# --- limits of a row ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("row_s", 100.0, None),
        ("row_s", 50.0, "limits.row_s=50, with 50"),
        ("hops", 4, None),
        ("hops", 3, "limits.hops=3, with 3"),
        ("attempts", 6, None),
        ("attempts", 5, "limits.attempts=5, with 5"),
        ("tokens", 1301, None),
        ("tokens", 1300, "limits.tokens=1300, with 1300"),
        ("cost", 0.0123, None),
        ("cost", 0.012, "limits.cost=0.012, with 0.012"),
    ],
)
def test_a_row_that_has_reached_a_limit(limit: str, value: float, said: str | None) -> None:
    message = admit(RowMessage(input=msgspec.Raw(b"{}"), id="0", seed=0, submitted_at=0.0), "r", 0, "a", b"", 1000.0)
    message.hop, message.calls = 4, 5
    message.usage = {
        "a": Usage(calls=2, prompt_tokens=1000, completion_tokens=100, cost=0.01),
        "b": Usage(calls=1, prompt_tokens=150, completion_tokens=50, cost=0.002),
    }
    limits = parse_run({"limits": {limit: value}}).limits
    if said is None:
        check(message, limits, 1050.0)
    else:
        with pytest.raises(LimitReached, match=said.replace(".", r"\.")):
            check(message, limits, 1050.0)
