"""The socket under the client library: whole reads, ends and errors as the library expects them, TLS."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import uvloop
from nats.aio.client import Client

from matrix_bus.broker import Broker, find_server, server_info
from matrix_bus.bus import Bus
from matrix_bus.bus.transport import SocketTransport
from matrix_bus.errors import BusUnavailable
from matrix_bus.service import free_port
from tests.helpers import until

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@asynccontextmanager
async def against(talk: Talk) -> AsyncIterator[SocketTransport]:
    """A transport that is connected to a server which does `talk` with it."""
    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    transport = SocketTransport()
    try:
        port = server.sockets[0].getsockname()[1]
        await transport.connect(urlparse(f"nats://127.0.0.1:{port}"), 0, 5)
        yield transport
    finally:
        transport.close()
        await transport.wait_closed()
        server.close()
        await server.wait_closed()


async def all_of(transport: SocketTransport) -> bytes:
    found = b""
    while not transport.at_eof():
        found += await transport.read(1)
    return found


async def test_lines_then_everything_that_came_then_the_end() -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO {}\r\nPO")
        await asyncio.sleep(0.05)
        writer.write(b"NG\r\nMSG a 1 3\r\nabc\r\n")
        await writer.drain()
        writer.close()

    async with against(talk) as transport:
        assert transport
        assert [await transport.readline() for _ in range(2)] == [b"INFO {}\r\n", b"PONG\r\n"]
        assert await all_of(transport) == b"MSG a 1 3\r\nabc\r\n"
        assert await transport.read(1) == b""
        assert await transport.readline() == b""


async def test_a_connection_that_is_reset_raises_at_both_ends() -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with against(talk) as transport:
        with pytest.raises(ConnectionResetError):
            while True:
                transport.write(b"x" * 65_536)
                await transport.drain()
        await transport.wait_closed()
        assert transport.at_eof()


async def test_who_sends_more_than_is_read_has_to_wait() -> None:
    sent = 0
    size = 64 << 20

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while sent < size:
            writer.write(b"x" * 65_536)
            sent += 65_536
            await writer.drain()
        writer.close()

    async with against(talk) as transport:
        before = -1
        while sent > before:  # until the buffers of both sides and of the system are full
            before = sent
            await asyncio.sleep(0.2)
        assert sent < size // 2
        assert len(await all_of(transport)) == size


async def test_a_writer_waits_for_who_does_not_read() -> None:
    read = asyncio.Event()
    size = 32 << 20
    got = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        await read.wait()
        while chunk := await reader.read(1 << 20):
            got += len(chunk)
        writer.close()

    async with against(talk) as transport:
        transport.writelines([b"y" * (size // 2)] * 2)
        draining = asyncio.create_task(transport.drain())
        await asyncio.sleep(0.1)
        assert not draining.done()
        read.set()
        await asyncio.wait_for(draining, 20)
        transport.close()
        await until(lambda: got == size, "everything to arrive")


async def test_a_server_that_is_not_there() -> None:
    transport = SocketTransport()
    with pytest.raises(OSError, match=r"refused|failed"):
        await transport.connect(urlparse(f"nats://127.0.0.1:{free_port()}"), 0, 5)
    assert transport.at_eof()
    transport.close()
    await transport.wait_closed()


async def test_the_bus_reads_and_writes_through_it_also_after_a_reconnect(broker: Broker) -> None:
    async with await Bus.connect(broker.url) as bus:
        assert isinstance(bus.nc._transport, SocketTransport)
        broker.kill()
        broker.start()
        await until(lambda: bus.epoch and bus.connected, "the reconnect")
        assert isinstance(bus.nc._transport, SocketTransport)
        assert await bus.api("INFO")


class Reluctant:
    """A broker, as far as one needs it to connect, that says hello and hangs up, `refusals` times from now on."""

    def __init__(self) -> None:
        self.refusals = 0
        self.refused = 0
        self.accepted: list[asyncio.StreamWriter] = []

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version": "2.15.1", "jetstream": true, "max_payload": 1048576}\r\n')
        if self.refusals:
            self.refusals -= 1
            self.refused += 1
        else:
            self.accepted.append(writer)
            while line := await reader.readline():
                if line == b"PING\r\n":
                    writer.write(b"PONG\r\n")
        writer.close()

    async def listen(self) -> tuple[asyncio.Server, str]:
        server = await asyncio.start_server(self.talk, "127.0.0.1", 0)
        return server, f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"


LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


@LOOPS
def test_a_broker_that_hangs_up_after_its_hello_is_tried_again(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        broker = Reluctant()
        server, url = await broker.listen()
        async with server:
            broker.refusals = 2
            async with await Bus.connect(url) as bus:
                assert broker.refused == 2
                broker.refusals = 2
                broker.accepted[-1].transport.abort()
                await until(lambda: bus.epoch and bus.connected, "the reconnect")
                assert broker.refused == 4

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@LOOPS
def test_a_broker_that_always_hangs_up_is_unavailable(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        broker = Reluctant()
        server, url = await broker.listen()
        async with server:
            broker.refusals = 1_000_000
            with pytest.raises(BusUnavailable, match=r"no broker answers at .*the connection was lost"):
                await Bus.connect(url, timeout_s=1.0)
            assert broker.refused > 1

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
async def test_tls(tmp_path: Path) -> None:
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(["openssl", *words.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    config = tmp_path / "nats.conf"
    config.write_text(f'host: 127.0.0.1\nport: {port}\ntls {{ cert_file: "{certificate}", key_file: "{key}" }}\n')
    server = subprocess.Popen([find_server(), "-c", config], stderr=subprocess.DEVNULL)
    try:
        context = ssl.create_default_context(cafile=certificate)
        client = Client()
        client._transport = SocketTransport()
        await until(lambda: server_info(f"nats://127.0.0.1:{port}"), "the server")
        await client.connect(f"tls://localhost:{port}", tls=context)
        got = asyncio.get_running_loop().create_future()

        async def take(message: Any) -> None:
            got.set_result(message.data)

        await client.subscribe("s", cb=take)
        body = bytes(range(256)) * 2000
        await client.publish("s", body)
        assert await asyncio.wait_for(got, 10) == body
        transport = client._transport
        assert isinstance(transport, SocketTransport)
        assert transport._connected().transport.get_extra_info("cipher")
        await client.close()
    finally:
        server.terminate()
        server.wait()
