"""One connection to the broker: confirmed publishing, look-ups and acks, multiplexed over one inbox."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import BusError, BusTimeout, BusUnavailable, NobodyListens, PublishRefused
from ..telemetry import logger
from .server import check_server, without_password
from .wire import NO_MESSAGE, PubAck, Stored, answer, confirmation, fence, get_reply, parse_headers, sequence_in

if TYPE_CHECKING:  # it takes longer to import than all of ours, and `--help` needs none of it
    from nats.aio.client import Client
    from nats.aio.msg import Msg

CALL_TIMEOUT_S = 5.0
_SWEEP_S = 0.5
_NEVER = (1 << 63) - 1
"""No message has this sequence."""

log = logger("bus")


Reconnected = Callable[[], Awaitable[None]]


class Bus:
    """A live connection. Made by `Bus.connect`; survives restarts of the broker until it is closed."""

    def __init__(self, url: str, client: Client) -> None:
        self.url = without_password(url)
        """Where the broker is, without the user and password that may stand in the address: it is for messages."""
        from nats.errors import Error

        self.nc = client
        self.client_errors = (Error, OSError)
        """What the client library raises where the connection is gone."""
        self.epoch = 0
        """Counts reconnects: what was pulled or heartbeated in an older epoch may be forgotten by the broker."""
        self.reconnected_at = -math.inf
        """On the monotonic clock."""
        self.full_said_at = -math.inf
        """When it was last said that the broker's store is full."""
        self._up = asyncio.Event()
        self._reconnected: list[Reconnected] = []
        self._inbox = client.new_inbox() + "."
        self._tokens = itertools.count()
        self._waiting: dict[str, tuple[asyncio.Future[Msg], float]] = {}
        self._batches: dict[str, asyncio.Queue[Msg | None]] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._after_reconnect: asyncio.Task[None] | None = None
        self._closing = False
        # Kept, since asking for the running loop costs a system call in Python 3.11, some five times a hop.
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(cls, url: str, *, name: str = "matrix-bus", timeout_s: float = 5.0) -> Bus:
        """Connects, and checks that the broker can carry runs. `url` may be several of a cluster, with commas.

        Raises `BusUnavailable` if nobody answers within `timeout_s`, `BusUnsuitable` if the broker is too old or
        has no JetStream.
        """
        from nats.aio.client import Client

        client = Client()
        bus = cls(url, client)
        last: list[Exception] = []

        async def on_error(error: Exception) -> None:
            last[:] = [error]
            log.debug("bus.client_error", error=repr(error))

        try:
            await asyncio.wait_for(
                client.connect(
                    [server.strip() for server in url.split(",")],
                    name=name,
                    error_cb=on_error,
                    disconnected_cb=bus._on_disconnect,
                    reconnected_cb=bus._on_reconnect,
                    allow_reconnect=True,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.1,  # type: ignore[arg-type]  # typed int, slept as a float
                    connect_timeout=2,
                    ping_interval=10,
                    pending_size=16 << 20,
                    skip_subject_validation=True,
                ),
                timeout_s,
            )
        except (TimeoutError, *bus.client_errors) as error:
            with contextlib.suppress(Exception):  # half-open: the reason for closing is already known
                await client.close()
            why = last[0] if last else error
            raise BusUnavailable(
                f"no broker answers at {bus.url} ({why or type(why).__name__}): check the address "
                "(--server, MATRIX_BUS_SERVER) or start one with `matrix-bus broker`"
            ) from None
        try:
            check_server(bus.url, client._server_info)
            await bus._open()
        except BaseException:
            await bus.close()
            raise
        return bus

    async def _open(self) -> None:
        await self.nc.subscribe(self._inbox + "*", cb=self._on_reply, pending_msgs_limit=0, pending_bytes_limit=0)
        self._sweeper = asyncio.create_task(self._sweep(), name="bus-timeouts")
        self._up.set()

    async def close(self) -> None:
        """Flushes what was sent and ends the connection.

        Calls that still wait get `BusTimeout`; later ones, and who waits for a reconnect, `BusUnavailable`.
        """
        self._closing = True
        for task in (self._sweeper, self._after_reconnect):
            if task is not None:
                task.cancel()
        if self.nc.is_connected:
            with contextlib.suppress(TimeoutError, *self.client_errors):
                await self.nc.flush(timeout=2)
        with contextlib.suppress(*self.client_errors):
            await self.nc.close()
        self._fail_waiting("the connection was closed")
        self._up.set()  # who waits for the broker must not wait for ever

    async def __aenter__(self) -> Bus:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def max_payload(self) -> int:
        """Largest message that the broker takes, in bytes, headers included."""
        return self.nc.max_payload

    @property
    def connected(self) -> bool:
        return self._up.is_set() and not self._closing

    async def wait_connected(self) -> None:
        """Returns at once while connected, else when the broker is back. Raises `BusUnavailable` once closed."""
        await self._up.wait()
        if self._closing:
            raise BusUnavailable(f"the connection to {self.url} was closed")

    def on_reconnect(self, callback: Reconnected) -> Callable[[], None]:
        """Calls `callback` after every reconnect, until the returned function is called."""
        self._reconnected.append(callback)
        return lambda: self._reconnected.remove(callback)

    # --- calls --------------------------------------------------------------------------------------------------

    async def call(
        self,
        subject: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Msg:
        """One request, one reply. Raises `BusTimeout` if none comes, also when nobody listens."""
        if self._closing or not self._up.is_set():
            await self.wait_connected()
        token = str(next(self._tokens))
        future: asyncio.Future[Msg] = self._loop.create_future()
        self._waiting[token] = (future, time.monotonic() + timeout_s)
        try:
            await self.send(subject, body, headers, reply=self._inbox + token)
            return answer(subject, await future)
        finally:
            self._waiting.pop(token, None)

    async def send(self, subject: str, body: bytes, headers: dict[str, str] | None = None, reply: str = "") -> None:
        """Hands a message to the connection, unconfirmed. Raises `BusError`."""
        try:
            await self.nc.publish(subject, body, reply, headers)
        except self.client_errors as error:
            raise BusUnavailable(f"cannot send {subject}: {error or type(error).__name__}") from None

    async def publish(self, subject: str, body: bytes, headers: dict[str, str] | None = None) -> PubAck:
        """Stores a message; returns when the broker has confirmed it.

        Raises `PublishRefused` with the broker's code, or `BusTimeout` when it is unknown whether it is stored.
        """
        return confirmation(subject, await self.call(subject, body, headers))

    async def begin_publish(
        self, subject: str, body: bytes, headers: dict[str, str], done: Callable[[BaseException | None], None]
    ) -> None:
        """Hands over a message to be stored, and goes on; `done` is told the outcome: None, or what `publish` raises.

        For many at once: it costs no task.
        """
        if self._closing or not self._up.is_set():
            await self.wait_connected()
        token = str(next(self._tokens))
        future: asyncio.Future[Msg] = self._loop.create_future()
        self._waiting[token] = (future, time.monotonic() + CALL_TIMEOUT_S)

        def settle(replied: asyncio.Future[Msg]) -> None:
            self._waiting.pop(token, None)
            try:
                confirmation(subject, replied.result())
            except Exception as error:
                done(error)
            else:
                done(None)

        future.add_done_callback(settle)
        try:
            await self.send(subject, body, headers, reply=self._inbox + token)
        except BusError as error:
            if not future.done():
                future.set_exception(error)

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
        try:
            await self.publish(subject, b"", fence(_NEVER, within))
        except PublishRefused as error:
            if (found := sequence_in(error)) is not None:
                return found
            raise
        raise BusError(f"the broker took a message on {subject} that it had to refuse: is it a stream's subject?")

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

    async def _direct(self, stream: str, query: dict[str, Any]) -> AsyncIterator[Stored]:
        await self.wait_connected()
        token = str(next(self._tokens))
        queue: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._batches[token] = queue
        try:
            body = msgspec.json.encode(query)
            await self.send(f"$JS.API.DIRECT.GET.{stream}", body, reply=self._inbox + token)
            while True:
                try:
                    async with asyncio.timeout(CALL_TIMEOUT_S):
                        message = await queue.get()
                except TimeoutError:
                    message = None
                if message is None:
                    raise BusTimeout(f"reading {stream} was not answered in {CALL_TIMEOUT_S:g} s")
                headers = message.headers or {}
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

    async def ack(self, ack_subject: str) -> None:
        """Acks without waiting: if it is lost the message comes again and is found to be done."""
        await self.send(ack_subject, b"+ACK")

    async def ack_confirmed(self, ack_subject: str) -> None:
        """Acks and waits for the broker's confirmation. Raises `BusTimeout`."""
        await self.call(ack_subject, b"+ACK", timeout_s=2.0)

    async def working(self, ack_subject: str) -> None:
        """Heartbeat: the delivery is still being worked on."""
        await self.send(ack_subject, b"+WPI")

    async def nak(self, ack_subject: str) -> None:
        """Hands a delivery back for immediate redelivery."""
        await self.send(ack_subject, b"-NAK")

    # --- inside -------------------------------------------------------------------------------------------------

    async def _on_reply(self, message: Msg) -> None:
        token = message.subject[len(self._inbox) :]
        waiting = self._waiting.get(token)
        if waiting is None:
            # A batched get's messages carry their stream subject in a header; their inbox is the subject here.
            if (queue := self._batches.get(token)) is not None:
                queue.put_nowait(message)
            return
        if not waiting[0].done():
            waiting[0].set_result(message)

    async def _on_disconnect(self) -> None:
        was_up = self._up.is_set()
        self._up.clear()
        if was_up and not self._closing:
            log.warning("bus.disconnected", url=self.url)
        self._fail_waiting("the connection was lost")

    async def _on_reconnect(self) -> None:
        self.epoch += 1
        self.reconnected_at = time.monotonic()
        self._up.set()
        log.warning("bus.reconnected", url=self.url)
        # In a task: the client must go on reading, and notice the next loss, while they talk to the broker.
        self._after_reconnect = self._loop.create_task(self._call_back())

    async def _call_back(self) -> None:
        for callback in list(self._reconnected):
            try:
                await callback()
            except BusError as error:  # lost again already: the next reconnect calls it again
                log.debug("bus.reconnect_callback_failed", error=str(error))

    def _fail_waiting(self, why: str) -> None:
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(BusTimeout(f"{why}; whether the broker has the message is unknown"))
        for queue in self._batches.values():
            queue.put_nowait(None)

    async def _sweep(self) -> None:
        """One timer for all calls: a timer each costs more than the call."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for future, deadline in list(self._waiting.values()):
                if deadline < now and not future.done():
                    future.set_exception(BusTimeout("the broker did not confirm in time"))
