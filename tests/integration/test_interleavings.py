"""The rare orders of events, each forced: by chance they come once in ten thousand kills."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from matrix_bus import Next, Outcome, Row, RunConfig, success, to
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus, Lane, Message, PubAck
from matrix_bus.errors import BusTimeout
from matrix_bus.orchestrator import (
    Orchestrator,
    advance,
    decode,
    encode,
    finish,
    hop_subject,
    outcome_stream,
    work_stream,
)
from matrix_bus.registry import RunRecord
from matrix_bus.worker.delivery import Delivery
from matrix_bus.worker.heartbeat import Wheel
from matrix_bus.worker.horizon import Horizon
from matrix_bus.worker.moves import Moves
from tests.helpers import all_outcomes, connected, messages, submitted, until, working
from tests.integration.test_protocol import admitted
from tests.trip import Trip, rows, trip

QUICK = RunConfig(ack_wait_s=1.0)


async def empty(bus: Bus, record: RunRecord) -> bool:
    return await all_but(bus, record, 0)


async def all_but(bus: Bus, record: RunRecord, count: int) -> bool:
    return await messages(bus, work_stream(record.id)) == count


class Called:
    """How often the handlers of a trip were called; they do what they always do."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    async def a(self, row: Row[Trip]) -> Next:
        self.calls["a"] += 1
        return to("b")

    async def b(self, row: Row[Trip]) -> Outcome:
        self.calls["b"] += 1
        return success("done")


async def zombie(bus: Bus, record: RunRecord) -> tuple[Moves, Delivery, Orchestrator]:
    """A worker that has taken the first hop and then says nothing more."""
    moves, delivery = await admitted(bus, record)
    return moves, delivery, decode(delivery.data)


@pytest.mark.parametrize("when", ["while the row travels", "after its end"])
async def test_a_zombie_that_publishes_another_next_role_after_a_restart(broker: Broker, when: str) -> None:
    gate = asyncio.Event()
    called = Called()

    async def wait(row: Row[Trip]) -> Outcome:
        await gate.wait()
        return await called.b(row)

    flow = trip(called.a, wait)
    async with connected(broker.url) as bus:
        record = await submitted(bus, flow, rows(1), QUICK)
        moves, delivery, message = await zombie(bus, record)
        broker.kill()  # and with it, the memory of what was delivered, and of message ids
        broker.start()
        async with working(broker.url, flow):
            await until(lambda: called.calls["a"], "another worker to take the hop over")
            if when == "after its end":
                gate.set()
                await until(lambda: empty(bus, record), "the row to end")
            other = advance(message, "a")  # it had answered "a", the other worker "b"
            assert not await moves.move(delivery, other, encode(other), delivery.lease)
            moves.ack(delivery)
            gate.set()
            (outcome,) = await all_outcomes(bus, record)
            await until(lambda: empty(bus, record), "the queue to be empty")
        late = encode(finish(message, flow.name, 1, "failed", "zombie", 0.0))
        assert not await moves.outcome(delivery, 0, late, delivery.lease)
        assert await messages(bus, outcome_stream(record.id)) == 1
    assert (outcome.outcome, outcome.reason, outcome.hops) == ("success", "done", 2)
    assert called.calls == {"a": 1, "b": 1}


async def test_a_confirmation_that_is_lost_while_others_take_the_row_to_its_end(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row's newer messages are gone by then, and the fence alone would set its last hops off once more."""
    called = Called()
    flow = trip(called.a, called.b)
    record = await submitted(bus, flow, rows(1), QUICK)
    moves, delivery, message = await zombie(bus, record)
    publish = Bus.publish
    lost: list[str] = []

    async def unconfirmed(self: Bus, subject: str, body: bytes, headers: dict[str, str] | None = None) -> PubAck:
        found = await publish(self, subject, body, headers)
        if self is bus and not lost:
            lost.append(subject)
            await until(lambda: all_but(bus, record, 1), "the row to end", 10)
            raise BusTimeout("the connection was lost")
        return found

    monkeypatch.setattr(Bus, "publish", unconfirmed)
    async with working(bus.url, flow):
        following = advance(message, "b")
        assert not await moves.move(delivery, following, encode(following), delivery.lease)
        assert lost == [hop_subject(record.id, "b", 0, 2)]
        moves.ack(delivery)
        await until(lambda: empty(bus, record), "the queue to be empty")
    assert called.calls == {"b": 1}


async def test_two_faults_in_one_row(broker: Broker) -> None:
    """A worker stands still for so long that its hop goes to another, which moves the row on and dies; it then ends.

    The hop of the first is the row's last message again when it wakes up, and the fence would let its answer pass.
    """
    called, started, gate = Called(), asyncio.Event(), asyncio.Event()

    async def wait(row: Row[Trip]) -> Next:
        started.set()
        await gate.wait()
        return await called.a(row)

    flow = trip(wait, called.b)
    async with connected(broker.url) as bus, working(broker.url, flow, roles=["a"], slots=1):
        record = await submitted(bus, flow, rows(1), QUICK)
        await started.wait()
        got: list[Message] = []
        lane = Lane(bus, work_stream(record.id), "a", got.append)
        await lane.open()
        await lane.ask(1)
        time.sleep(1.6)  # the whole process, the first worker in it, neither hears nor says anything
        await until(lambda: got, "the hop to be given to another")
        taken = Delivery(got[0], 0, time.monotonic())
        assert taken.deliveries == 2
        following = advance(decode(taken.data), "b")
        assert await Moves(bus, record.id).move(taken, following, encode(following), taken.lease)
        async with working(broker.url, flow, roles=["b"]):
            await until(lambda: all_but(bus, record, 1), "the row to end, but for the first hop")
            gate.set()
            await until(lambda: called.calls["a"], "the first worker's answer")
            await until(lambda: empty(bus, record), "the queue to be empty")
        assert await messages(bus, outcome_stream(record.id)) == 1
    assert called.calls == {"a": 1, "b": 1}


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.02, 0.1])
async def test_a_broker_that_is_killed_a_moment_after_a_delivery(broker: Broker, after_s: float) -> None:
    started = asyncio.Event()
    called = Called()

    async def at_work(row: Row[Trip]) -> Next:
        started.set()
        await asyncio.sleep(0.05)
        return await called.a(row)

    flow = trip(at_work, called.b)
    async with connected(broker.url) as bus:
        record = await submitted(bus, flow, rows(40), QUICK)
        async with working(broker.url, flow), working(broker.url, flow):
            await started.wait()
            await asyncio.sleep(after_s)
            broker.kill()
            await asyncio.sleep(0.2)  # their handlers end meanwhile
            broker.start()
            outcomes = await all_outcomes(bus, record, 40)
            await until(lambda: empty(bus, record), "the queue to be empty")
    assert [(o.row, o.outcome, o.errors) for o in outcomes] == [(n, "success", []) for n in range(40)]
    assert called.calls == {"a": 40, "b": 40}, "both workers lived: no handler is called twice"


async def test_a_death_between_the_outcome_and_the_ack_of_the_lease(bus: Bus) -> None:
    called = Called()
    flow = trip(called.a, called.b)
    record = await submitted(bus, flow, rows(1), QUICK)
    moves, delivery, message = await zombie(bus, record)

    async def dies(_: str) -> None:
        raise ConnectionAbortedError("kill -9")

    outcome = encode(finish(message, flow.name, 1, "success", "first", 0.0))
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ConnectionAbortedError):
        patched.setattr(bus, "ack_confirmed", dies)
        await moves.outcome(delivery, 0, outcome, delivery.lease)
    assert await messages(bus, work_stream(record.id)) == 2, "the row and its hop"
    async with working(bus.url, flow):
        await until(lambda: empty(bus, record), "both to be freed")
        assert [o.reason for o in await all_outcomes(bus, record)] == ["first"]
    assert not called.calls


async def test_a_death_between_the_ack_of_the_lease_and_of_the_hop(bus: Bus) -> None:
    called = Called()
    flow = trip(called.a, called.b)
    record = await submitted(bus, flow, rows(1), QUICK)
    moves, delivery, message = await zombie(bus, record)

    def dies(_: str) -> None:
        raise ConnectionAbortedError("kill -9")

    outcome = encode(finish(message, flow.name, 1, "success", "first", 0.0))
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ConnectionAbortedError):
        patched.setattr(bus, "ack", dies)
        await moves.outcome(delivery, 0, outcome, delivery.lease)
    assert await messages(bus, work_stream(record.id)) == 1, "the hop alone"
    async with working(bus.url, flow):
        await until(lambda: empty(bus, record), "it to be freed")
    assert not called.calls


async def test_a_lease_that_cannot_be_acked_keeps_its_last_hop(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """An admission that has looked for the outcome a moment too early must find the row to have moved on."""
    record = await submitted(bus, trip(), rows(1), QUICK)
    moves, delivery, message = await zombie(bus, record)
    monkeypatch.setattr("matrix_bus.worker.moves._LEASE_TRIES", 1)
    outcome = encode(finish(message, "trip", 1, "success", "first", 0.0))
    assert await moves.outcome(delivery, 0, outcome, "$JS.ACK.W_none._.1.1.1.1.0")
    assert await messages(bus, work_stream(record.id)) == 2, "the hop waits until the row is gone"
    async with working(bus.url, trip(name=record.workflow)):
        await until(lambda: empty(bus, record), "both to be freed")


async def test_a_broker_that_lags_behind_is_no_proof(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that has just taken over may know less than was confirmed: not knowing a hop does not end it."""
    record = await submitted(bus, trip(), rows(1))
    moves, delivery, _ = await zombie(bus, record)
    last_of = Bus.last_of
    asked: list[str] = []

    async def behind(self: Bus, subject: str, within: str = "") -> int:
        found = await last_of(self, subject, within)
        asked.append(subject)
        return found - 1 if within and len(asked) < 6 else found

    monkeypatch.setattr(Bus, "last_of", behind)
    assert await moves.is_last(delivery)
    assert len(asked) >= 6


async def test_the_end_of_a_queue_that_is_asked_for_during_an_outage_is_known_after_it(broker: Broker) -> None:
    async with connected(broker.url) as bus:
        record = await submitted(bus, trip(), rows(3))
        horizon = Horizon(bus, work_stream(record.id), Wheel(bus, 30.0), {})
        broker.kill()
        await until(lambda: not bus.connected, "the disconnect")
        noting = asyncio.create_task(horizon.note())
        await asyncio.sleep(0)  # it asks
        broker.start()
        await asyncio.wait_for(noting, 20)
        assert bus.epoch == 1
        assert horizon.end(time.monotonic()) == 3, "else every delivery would count as old until the next outage"
