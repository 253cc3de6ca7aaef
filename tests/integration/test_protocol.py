"""The protocol against real brokers: of any number of executions of a hop, exactly one moves the row on."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import msgspec
import pytest

from matrix_bus import Next, Outcome, Row, RunConfig, filtered, registry, run, to
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus, Lane, Message
from matrix_bus.config import RoleConfig
from matrix_bus.errors import EndpointGone, PublishRefused, RateLimited, Retry, RowError
from matrix_bus.orchestrator import (
    LEASE_ROLE,
    RowMessage,
    admit,
    advance,
    decode,
    encode,
    family,
    finish,
    hop_subject,
    outcome_stream,
    outcome_subject,
    row_subject,
    work_stream,
)
from matrix_bus.registry import DEAD, RunRecord
from matrix_bus.worker.delivery import Delivery
from matrix_bus.worker.moves import Moves
from tests.helpers import (
    all_outcomes,
    connected,
    consumer,
    messages,
    submitted,
    unique,
    until,
    working,
)
from tests.trip import Step, Trip, go_on, rows, trip


async def take(bus: Bus, record: RunRecord, role: str) -> Delivery:
    """One delivery of a role, held by nobody's heartbeat."""
    got: list[Message] = []
    lane = Lane(bus, work_stream(record.id), role, got.append)
    await lane.open()
    await lane.ask(1)
    await until(lambda: got, f"a delivery of {role}")
    await lane.close()
    return Delivery(got[0], 0, time.monotonic())


async def admitted(bus: Bus, record: RunRecord) -> tuple[Moves, Delivery]:
    """Row 0 at its first hop, moved by hand."""
    moves = Moves(bus, record.id)
    lease = await take(bus, record, "_")
    row = RowMessage(input=msgspec.Raw(b"{}"), id="0", seed=0, submitted_at=0.0)
    first = admit(row, record.id, 0, "a", b"{}", 0.0)
    assert await moves.move(lease, first, encode(first), lease.ack_subject)
    return moves, await take(bus, record, "a")


# --- fences -------------------------------------------------------------------------------------------------


async def test_two_executions_with_different_answers_move_the_row_once(bus: Bus) -> None:
    record = await submitted(bus, trip(), rows(1))
    moves, delivery = await admitted(bus, record)
    message = decode(delivery.data)
    lease = delivery.lease
    answers = [advance(message, role) for role in ("a", "b", "a", "b")]
    won = await asyncio.gather(*(moves.move(delivery, answer, encode(answer), lease) for answer in answers))
    assert sorted(won) == [False, False, False, True]
    assert await messages(bus, work_stream(record.id)) == 3  # the row, the hop, and one next hop
    last = await bus.last(work_stream(record.id), family(record.id, 0))
    assert last is not None
    assert decode(last.data).role == answers[won.index(True)].role


async def test_an_admission_that_is_repeated_starts_one_row(bus: Bus) -> None:
    record = await submitted(bus, trip(), rows(1))
    lease = await take(bus, record, "_")
    row = RowMessage(input=msgspec.Raw(b"{}"), id="0", seed=0, submitted_at=0.0)
    first = admit(row, record.id, 0, "a", b"{}", 0.0)
    moves = [Moves(bus, record.id) for _ in range(3)]
    won = await asyncio.gather(*(m.move(lease, first, encode(first), lease.ack_subject) for m in moves))
    assert won.count(True) == 1
    assert await messages(bus, work_stream(record.id)) == 2


async def test_a_publish_whose_confirmation_was_lost_is_advanced(bus: Bus) -> None:
    flow = trip()
    record = await submitted(bus, flow, rows(1))
    moves, delivery = await admitted(bus, record)
    following = advance(decode(delivery.data), "b")
    lease = delivery.lease
    assert await moves.move(delivery, following, encode(following), lease)
    again = await asyncio.wait_for(moves.move(delivery, following, encode(following), lease), 5)
    assert again is False
    moves.ack(delivery)
    async with working(bus.url, flow):
        (outcome,) = await all_outcomes(bus, record)
    assert (outcome.outcome, outcome.hops) == ("success", 2)


async def test_a_second_outcome_is_refused_for_ever(broker: Broker) -> None:
    async with connected(broker.url) as bus:
        record = await submitted(bus, trip(), rows(1))
        moves, delivery = await admitted(bus, record)
        message = decode(delivery.data)
        lease = delivery.lease
        outcome = finish(message, "trip", 1, "success", "first", 0.0)
        other = finish(message, "trip", 1, "failed", "second", 0.0)
        stored = await asyncio.gather(*(moves.outcome(delivery, 0, encode(o), lease) for o in (outcome, other)))
        assert sorted(stored) == [False, True]
        subject = outcome_subject(record.id, 0, 0)
        first = await bus.last(outcome_stream(record.id), subject)
        broker.restart()
        await until(lambda: bus.connected and bus.epoch == 1, "the reconnect")
        for headers in ({"Nats-Expected-Last-Subject-Sequence": "0"}, None):
            with pytest.raises(PublishRefused):
                await bus.publish(subject, b"{}", headers)
        assert await bus.last(outcome_stream(record.id), subject) == first
        await until(partial(_is_empty, bus, record), "lease and hop to be acked")


async def _is_empty(bus: Bus, record: RunRecord) -> bool:
    return await messages(bus, work_stream(record.id)) == 0


async def test_a_stale_redelivery_is_acked_without_a_call(bus: Bus) -> None:
    flow = trip()
    record = await submitted(bus, flow, rows(1))
    moves, delivery = await admitted(bus, record)
    following = advance(decode(delivery.data), "b")
    assert await moves.move(delivery, following, encode(following), delivery.lease)
    bus.nak(delivery.ack_subject)  # the worker died here, before its ack
    async with working(bus.url, flow):
        (outcome,) = await all_outcomes(bus, record)
        await until(partial(_is_empty, bus, record), "the queue to be empty")
    assert msgspec.json.decode(outcome.state)["path"] == ["b"]


async def test_a_redelivery_is_adopted_by_the_living_owner(bus: Bus) -> None:
    go = asyncio.Event()
    calls: list[int] = []

    async def slow(row: Row[Trip]) -> Next:
        calls.append(row.number)
        await go.wait()
        return to("b")

    flow = trip(slow)
    record = await submitted(bus, flow, rows(1), RunConfig(ack_wait_s=1.0))
    async with working(bus.url, flow, slots=1) as owner:
        await until(lambda: calls, "the handler to start")
        (held,) = [d for d in owner._sessions[record.id]._held.values() if d.role == "a"]
        owner._sessions[record.id]._wheel.remove(held)
        ack_subject = held.ack_subject
        async with working(bus.url, flow):
            await until(lambda: held.ack_subject != ack_subject, "the owner to take the redelivery over")
            go.set()
            (outcome,) = await all_outcomes(bus, record)
    assert calls == [0]
    assert (outcome.hops, outcome.attempts, outcome.errors) == (2, 2, [])


# --- rows that cannot go on ---------------------------------------------------------------------------------


NEWER = msgspec.json.encode({"input": {}, "id": "0", "seed": 1, "submitted_at": 0.0, "schema": 99})


@pytest.mark.parametrize(
    ("role", "body"), [("_", b"junk"), ("_", NEWER), ("a", b"\xc1junk")], ids=["row", "schema", "hop"]
)
async def test_what_cannot_be_read_is_kept_for_a_person_and_fails_its_row(bus: Bus, role: str, body: bytes) -> None:
    flow = trip()
    record = await run.open_run(bus, run.new_record(flow, RunConfig(), run=unique("trip")))
    subject = row_subject(record.id, 0) if role == "_" else hop_subject(record.id, role, 0, 1)
    await bus.publish(subject, body)
    await registry.update(bus, record.id, total=1)
    async with working(bus.url, flow):
        (outcome,) = await all_outcomes(bus, record)
        await until(partial(_is_empty, bus, record), "the queue to be empty")
    assert (outcome.outcome, outcome.reason, outcome.row) == ("failed", "bad_row", 0)
    letter = await bus.last(DEAD, f"dead.{record.id}.0")
    assert letter is not None
    assert letter.data == body
    assert letter.headers["Mb-Subject"] == subject
    assert letter.headers["Mb-Reason"] == outcome.errors[0].message


async def test_a_dead_letter_that_is_too_large_with_its_reason_is_cut(bus: Bus) -> None:
    flow = trip()
    record = await run.open_run(bus, run.new_record(flow, RunConfig(), run=unique("trip")))
    size = bus.max_payload - 300
    await bus.publish(row_subject(record.id, 0), b"j" * size)
    await registry.update(bus, record.id, total=1)
    async with working(bus.url, flow):
        (outcome,) = await all_outcomes(bus, record)
    assert (outcome.outcome, outcome.reason, outcome.row) == ("failed", "bad_row", 0)
    letter = await bus.last(DEAD, f"dead.{record.id}.0")
    assert letter is not None
    assert letter.data == b"j" * bus.max_body
    assert letter.headers["Mb-Reason"] == f"(cut, it had {size} bytes) {outcome.errors[0].message}"


async def test_a_message_that_the_broker_does_not_take_is_an_error_of_its_row(bus: Bus) -> None:
    record = await submitted(bus, trip(), rows(1))
    moves, delivery = await admitted(bus, record)
    following = advance(decode(delivery.data), "b")
    with pytest.raises(RowError, match=f"the broker at {bus.url} takes {bus.max_payload}"):
        async with asyncio.timeout(10):
            await moves.move(delivery, following, b"x" * bus.max_payload, delivery.lease)
    assert await moves.move(delivery, following, encode(following), delivery.lease)


async def test_an_input_that_does_not_fit_fails_its_row_alone(bus: Bus) -> None:
    flow = trip()
    record = await submitted(bus, flow, [b'{"x": 1}', b'{"x": "one"}', b"[]"])
    async with working(bus.url, flow):
        outcomes = await all_outcomes(bus, record)
    assert [o.outcome for o in outcomes] == ["success", "failed", "failed"]
    assert "does not fit" in outcomes[1].errors[0].message
    assert bytes(outcomes[1].input) == b'{"x": "one"}'


async def _to_nowhere(row: Row[Trip]) -> Any:
    return Next("nowhere")


async def _to_none(row: Row[Trip]) -> Any:
    return None


async def _to_a_kind_of_its_own(row: Row[Trip]) -> Any:
    return Outcome("skipped")  # type: ignore[arg-type]


async def _with_an_error_for_a_reason(row: Row[Trip]) -> Any:
    return filtered(ValueError("too long"))  # type: ignore[arg-type]


async def _with_a_bug(row: Row[Trip]) -> Any:
    return [][row.number]


@pytest.mark.parametrize(
    ("handler", "kind", "word"),
    [
        (_to_nowhere, "HandlerError", "nowhere"),
        (_to_none, "HandlerError", "None"),
        (_to_a_kind_of_its_own, "HandlerError", "success, filtered or failed"),
        (_with_an_error_for_a_reason, "HandlerError", "ValueError('too long')"),
        (_with_a_bug, "IndexError", "_with_a_bug"),
    ],
)
async def test_a_handler_that_breaks_the_contract_fails_its_row_at_once(
    bus: Bus, handler: Step, kind: str, word: str
) -> None:
    flow = trip(go_on, handler)
    record = await submitted(bus, flow, rows(1))
    async with working(bus.url, flow):
        (outcome,) = await all_outcomes(bus, record)
    assert (outcome.outcome, outcome.reason) == ("failed", f"error: {kind}")
    (error,) = outcome.errors
    assert (error.type, error.role, error.hop, error.attempt) == (kind, "b", 2, 1)
    assert word in error.message


async def test_a_transient_error_is_tried_again_when_its_time_has_come(bus: Bus) -> None:
    calls: list[float] = []

    async def flaky(row: Row[Trip]) -> Next:
        calls.append(asyncio.get_running_loop().time())
        assert row.attempt == len(calls)
        if len(calls) == 1:
            raise RateLimited("slowly", retry_after_s=0.6)
        if len(calls) == 2:
            raise EndpointGone("gone")
        return to("b")

    flow = trip(flaky)
    record = await submitted(bus, flow, rows(1))
    async with working(bus.url, flow):
        (outcome,) = await all_outcomes(bus, record)
    assert outcome.outcome == "success"
    assert [(e.type, e.attempt, e.hop) for e in outcome.errors] == [("RateLimited", 1, 1), ("EndpointGone", 2, 1)]
    assert (outcome.hops, outcome.attempts) == (2, 4)
    assert msgspec.json.decode(outcome.state)["path"] == ["a", "b"]  # what a failed call did to the state is gone
    assert calls[1] - calls[0] >= 0.59
    assert calls[2] - calls[1] >= 0.09


async def test_errors_of_a_handlers_own_task_group_count_as_what_they_are(bus: Bus) -> None:
    async def fan_out(row: Row[Trip]) -> Next:
        async def call(error: Exception | None) -> None:
            if error is not None:
                raise error

        trouble: list[Exception | None] = [None, RateLimited("slowly", retry_after_s=0.01), EndpointGone("gone")]
        if row.attempt == 2:
            trouble.append(ValueError("a bug"))
        async with asyncio.TaskGroup() as group:
            for error in trouble:
                group.create_task(call(error))
        return to("b")

    flow = trip(fan_out)
    record = await submitted(bus, flow, rows(1))
    async with working(bus.url, flow):
        (outcome,) = await all_outcomes(bus, record)
    assert (outcome.outcome, outcome.reason, outcome.attempts) == ("failed", "error: ValueError", 2)
    assert [(e.type, e.attempt) for e in outcome.errors] == [("RateLimited", 1), ("ValueError", 2)]
    assert outcome.errors[0].message == "slowly"
    assert "a bug" in outcome.errors[1].message and "in call" in outcome.errors[1].message


async def test_attempts_are_used_up_and_a_hop_has_a_time_limit(bus: Bus) -> None:
    async def stuck(row: Row[Trip]) -> Next:
        await asyncio.Event().wait()
        return to("b")

    flow = trip(stuck)
    config = RunConfig(roles={"a": RoleConfig(max_attempts=2, timeout_s=0.05)})
    record = await submitted(bus, flow, rows(1), config)
    async with working(bus.url, flow):
        (outcome,) = await all_outcomes(bus, record)
    assert (outcome.outcome, outcome.reason, outcome.attempts) == ("failed", "timeout", 2)
    assert [e.attempt for e in outcome.errors] == [1, 2]


async def test_a_handler_may_ask_to_be_called_again(bus: Bus) -> None:
    async def busy(row: Row[Trip]) -> Next:
        row.state.draw = 1.0  # of a call that fails nothing is left
        if row.attempt < 3:
            raise Retry("the scorer is busy", after_s=0.01)
        row.state.draw = 0.0
        return to("b")

    flow = trip(busy)
    async with working(bus.url, flow):
        record = await submitted(bus, flow, rows(2))
        for outcome in await all_outcomes(bus, record):
            assert (outcome.kind, outcome.attempts, [e.type for e in outcome.errors]) == ("success", 4, ["Retry"] * 2)
            assert b'"path":["a","b"]' in bytes(outcome.state)


async def test_a_lease_that_comes_again_of_a_row_that_is_here_is_not_looked_up(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[int] = []
    original = Moves.has_outcome

    async def counting(self: Moves, n: int, generation: int) -> bool:
        looked_up.append(n)
        return await original(self, n, generation)

    monkeypatch.setattr(Moves, "has_outcome", counting)
    monkeypatch.setattr("matrix_bus.worker.moves._ASIDE_S", 0.3)

    async def came_twice() -> bool:
        return bool((await consumer(bus, work_stream(record.id), LEASE_ROLE))["delivered"]["consumer_seq"] >= 3)

    async def wait_for_the_lease(row: Row[Trip]) -> Next:
        await until(came_twice, "the lease to come twice more", 15)
        return to("b")

    flow = trip(wait_for_the_lease)
    record = await submitted(bus, flow, rows(1), RunConfig(ack_wait_s=1.0))
    async with working(bus.url, flow):
        await until(lambda: looked_up, "the admission")
        (outcome,) = await all_outcomes(bus, record)
    assert (outcome.outcome, outcome.attempts) == ("success", 2)
    assert looked_up == [0], "by the admission, and not when it came again"


async def test_the_lease_of_a_row_that_travels_does_not_come_again_and_counts(bus: Bus) -> None:
    """AckWait is for rows that nobody sets off; what travels is put aside, and is in flight all the same."""
    gate = asyncio.Event()

    async def wait(row: Row[Trip]) -> Next:
        await gate.wait()
        return to("b")

    flow = trip(wait)
    record = await submitted(bus, flow, rows(3), RunConfig(ack_wait_s=1.0, max_in_flight=2))
    async with working(bus.url, flow), working(bus.url, flow):
        await asyncio.sleep(2.5)
        leases = await consumer(bus, work_stream(record.id), LEASE_ROLE)
        assert (leases["delivered"]["consumer_seq"], leases["num_ack_pending"], leases["num_pending"]) == (2, 2, 1)
        gate.set()
        assert [outcome.outcome for outcome in await all_outcomes(bus, record)] == ["success"] * 3
        await until(partial(_is_empty, bus, record), "all leases to be acked")


async def test_a_row_whose_worker_dies_before_it_sets_off_comes_back_soon_each_time(bus: Bus) -> None:
    record = await submitted(bus, trip(), rows(1), RunConfig(ack_wait_s=1.0))
    deliveries = [(await take(bus, record, LEASE_ROLE)).deliveries for _ in range(4)]
    assert deliveries == [1, 2, 3, 4]
