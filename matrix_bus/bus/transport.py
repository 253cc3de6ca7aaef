"""The connection's socket: what has come is handed on whole, without the copies and the small reads of a stream.

The client library reads through an asyncio stream, 32 KiB at a time and copied twice. A worker that is sent ten
thousand messages a second turns its loop several times as often for that, and forgets its caches in between.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any
from urllib.parse import ParseResult

from nats.aio.transport import Transport

_MOST_BYTES = 1 << 20
"""Read ahead of whoever parses."""


class SocketTransport(Transport):
    """Takes the place of the library's TCP transport in one client, through all its reconnects."""

    def __init__(self) -> None:
        self._link: _Link | None = None

    def __bool__(self) -> bool:
        """True from the beginning, so that the library does not make one of its own."""
        return True

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        """Raises `OSError`, `TimeoutError`."""
        assert uri.hostname is not None and uri.port is not None  # the library fills in the default port
        loop = asyncio.get_running_loop()
        link = _Link(loop)
        async with asyncio.timeout(connect_timeout):
            await loop.create_connection(lambda: link, uri.hostname, uri.port)
        self._link = link

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        """From here on in TLS. Raises `OSError` (`ssl.SSLError` is one), `TimeoutError`."""
        link = self._connected()
        name = uri if isinstance(uri, str) else uri.hostname
        async with asyncio.timeout(connect_timeout):
            upgraded = await asyncio.get_running_loop().start_tls(
                link.transport, link, ssl_context, server_hostname=name
            )
        assert upgraded is not None
        link.transport = upgraded

    def write(self, payload: bytes) -> None:
        """Raises `OSError` where the connection is lost."""
        self._writable().write(payload)

    def writelines(self, payload: list[bytes]) -> None:
        """Raises `OSError` where the connection is lost."""
        self._writable().writelines(payload)

    async def read(self, buffer_size: int) -> bytes:
        """All that has come, however much it is; empty at the end. Raises what ended the connection."""
        return await self._connected().read()

    async def readline(self) -> bytes:
        return await self._connected().readline()

    async def drain(self) -> None:
        """Returns when most of what was written is with the system. Raises `ConnectionResetError`."""
        await self._connected().drain()

    async def wait_closed(self) -> None:
        if self._link is not None:
            await self._link.closed.wait()

    def close(self) -> None:
        if self._link is not None:
            self._link.transport.close()

    def at_eof(self) -> bool:
        return self._link is None or self._link.at_eof

    def _writable(self) -> asyncio.Transport:
        """asyncio says nothing about a lost connection, and uvloop raises what the library does not expect."""
        link = self._connected()
        link.check()
        return link.transport

    def _connected(self) -> _Link:
        if self._link is None:
            raise ConnectionResetError("not connected")
        return self._link


class _Link(asyncio.Protocol):
    """One connection: one reader, any number of writers."""

    transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.closed = asyncio.Event()
        self._loop = loop
        self._chunks: list[bytes] = []
        self._held = 0
        self._ended = self._paused = False
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def at_eof(self) -> bool:
        return self._ended and not self._chunks

    async def read(self) -> bytes:
        if not self._chunks:
            await self._arrival()
        chunks, self._chunks, self._held = self._chunks, [], 0
        if self._paused and not self._ended:
            self._paused = False
            self.transport.resume_reading()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def readline(self) -> bytes:
        while True:
            whole = b"".join(self._chunks)
            line, end, rest = whole.partition(b"\n")
            if end or self._ended:
                self._chunks = [rest] if rest else []
                self._held = len(rest)
                return line + end
            await self._arrival()

    async def drain(self) -> None:
        await self._writable.wait()
        self.check()

    def check(self) -> None:
        """Raises what ended the connection, if it has ended."""
        if self.closed.is_set():
            raise self._error or ConnectionResetError("the connection was lost")

    async def _arrival(self) -> None:
        """Returns when there is more to read, or never will be. Raises what ended the connection."""
        if not self._ended:
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._error is not None and not self._chunks:
            raise self._error

    # --- called by the loop -------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._held += len(data)
        if self._held > _MOST_BYTES and not self._paused:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._ended = True
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._ended, self._error = True, error
        self.closed.set()
        self._writable.set()
        self._wake()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
