"""What rows need of JetStream: confirmed publishing, look-ups, acks."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import msgspec

from ..errors import BusError, BusTimeout, BusUnavailable, NobodyListens, PublishRefused
from .connection import CALL_TIMEOUT_S, Connection, Told
from .wire import (
    NO_MESSAGE,
    STREAM_NOT_FOUND,
    Headers,
    Message,
    PubAck,
    Stored,
    confirmation,
    fence,
    get_reply,
    parse_headers,
    pub,
    standing,
)

_NEVER = (1 << 63) - 1
"""No message has this sequence."""


class Bus(Connection):
    """A live connection to a broker with JetStream. Made by `Bus.connect`."""

    def named(self, headers: dict[str, str], *parts: object) -> dict[str, str]:
        """Adds a message id, joined from `parts`, where the broker is one of a cluster.

        A leader that has just been elected checks a fence before it has applied all that was confirmed; ids are
        looked at once more when a message is applied. A single server checks the fence against what it has stored,
        so there an id would only be remembered for two minutes.
        """
        if self.clustered:
            headers["Nats-Msg-Id"] = ":".join(map(str, parts))
        return headers

    def id_line(self, *parts: object) -> str:
        """The same as a line, empty where the broker is alone."""
        return f"Nats-Msg-Id: {':'.join(map(str, parts))}\r\n" if self.clustered else ""

    def publish(self, subject: str, body: bytes, headers: Headers | None = None) -> Awaitable[PubAck]:
        """Stores a message, which is sent at once; awaited, it is the broker's confirmation.

        Raises `PublishRefused` with the broker's code, or `BusTimeout` when it is unknown whether it is stored, or
        `BusUnavailable`.
        """
        if self._ended or not self._up.is_set():
            return self._publish_later(subject, body, headers)
        return self.ask(subject, body, headers, confirmation)

    async def _publish_later(self, subject: str, body: bytes, headers: Headers | None) -> PubAck:
        await self.wait_connected()
        return await self.ask(subject, body, headers, confirmation)

    def begin_publish(
        self, subject: str, body: bytes, headers: Headers, done: Callable[[BaseException | None], None]
    ) -> None:
        """Sends a message to be stored, and goes on; `done` is told the outcome: None, or what `publish` raises.

        For many at once: it costs neither a task nor a future. Who sends without end waits for `room` while `is_full`.
        """
        if self._ended or not self._up.is_set():
            done(BusUnavailable(f"the connection to {self.url} is lost"))
            return
        try:
            self._request(subject, body, headers, confirmation, CALL_TIMEOUT_S, Told(done))
        except BusError as error:
            done(error)

    async def api(self, method: str, payload: Any = None, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        """A call of JetStream's JSON API, such as `STREAM.INFO.name`.

        Raises `PublishRefused` with the broker's code, `BusTimeout`.
        """
        body = b"" if payload is None else msgspec.json.encode(payload)
        reply: dict[str, Any] = msgspec.json.decode((await self.call(f"$JS.API.{method}", body, None, timeout_s)).data)
        if error := reply.get("error"):
            raise PublishRefused(method, error.get("err_code", 0), error.get("description", ""))
        return reply

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The stream's last message on `subject` (wildcards allowed), or None.

        Asks the stream's leader: a direct get may be answered by a follower that lags behind.
        """
        body = msgspec.json.encode({"last_by_subj": subject})
        reply = get_reply.decode((await self.call(f"$JS.API.STREAM.MSG.GET.{stream}", body)).data)
        if reply.error is not None:
            if reply.error.err_code == NO_MESSAGE:
                return None
            raise PublishRefused(stream, reply.error.err_code, reply.error.description)
        assert reply.message is not None
        found = reply.message
        headers = parse_headers(base64.b64decode(found.hdrs)) if found.hdrs else {}
        return Stored(found.subject, found.seq, headers, base64.b64decode(found.data))

    async def last_of(self, subject: str, within: str = "") -> int:
        """Sequence of the last message stored on `subject`, or on the wildcard `within` of its stream; 0 if none.

        Asked with a publish that must be refused, since the refusal names the sequence: it comes from the leader that
        has everything that was confirmed, where a cluster lets one that has just taken over answer reads before it
        has caught up. Raises `PublishRefused`, `BusTimeout`.
        """
        if self._ended or not self._up.is_set():
            await self.wait_connected()
        return await self.ask(subject, b"", fence(_NEVER, within), standing)

    async def last_sequence(self, stream: str) -> int:
        """Sequence of the stream's newest message, 0 if it never had one."""
        info = await self.api(f"STREAM.INFO.{stream}")
        return int(info["state"]["last_seq"])

    async def read(self, stream: str, start: int = 1, *, subject: str = ">", batch: int = 512) -> AsyncIterator[Stored]:
        """Messages of a stream on `subject` from sequence `start`, in order, up to the newest at this moment.

        Needs no consumer: each request is answered by direct gets.
        """
        while True:
            count = 0
            query = {"seq": start, "batch": batch, "next_by_subj": subject, "max_bytes": 8 << 20}
            async for message in self._direct(stream, query):
                yield message
                start = message.seq + 1
                count += 1
            if count == 0:
                return

    async def read_if_there(self, stream: str, *, subject: str = ">") -> AsyncIterator[Stored]:
        """As `read`; nothing where there is no such stream. Raises `BusError`, also where it has no leader."""
        start = 1
        for again in (True, False):  # it may have been made between the read and the look
            try:
                async for message in self.read(stream, start, subject=subject):
                    start = message.seq + 1
                    yield message
            except NobodyListens:
                try:
                    await self.last_sequence(stream)
                except PublishRefused as error:
                    if error.code != STREAM_NOT_FOUND:
                        raise
                else:
                    if again:
                        continue
                    raise
            return

    async def _direct(self, stream: str, query: dict[str, Any]) -> AsyncIterator[Stored]:
        await self.wait_connected()
        token = str(next(self._tokens))
        queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self._batches[token] = queue
        try:
            body = msgspec.json.encode(query)
            self.send(f"$JS.API.DIRECT.GET.{stream}", body, reply=self._inbox + token)
            while True:
                try:
                    async with asyncio.timeout(CALL_TIMEOUT_S):
                        message = await queue.get()
                except TimeoutError:
                    message = None
                if message is None:
                    raise BusTimeout(f"reading {stream} was not answered in {CALL_TIMEOUT_S:g} s")
                headers = message.headers
                status = headers.get("Status")
                if status in ("204", "404"):
                    return
                if status == "503":
                    raise NobodyListens(f"nobody answers for stream {stream}")
                if status is not None:
                    raise BusTimeout(f"reading {stream} failed: {status} {headers.get('Description', '')}")
                yield Stored(headers["Nats-Subject"], int(headers["Nats-Sequence"]), headers, message.data)
        finally:
            del self._batches[token]

    # --- acks ---------------------------------------------------------------------------------------------------

    def ack(self, ack_subject: str) -> None:
        """Acks without waiting: if it is lost the message comes again and is found to be done. Raises `BusError`."""
        self.write((pub(ack_subject, "+ACK"),))

    async def ack_confirmed(self, ack_subject: str) -> None:
        """Acks and waits for the broker's confirmation. Raises `BusTimeout`."""
        await self.call(ack_subject, b"+ACK", timeout_s=2.0)

    def working(self, ack_subjects: Iterable[str]) -> None:
        """Heartbeats: these deliveries are still being worked on. Handed over at once. Raises `BusError`."""
        self.write((b"".join([pub(subject, "+WPI") for subject in ack_subjects]),))

    def nak(self, ack_subject: str) -> None:
        """Hands a delivery back for immediate redelivery. Raises `BusError`."""
        self.write((pub(ack_subject, "-NAK"),))

    def put_aside(self, ack_subject: str, seconds: float) -> None:
        """Has a delivery come again only after so long, and count as under way until then. Raises `BusError`."""
        self.write((pub(ack_subject, f'-NAK {{"delay":{seconds * 1e9:.0f}}}'),))
