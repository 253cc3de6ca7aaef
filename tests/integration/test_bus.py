"""The bus against real brokers: confirmed or refused, read in order, and never left hanging."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nats.aio.msg import Msg

from matrix_bus import catalog, control, endpoints, registry
from matrix_bus.broker import Broker, find_server, server_info
from matrix_bus.bus import Bus, PubAck, is_lost_race, patiently
from matrix_bus.bus.server import LEAST_PAYLOAD_BYTES
from matrix_bus.errors import (
    BusTimeout,
    BusUnavailable,
    BusUnsuitable,
    MessageTooLarge,
    NobodyListens,
    PublishRefused,
)
from matrix_bus.payload import CHUNK_BYTES, Payloads
from matrix_bus.service import free_port
from tests.helpers import connected, messages, server_with, submitted, unique, until, until_sync, work_stream_of
from tests.trip import trip

NS = 1_000_000_000


# --- publishing ---------------------------------------------------------------------------------------------


async def test_a_publish_is_confirmed_with_its_sequence_and_a_repeated_id_is_told(bus: Bus) -> None:
    subject = unique("t")
    await work_stream_of(bus, subject)
    header = {"Nats-Msg-Id": "one"}
    assert await bus.publish(subject, b"a", header) == PubAck(1, False)
    assert await bus.publish(subject, b"a", header) == PubAck(1, True)
    assert await bus.publish(subject, b"b") == PubAck(2, False)


async def test_a_fence_that_was_overtaken_is_a_lost_race_and_stores_nothing(bus: Bus) -> None:
    subject = unique("t")
    stream = await work_stream_of(bus, f"{subject}.>")
    fence = {
        "Nats-Expected-Last-Subject-Sequence": "0",
        "Nats-Expected-Last-Subject-Sequence-Subject": f"{subject}.*.7.*",
    }
    await bus.publish(f"{subject}.a.7.1", b"first", fence)
    with pytest.raises(PublishRefused) as refused:
        await bus.publish(f"{subject}.b.7.2", b"second", fence)
    assert refused.value.code == 10071
    assert is_lost_race(refused.value)
    await bus.publish(
        f"{subject}.b.8.1", b"another row", fence | {"Nats-Expected-Last-Subject-Sequence-Subject": f"{subject}.*.8.*"}
    )
    assert await messages(bus, stream) == 2


async def test_another_refusal_is_no_lost_race(bus: Bus) -> None:
    subject = unique("t")
    await work_stream_of(bus, subject, max_msg_size=10)
    with pytest.raises(PublishRefused, match=subject) as refused:
        await bus.publish(subject, b"x" * 11)
    assert not is_lost_race(refused.value)


async def test_a_call_that_nobody_listens_to_fails_at_once(bus: Bus) -> None:
    started = time.monotonic()
    with pytest.raises(NobodyListens, match=r"nowhere\.at\.all"):
        await bus.call("nowhere.at.all")
    with pytest.raises(NobodyListens):
        await bus.publish("nowhere.at.all", b"")
    assert time.monotonic() - started < 2


async def test_a_call_that_is_not_answered_ends_with_its_timeout(bus: Bus) -> None:
    subject = unique("mute")
    heard: list[Msg] = []

    async def hear(message: Msg) -> None:
        heard.append(message)

    await bus.nc.subscribe(subject, cb=hear)
    started = time.monotonic()
    with pytest.raises(BusTimeout):
        await bus.call(subject, timeout_s=0.3)
    assert heard
    assert 0.3 <= time.monotonic() - started < 3


async def test_a_message_that_is_too_large_with_its_headers_is_not_sent(bus: Bus) -> None:
    subject = unique("t")
    await work_stream_of(bus, subject)
    header = {"Mb-Reason": "x" * 500}
    most = b"x" * bus.max_body
    assert (await bus.publish(subject, most, header)).seq == 1
    for size in (bus.max_payload - 200, bus.max_payload + 1):
        body = b"x" * size
        async with asyncio.timeout(10):
            with pytest.raises(MessageTooLarge, match=rf"{subject}.*{bus.max_payload}"):
                await patiently(bus, lambda: bus.publish(subject, body, header))  # noqa: B023 - awaited at once
    assert (await bus.publish(subject, b"next")).seq == 2, "the broker has not ended the connection"
    assert bus.epoch == 0


# --- looking up ---------------------------------------------------------------------------------------------


async def test_last_finds_the_newest_message_of_a_family(bus: Bus) -> None:
    subject = unique("t")
    stream = await work_stream_of(bus, f"{subject}.>")
    assert await bus.last(stream, f"{subject}.>") is None
    await bus.publish(f"{subject}.a.1", b"old")
    await bus.publish(f"{subject}.b.1", b"new", {"Mb-Lease": "lease"})
    await bus.publish(f"{subject}.b.2", b"other")
    found = await bus.last(stream, f"{subject}.*.1")
    assert found is not None
    assert (found.subject, found.seq, found.data) == (f"{subject}.b.1", 2, b"new")
    assert found.headers["Mb-Lease"] == "lease"
    assert await bus.last(stream, f"{subject}.*.3") is None
    assert await bus.last_sequence(stream) == 3
    with pytest.raises(PublishRefused) as refused:
        await bus.last("no-such-stream", ">")
    assert refused.value.code == 10059


async def test_reading_spans_batches_skips_holes_and_resumes(bus: Bus) -> None:
    subject = unique("t")
    stream = await work_stream_of(bus, f"{subject}.*")
    assert [message async for message in bus.read(stream)] == []
    await asyncio.gather(*(bus.publish(f"{subject}.{n % 3}", str(n).encode()) for n in range(1000)))
    for seq in (1, 500, 501, 1000):
        await bus.api(f"STREAM.MSG.DELETE.{stream}", {"seq": seq})
    expected = [seq for seq in range(1, 1001) if seq not in (1, 500, 501, 1000)]
    first: list[int] = []
    async for message in bus.read(stream, batch=64):
        first.append(message.seq)
        if len(first) == 333:
            break
    rest = [message.seq async for message in bus.read(stream, first[-1] + 1, batch=64)]
    assert first + rest == expected
    assert [message.seq async for message in bus.read(stream, 1001)] == []


async def test_reading_large_messages_is_cut_into_batches_by_size(bus: Bus) -> None:
    subject = unique("t")
    stream = await work_stream_of(bus, subject)
    await asyncio.gather(*(bus.publish(subject, b"x" * (1 << 20)) for _ in range(20)))
    assert [message.seq async for message in bus.read(stream)] == list(range(1, 21))


# --- outages ------------------------------------------------------------------------------------------------


async def test_a_broker_killed_in_mid_burst_leaves_no_publish_hanging(broker: Broker) -> None:
    async with connected(broker.url) as bus:
        stream = await work_stream_of(bus, "t")
        acked: list[int] = []

        async def put(n: int) -> None:
            acked.append((await bus.publish("t", str(n).encode())).seq)
            if len(acked) == 1:
                broker.kill()

        burst = [asyncio.create_task(put(n)) for n in range(5000)]
        await until(lambda: not bus.connected, "the disconnect")
        broker.start()
        results = await asyncio.wait_for(asyncio.gather(*burst, return_exceptions=True), 20)
        lost = [result for result in results if result is not None]
        assert all(isinstance(error, BusTimeout | BusUnavailable) for error in lost)
        await until(lambda: bus.connected, "the reconnect")
        stored = {message.seq async for message in bus.read(stream)}
        assert set(acked) <= stored


async def test_a_call_made_in_an_outage_waits_for_the_broker(broker: Broker) -> None:
    async with connected(broker.url) as bus:
        await work_stream_of(bus, "t")
        broker.kill()
        await until(lambda: not bus.connected, "the disconnect")
        waiting = asyncio.ensure_future(bus.publish("t", b"x"))
        broker.start()
        assert (await asyncio.wait_for(waiting, 10)).seq == 1


async def test_a_reconnect_is_told_and_counted(broker: Broker) -> None:
    async with connected(broker.url) as bus:
        calls: list[str] = []

        async def tell() -> None:
            calls.append("told")

        async def never() -> None:
            calls.append("forgotten")

        async def failing() -> None:
            raise BusTimeout("again")

        bus.on_reconnect(failing)
        bus.on_reconnect(tell)
        bus.on_reconnect(never)()
        assert bus.epoch == 0
        for epoch in (1, 2):
            broker.restart()
            await until(lambda: bus.connected and len(calls) == epoch, "the reconnect")  # noqa: B023
            assert bus.epoch == epoch
        assert calls == ["told"] * 2


async def test_who_is_told_of_a_reconnect_does_not_hold_up_the_others(broker: Broker) -> None:
    async with connected(broker.url) as bus:
        told, never = asyncio.Event(), asyncio.Event()
        first: list[int] = []

        async def wait() -> None:
            first.append(bus.epoch)
            await never.wait()
            first.append(0)

        async def tell() -> None:
            told.set()

        bus.on_reconnect(wait)
        bus.on_reconnect(tell)
        for epoch in (1, 2):
            told.clear()
            broker.restart()
            async with asyncio.timeout(20):
                await told.wait()
            assert first == list(range(1, epoch + 1))
        never.set()
        await until(lambda: 0 in first, "the one who waits")
        assert first == [1, 2, 0], "what is overtaken by the next reconnect is not gone on with"


async def test_closing_without_a_broker_does_not_hang(broker: Broker) -> None:
    bus = await Bus.connect(broker.url)
    await work_stream_of(bus, "t")
    broker.kill()
    await until(lambda: not bus.connected, "the disconnect")
    await asyncio.wait_for(bus.close(), 5)


async def test_a_connection_that_the_broker_ends_for_good_is_waited_for_by_nobody(tmp_path: Path) -> None:
    async def ignore(_: Msg) -> None:
        pass

    async def lose(bus: Bus) -> None:
        for _ in range(3):
            await bus.nc.subscribe(unique("mute"), cb=ignore)

    with server_with(tmp_path, "max_subscriptions: 3") as url:
        async with connected(url) as bus:
            mute = await bus.nc.subscribe("mute", cb=ignore)
            calling = asyncio.ensure_future(bus.call(mute.subject, timeout_s=60))
            patient = asyncio.ensure_future(patiently(bus, lambda: bus.call(mute.subject, timeout_s=60)))
            await lose(bus)
            async with asyncio.timeout(10):
                with pytest.raises(BusTimeout, match="whether the broker has the message is unknown"):
                    await calling
                for waiting in (patient, bus.wait_connected(), bus.publish("t", b""), bus.call("t")):
                    with pytest.raises(BusUnavailable, match="maximum subscriptions exceeded"):
                        await waiting
            assert not bus.connected


async def test_a_dead_address_is_unavailable_within_its_timeout() -> None:
    started = time.monotonic()
    with pytest.raises(BusUnavailable, match="matrix-bus broker"):
        await Bus.connect(f"nats://127.0.0.1:{free_port()}", timeout_s=1.0)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"])
async def test_a_port_that_is_not_a_broker_is_unavailable_within_its_timeout(greeting: bytes) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await writer.drain()
        await reader.read()  # until the client gives up
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        started = time.monotonic()
        with pytest.raises(BusUnavailable, match=str(port)):
            await Bus.connect(f"nats://127.0.0.1:{port}", timeout_s=1.0)
        assert time.monotonic() - started < 4


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[str]:
    """A nats-server without JetStream."""
    port = free_port()
    log = (tmp_path / "log").open("wb")
    with log, subprocess.Popen([find_server(), "-a", "127.0.0.1", "-p", str(port)], stderr=log) as server:
        url = f"nats://127.0.0.1:{port}"
        until_sync(lambda: server_info(url), "nats-server to answer")
        yield url
        server.terminate()


async def test_a_server_without_jetstream_is_unsuitable(plain_server: str) -> None:
    with pytest.raises(BusUnsuitable, match="-js"):
        await Bus.connect(plain_server)


async def test_a_server_that_takes_no_chunk_of_a_large_value_is_unsuitable(tmp_path: Path) -> None:
    with server_with(tmp_path, "max_payload: 128KB") as url:
        needs = f"at most 131072 bytes.*{LEAST_PAYLOAD_BYTES}"
        with pytest.raises(BusUnsuitable, match=needs):
            await Bus.connect(url)
    with server_with(tmp_path, f"max_payload: {LEAST_PAYLOAD_BYTES}") as url:
        async with connected(url) as bus:
            record = await submitted(bus, trip(), [])
            store, body = Payloads(bus, record.id), b"x" * (CHUNK_BYTES + 1)
            assert await store.get(await store.put(body)) == body


async def test_a_password_in_the_address_is_never_shown(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"nats://me:hush-hush@127.0.0.1:{free_port()}"
    with pytest.raises(BusUnavailable) as caught:
        await Bus.connect(url)
    printed = capsys.readouterr()
    assert "hush" not in str(caught.value) + printed.out + printed.err
    assert "nats://127.0.0.1:" in str(caught.value)


async def test_what_nobody_answers_for_is_not_taken_for_empty(tmp_path: Path) -> None:
    """As in a cluster, when the servers that have a stream are down: its direct gets have no responder then."""
    with Broker(tmp_path / "broker") as broker:
        async with connected(broker.url) as bus:
            looks: dict[str, Callable[[Bus], Awaitable[Any]]] = {
                catalog.STREAM: catalog.workflows,
                endpoints._STREAM: endpoints.listing,
                registry.DEAD: _dead,
            }
            for stream, look in looks.items():
                assert await look(bus) == [], "nothing was ever there"
                await bus.api(f"STREAM.CREATE.{stream}", {"name": stream, "subjects": [f"of.{stream}"]})
                with pytest.raises(NobodyListens):
                    await look(bus)


async def _dead(bus: Bus) -> list[control.DeadLetter]:
    return [letter async for letter in control.dead_letters(bus)]
