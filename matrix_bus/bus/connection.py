"""One connection to the broker: calls multiplexed over one inbox, through restarts of the broker."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ..errors import BusError, BusTimeout, BusUnavailable, MessageTooLarge
from ..telemetry import logger
from .server import HEADROOM_BYTES, check_server, without_password
from .wire import Headers, Message, answer, hpub

if TYPE_CHECKING:  # it takes longer to import than all of ours, and `--help` needs none of it
    from nats.aio.client import Client
    from nats.aio.subscription import Subscription

    from .receiving import Receiver

CALL_TIMEOUT_S = 5.0
_SWEEP_S = 0.5

log = logger("bus")


Reconnected = Callable[[], Awaitable[None]]
T = TypeVar("T")


class Told:
    """Stands where a future does; a function is told at once, instead of whoever waits in the loop's next turn."""

    __slots__ = ("_done",)

    def __init__(self, done: Callable[[BaseException | None], None]) -> None:
        """`done` gets the error, or None; it must not raise."""
        self._done = done

    def done(self) -> bool:
        """Nobody gives up waiting."""
        return False

    def set_result(self, _: object) -> None:
        self._done(None)

    def set_exception(self, error: BaseException) -> None:
        self._done(error)


class Connection:
    """A live connection. Made by `Bus.connect`; survives restarts of the broker until it is closed."""

    def __init__(self, url: str, client: Client) -> None:
        self.url = without_password(url)
        """Where the broker is, without the user and password that may stand in the address: it is for messages."""
        from nats.errors import Error

        from .receiving import Receiver
        from .transport import SocketTransport

        self.nc = client
        self._receiver: Receiver = Receiver(client)
        client._ps = self._receiver
        if "ws://" not in url and "wss://" not in url:
            client._transport = SocketTransport()
        self.client_errors = (Error, OSError)
        """What the client library raises where the connection is gone."""
        self.max_payload = 1 << 20
        """Largest message that the broker takes, in bytes, headers included."""
        self.clustered = False
        """Whether the broker is one of several that keep copies for each other."""
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
        self._waiting: dict[str, tuple[asyncio.Future[Any] | Told, float, Callable[[str, Message], Any], str]] = {}
        """By the last token of their inbox: who waits, until when, what reads the reply, and what was asked."""
        self._batches: dict[str, asyncio.Queue[Message | None]] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._after_reconnect: asyncio.Task[None] | None = None
        self._ended = ""
        """Why the connection is not there any more and will not come back; empty while that is not so."""
        # Kept, since asking for the running loop costs a system call in Python 3.11, some five times a hop.
        self._loop = asyncio.get_running_loop()
        self._done = self._loop.create_future()
        """What the library's flusher is to tell that it has written, where nobody waits for it."""
        self._done.set_result(None)

    @classmethod
    async def connect(cls, url: str, *, name: str = "matrix-bus", timeout_s: float = 5.0) -> Self:
        """Connects, and checks that the broker can carry runs. `url` may be several of a cluster, with commas.

        Raises `BusUnavailable` if nobody answers within `timeout_s`, `BusUnsuitable` if the broker is too old, has no
        JetStream, or takes messages that are too small.
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
        self._learn()
        await self.listen(self._inbox + "*", self._on_reply)
        self._sweeper = asyncio.create_task(self._sweep(), name="bus-timeouts")
        self._up.set()

    def _learn(self) -> None:
        """What the broker at the other end says of itself."""
        self.max_payload = self.nc.max_payload
        self.clustered = bool(self.nc._server_info.get("cluster"))

    async def close(self) -> None:
        """Flushes what was sent and ends the connection.

        Calls that still wait get `BusTimeout`; later ones, and who waits for a reconnect, `BusUnavailable`.
        """
        self._ended = self._ended or f"the connection to {self.url} was closed"
        for task in (self._sweeper, self._after_reconnect):
            if task is not None:
                task.cancel()
        if self.nc.is_connected:
            with contextlib.suppress(TimeoutError, *self.client_errors):
                await self.nc.flush(timeout=2)
        with contextlib.suppress(*self.client_errors):
            await self.nc.close()
        self._release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def max_body(self) -> int:
        """Largest body of a message with headers of ours, in bytes."""
        return self.max_payload - HEADROOM_BYTES

    @property
    def connected(self) -> bool:
        return self._up.is_set() and not self._ended

    async def wait_connected(self) -> None:
        """Returns at once while connected, else when the broker is back.

        Raises `BusUnavailable` once it was closed, by us or for good by the broker.
        """
        await self._up.wait()
        if self._ended:
            raise BusUnavailable(self._ended)

    def on_reconnect(self, callback: Reconnected) -> Callable[[], None]:
        """Calls `callback` after every reconnect, until the returned function is called; the next one cancels it."""
        self._reconnected.append(callback)
        return lambda: self._reconnected.remove(callback)

    async def listen(self, subject: str, on_message: Callable[[Message], None]) -> Subscription:
        """Has all messages on a subject given to a function, which must not block."""

        async def never(_: object) -> None:
            raise AssertionError("the receiver passes this subscription by")

        subscription = await self.nc.subscribe(subject, cb=never)
        self._receiver.direct[subscription._id] = on_message
        return subscription

    async def stop_listening(self, subscription: Subscription) -> None:
        """Ends it, once what is on its way has arrived."""
        if self.nc.is_closed:
            return
        draining = asyncio.ensure_future(subscription.drain())  # type: ignore[no-untyped-call]
        with contextlib.suppress(TimeoutError, *self.client_errors):  # disconnected: nothing more can come
            # Shielded: nats-py stops reading for good when the reply to a flush comes that was cancelled.
            await asyncio.shield(draining)
        self._receiver.direct.pop(subscription._id, None)

    # --- calls --------------------------------------------------------------------------------------------------

    async def call(
        self,
        subject: str,
        body: bytes = b"",
        headers: Headers | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Message:
        """One request, one reply. Raises `BusTimeout` if none comes, `NobodyListens` if nobody is there to answer."""
        if self._ended or not self._up.is_set():
            await self.wait_connected()
        return await self.ask(subject, body, headers, answer, timeout_s)

    def ask(
        self,
        subject: str,
        body: bytes,
        headers: Headers | None,
        read: Callable[[str, Message], T],
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> asyncio.Future[T]:
        """Sends a request at once; its future will have what `read` makes of (subject, reply), or raise what it raises.

        It raises `BusTimeout` if none comes. Raises `BusUnavailable` once closed, `MessageTooLarge`.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        self._request(subject, body, headers, read, timeout_s, future)
        return future

    def _request(
        self,
        subject: str,
        body: bytes,
        headers: Headers | None,
        read: Callable[[str, Message], T],
        timeout_s: float,
        waiting: asyncio.Future[T] | Told,
    ) -> None:
        token = str(next(self._tokens))
        self.send(subject, body, headers, reply=self._inbox + token)
        self._waiting[token] = (waiting, time.monotonic() + timeout_s, read, subject)

    def send(self, subject: str, body: bytes, headers: Headers | None = None, reply: str = "") -> None:
        """Hands a message to the connection, unconfirmed. Raises `BusUnavailable`, `MessageTooLarge`."""
        commands = hpub(subject, reply, headers, body)
        # The server does not count the first line, of some hundred bytes: to be exact about it would cost more.
        if (size := len(commands[0]) + len(body)) > self.max_payload:
            raise MessageTooLarge(subject, size, self.url, self.max_payload)
        self.write(commands)

    def write(self, commands: Sequence[bytes]) -> None:
        """Hands over what `hpub` and `pub` made, of as many messages as there are, at once. Raises `BusUnavailable`.

        As the library's `publish`, without three coroutines and a future for each message: while the broker is away
        it is kept, and written when it is back. Nothing waits for the socket here, since what is under way is bounded
        by those who wait for its confirmation.
        """
        client = self.nc
        if client.is_closed:
            raise BusUnavailable(self._ended or f"the connection to {self.url} was closed")
        client._pending += commands
        client._pending_data_size += sum(map(len, commands))
        if (flusher := client._flush_queue) is not None and flusher.empty():
            flusher.put_nowait(self._done)

    @property
    def is_full(self) -> bool:
        """Whether who has more to send, and waits for nothing, should wait for `room`."""
        return self.nc._pending_data_size > self.nc._max_pending_size

    async def room(self) -> None:
        """Returns once the connection has written what it was handed. Raises `BusUnavailable`."""
        try:
            await self.nc._flush_pending(force_flush=True)
        except self.client_errors as error:
            raise BusUnavailable(f"cannot send: {error or type(error).__name__}") from None

    # --- inside -------------------------------------------------------------------------------------------------

    def _on_reply(self, message: Message) -> None:
        token = message.subject[len(self._inbox) :]
        waiting = self._waiting.pop(token, None)
        if waiting is None:
            # A batched get's messages carry their stream subject in a header; their inbox is the subject here.
            if (queue := self._batches.get(token)) is not None:
                queue.put_nowait(message)
            return
        future, _, read, subject = waiting
        if future.done():
            return
        try:
            found = read(subject, message)
        except Exception as error:
            # Its traceback holds this frame, which holds the future, which would hold it: a cycle at each refusal.
            future.set_exception(error.with_traceback(None))
        else:
            future.set_result(found)

    async def _on_disconnect(self) -> None:
        if self._ended:
            return
        if self._up.is_set():
            log.warning("bus.disconnected", url=self.url)
        self._up.clear()
        self._fail_waiting("the connection was lost")

    async def _on_reconnect(self) -> None:
        self._learn()
        self.epoch += 1
        self.reconnected_at = time.monotonic()
        self._up.set()
        log.warning("bus.reconnected", url=self.url)
        if self._after_reconnect is not None:
            self._after_reconnect.cancel()  # what it has not come to the end of begins anew
        # In a task: the client must go on reading, and notice the next loss, while they talk to the broker.
        self._after_reconnect = self._loop.create_task(self._call_back())

    async def _call_back(self) -> None:
        async def guarded(callback: Reconnected) -> None:
            try:
                await callback()
            except BusError as error:  # lost again already: the next reconnect calls it again
                log.debug("bus.reconnect_callback_failed", error=str(error))

        # All at once: one may wait for a stream that has no leader yet, which is no reason for the others to.
        await asyncio.gather(*map(guarded, self._reconnected))

    def _release(self) -> None:
        """Nobody is answered any more, and who waits for the broker must not wait for ever."""
        self._fail_waiting("the connection was closed")
        self._up.set()

    def _fail_waiting(self, why: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for future, *_ in waiting.values():
            if not future.done():
                future.set_exception(BusTimeout(f"{why}; whether the broker has the message is unknown"))
        for queue in self._batches.values():
            queue.put_nowait(None)

    async def _sweep(self) -> None:
        """One timer for all calls: a timer each costs more than the call."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            # Most errors that a server names have the library close for good, and it does not always tell.
            if self.nc.is_closed:
                self._ended = (
                    f"the broker at {self.url} ended the connection ({self.nc.last_error}): look at what it allows "
                    "this user, then start again"
                )
                self._release()
                return
            now = time.monotonic()
            for token, (future, deadline, *_) in list(self._waiting.items()):
                if deadline < now or future.done():  # done: who waited was cancelled
                    del self._waiting[token]
                    if not future.done():
                        future.set_exception(BusTimeout("the broker did not confirm in time"))
