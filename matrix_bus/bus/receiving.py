"""Reading the connection: the client library's parser, replaced where messages come by the ten thousand.

The library matches each message with regular expressions, copies it three times, parses its headers, and hands it
through a queue to a task of its subscription. Messages of our own inboxes go from the buffer to a plain function
instead; all else (other subscriptions, pings, errors, cluster news) goes to the library as before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from ..telemetry import logger
from .wire import Message

if TYPE_CHECKING:
    from nats.aio.client import Client

_LONGEST_CONTROL_LINE = 4096
_M, _H = b"MH"

OnMessage = Callable[[Message], None]
log = logger("bus")


class Receiver(Parser):
    """Takes the place of the library's parser in one client."""

    def __init__(self, client: Client) -> None:
        self.direct: dict[int, OnMessage] = {}
        """By subscription id: who is given its messages, at once. Must not block."""
        super().__init__(client)

    def reset(self) -> None:
        """Forgets a half message: the connection is new."""
        self._chunks: list[bytes] = []
        self._held = 0
        """Bytes in the chunks."""
        self._needed = 0
        """Bytes without which there is nothing to parse."""
        self._connection = object()

    async def parse(self, data: bytes = b"") -> None:
        """Takes what was read. Raises `ProtocolError` for what is no NATS."""
        self._chunks.append(data)
        self._held += len(data)
        if self._held < self._needed:
            return
        connection = self._connection
        whole = b"".join(self._chunks) if len(self._chunks) > 1 else data
        at, size, needed, view = 0, len(whole), 0, memoryview(whole)
        while True:
            end = whole.find(b"\r\n", at)
            if end < 0:
                if size - at > _LONGEST_CONTROL_LINE:
                    raise ProtocolError("nats: a control line without an end")
                break
            first = whole[at]
            if first != _M and first != _H:  # noqa: PLR1714 - twice a hop: it takes a third of the time
                await self._control(whole[at:end])
                at = end + 2
                continue
            words = whole[at:end].split()
            try:
                # MSG subject sid [reply] bytes, or HMSG subject sid [reply] header-bytes bytes
                head = int(words[-2]) if first == _H else 0
                body, stop = end + 2, end + 2 + int(words[-1])
                sid, reply = int(words[2]), words[3] if len(words) == (6 if first == _H else 5) else b""
            except (ValueError, IndexError):
                raise ProtocolError("nats: malformed MSG") from None
            if stop + 2 > size:
                needed = stop + 2 - at
                break
            headers = whole[body : body + head]
            target = self.direct.get(sid)
            if target is None:
                await self.nc._process_msg(sid, words[1], reply, whole[body + head : stop], headers or None)
            else:
                try:
                    target(Message(words[1].decode(), reply.decode(), view[body + head : stop], headers))
                except Exception:  # it is ours, and must not end the reading
                    log.exception("bus.receiver_raised", subject=words[1].decode("utf-8", "replace"))
            at = stop + 2
        if connection is self._connection:  # else it was lost while the library was at work on something
            self._chunks = [whole[at:]] if at < size else []
            self._held, self._needed = size - at, needed

    async def _control(self, line: bytes) -> None:
        client: Any = self.nc
        word, _, rest = line.partition(b" ")
        match word.upper():
            case b"PING":
                await client._process_ping()
            case b"PONG":
                await client._process_pong()
            case b"+OK":
                pass
            case b"-ERR":
                await client._process_err(rest.decode("utf-8", "replace").lower())
            case b"INFO":
                await client._process_info(json.loads(rest))
            case _:
                raise ProtocolError("nats: unknown protocol")
