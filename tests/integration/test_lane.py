"""Lanes and acks against real brokers: as many messages as were asked for, and never a lost one."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from matrix_bus.broker import Broker
from matrix_bus.bus import Bus, Lane, Message, delivery_facts, pull
from tests.helpers import connected, consumer, messages, unique, until, work_stream_of

NS = 1_000_000_000


async def a_consumer(bus: Bus, stream: str, ack_wait_s: float = 30.0) -> None:
    config = {"durable_name": "c", "ack_policy": "explicit", "ack_wait": int(ack_wait_s * NS), "max_deliver": -1}
    await bus.api(f"CONSUMER.CREATE.{stream}.c", {"stream_name": stream, "config": config})


async def fill(bus: Bus, subject: str, count: int) -> None:
    await asyncio.gather(*(bus.publish(subject, str(n).encode()) for n in range(count)))


class Inbox:
    """A lane on a stream's consumer `c`, and what came through it."""

    def __init__(self, bus: Bus, stream: str) -> None:
        self.got: list[Message] = []
        self.lane = Lane(bus, stream, "c", self.got.append)

    def deliveries(self, body: bytes) -> list[int]:
        return [delivery_facts(message.reply)[0] for message in self.got if message.data == body]


# --- lanes --------------------------------------------------------------------------------------------------


async def test_a_lane_brings_as_many_as_were_asked_for(bus: Bus) -> None:
    subject = unique("t")
    stream = await work_stream_of(bus, subject)
    await a_consumer(bus, stream)
    inbox = Inbox(bus, stream)
    lane = inbox.lane
    await lane.open()
    await lane.ask(5)  # before there is anything
    assert (lane.outstanding, lane.room(8), lane.room(5)) == (5, 3, 0)
    await fill(bus, subject, 40)
    await until(lambda: len(inbox.got) == 5, "five messages")
    await lane.ask(4)
    await lane.ask(3)  # overlapping requests
    await until(lambda: lane.outstanding == 0, "what was asked for")
    info = await consumer(bus, stream, "c")  # a round trip after the last delivery: nothing more was on its way
    assert info["num_ack_pending"] == 12
    assert len({message.data for message in inbox.got}) == len(inbox.got) == 12
    await lane.close()


async def test_a_lane_learns_how_many_messages_fit(bus: Bus) -> None:
    subject = unique("t")
    stream = await work_stream_of(bus, subject)
    await a_consumer(bus, stream)
    inbox = Inbox(bus, stream)
    lane = inbox.lane
    lane.most_bytes = 1_000_000
    before = lane.fitting
    await lane.open()
    await asyncio.gather(*(bus.publish(subject, b"x" * 100_000) for _ in range(100)))
    await lane.ask(100)
    await until(lambda: len(inbox.got) == 100, "large messages")
    assert lane.fitting == 9 < before
    await asyncio.gather(*(bus.publish(subject, b"x" * 500) for _ in range(200)))
    await lane.ask(200)
    await until(lambda: len(inbox.got) == 300, "small messages")
    assert 900 < lane.fitting < 1000
    lane.most_bytes = 10
    assert lane.fitting == 2, "or nothing would come at all"
    await lane.close()


async def test_a_lane_says_when_it_is_time_to_ask_for_more(bus: Bus) -> None:
    subject = unique("t")
    stream = await work_stream_of(bus, subject)
    await a_consumer(bus, stream)
    got: list[Message] = []
    low: list[int] = []
    lane = Lane(bus, stream, "c", got.append, lambda: low.append(len(got)))
    await lane.open()
    await lane.ask(10)
    await fill(bus, subject, 30)
    await until(lambda: len(got) == 10, "what was asked for")
    assert low == [5, 10]
    await lane.ask(7)
    await until(lambda: len(got) == 17, "the rest")
    assert low == [5, 10, 14, 17]
    await lane.close()


async def test_a_lane_forgets_what_expired_unserved(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "EXPIRES_S", 1.0)
    monkeypatch.setattr(pull, "HEARTBEAT_S", 0.4)
    subject = unique("t")
    stream = await work_stream_of(bus, subject)
    await a_consumer(bus, stream)
    inbox = Inbox(bus, stream)
    await inbox.lane.open()
    await fill(bus, subject, 3)
    await inbox.lane.ask(10)
    await until(lambda: len(inbox.got) == 3, "what there is")
    assert inbox.lane.outstanding == 7
    await until(lambda: inbox.lane.outstanding == 0, "the expiry")
    assert inbox.lane.room(10) == 10
    await inbox.lane.ask(1)
    await bus.publish(subject, b"later")
    await until(lambda: len(inbox.got) == 4, "the next message")
    await inbox.lane.close()


@pytest.mark.parametrize("what", ["CONSUMER.DELETE.{}.c", "STREAM.DELETE.{}"])
async def test_a_lane_whose_consumer_is_deleted_is_gone(bus: Bus, what: str) -> None:
    subject = unique("t")
    stream = await work_stream_of(bus, subject)
    await a_consumer(bus, stream)
    lane = Inbox(bus, stream).lane
    await lane.open()
    await lane.ask(3)
    await consumer(bus, stream, "c")  # the request is there
    assert not lane.gone
    await bus.api(what.format(stream))
    await until(lambda: lane.gone, "the lane to notice")
    assert lane.room(3) == 0
    await lane.close()


async def test_a_lane_goes_on_after_a_restart(broker: Broker) -> None:
    async with connected(broker.url) as bus:
        stream = await work_stream_of(bus, "t")
        await a_consumer(bus, stream)
        inbox = Inbox(bus, stream)
        lane = inbox.lane
        await lane.open()
        await lane.ask(4)
        broker.kill()
        await until(lambda: not bus.connected, "the disconnect")
        assert lane.room(4) == 0  # nobody to ask
        broker.start()
        await until(lambda: bus.connected, "the reconnect")
        assert await until(lambda: lane.room(4), "room again") == 4
        await fill(bus, "t", 6)
        await lane.ask(4)
        await until(lambda: len(inbox.got) == 4 and lane.outstanding == 0, "four messages")
        assert (await consumer(bus, stream, "c"))["num_ack_pending"] == 4
        await lane.close()


async def test_a_lane_that_hears_no_heartbeat_has_room_again(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "HEARTBEAT_S", 0.3)
    async with connected(broker.url) as bus:
        stream = await work_stream_of(bus, "t")
        await a_consumer(bus, stream)
        lane = Inbox(bus, stream).lane
        await lane.open()
        await lane.ask(4)
        asked_at = time.monotonic()
        await until(lambda: time.monotonic() - asked_at > 1.5, "time for five heartbeats")
        assert lane.room(4) == 0  # they come, so the request is alive
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            assert await until(lambda: lane.room(4), "the silence to be noticed", 5) == 4
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        await lane.close()


# --- acks ---------------------------------------------------------------------------------------------------


async def test_ack_nak_and_working_do_what_they_say(bus: Bus) -> None:
    subject = unique("t")
    stream = await work_stream_of(bus, subject)
    await a_consumer(bus, stream, ack_wait_s=1.0)
    for body in (b"acked", b"confirmed", b"nacked", b"beaten", b"silent"):
        await bus.publish(subject, body)
    inbox = Inbox(bus, stream)
    await inbox.lane.open()
    await inbox.lane.ask(64)
    await until(lambda: len(inbox.got) == 5, "the first deliveries")
    reply = {message.data: message.reply for message in inbox.got}
    await bus.ack_confirmed(reply[b"confirmed"])
    assert await messages(bus, stream) == 4
    bus.ack(reply[b"acked"])
    bus.nak(reply[b"nacked"])
    await until(lambda: inbox.deliveries(b"nacked") == [1, 2], "the redelivery, at once", 0.9)

    async def silent_again() -> bool:
        bus.working([reply[b"beaten"]])
        return len(inbox.deliveries(b"silent")) == 3

    await until(silent_again, "two redeliveries of what nobody works on")
    assert inbox.deliveries(b"beaten") == [1]
    assert inbox.deliveries(b"acked") == inbox.deliveries(b"confirmed") == [1]
    assert (await consumer(bus, stream, "c"))["num_ack_pending"] == await messages(bus, stream) == 3
    await bus.ack_confirmed(reply[b"silent"])  # through the reply of an earlier delivery
    assert await messages(bus, stream) == 2
    await inbox.lane.close()


def test_the_facts_of_a_delivery_are_read_from_both_forms_of_its_ack_subject() -> None:
    assert delivery_facts("$JS.ACK.W_r.solver.3.41.7.1700000000.0") == (3, 41)
    assert delivery_facts("$JS.ACK.hub.ACCOUNT.W_r.solver.3.41.7.1700000000.0.token") == (3, 41)


async def test_a_close_that_is_cancelled_leaves_the_connection_alive(bus: Bus) -> None:
    subject = unique("l")
    stream = await work_stream_of(bus, subject)
    for _ in range(20):
        lane = Lane(bus, stream, "w", lambda _: None)
        await lane.open()
        closing = asyncio.create_task(lane.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait({closing})
    await asyncio.sleep(0.1)
    assert (await bus.publish(subject, b"still read")).seq == 1
    assert bus.epoch == 0
