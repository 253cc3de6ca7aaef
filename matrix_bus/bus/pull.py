"""Pulling: overlapping requests on one durable consumer, through one long-lived inbox.

`fetch()` opens and closes an inbox per batch and idles between batches. Here the worker says how many messages it
has room for, a request for that many goes out while earlier ones are still being served, and what expires unserved
is subtracted again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from .jetstream import Bus
from .wire import Message

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription

EXPIRES_S = 10.0
HEARTBEAT_S = 5.0
"""The broker says every so often that a request still waits: two missed ones and it is asked anew."""
_BACKOFF_S = 0.5
_FIRST_GUESS_BYTES = 64 << 10
_BESIDE_BYTES = 512
"""Subject, reply subject and headers of a message."""
_SMOOTHING = 1 / 16
_LEAST = 2


class Lane:
    """A consumer's messages, as many as were asked for. `on_message` must not block.

    `gone` is set when the consumer or its stream was deleted.
    """

    def __init__(
        self,
        bus: Bus,
        stream: str,
        consumer: str,
        on_message: Callable[[Message], None],
        on_low: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_low` is called when half of what was asked for has come, and when all of it: time to ask for more."""
        self.stream = stream
        self.consumer = consumer
        self.outstanding = 0
        """Messages asked for and not yet received."""
        self.gone = False
        self.most_bytes = 8 << 20
        """What may be under way at once. A broker cuts off a client for which more than 64 MiB wait (its default)."""
        self._mean_bytes = float(_FIRST_GUESS_BYTES)
        """Of the last messages, some sixteen of them."""
        self._bus = bus
        self._on_message = on_message
        self._on_low = on_low
        self._low = 0
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._inbox = bus.nc.new_inbox()
        self._subscription: Subscription | None = None
        self._epoch = bus.epoch
        self._heard_at = 0.0
        self._not_before = 0.0

    async def open(self) -> None:
        """Starts listening; nothing comes until it is asked for."""
        self._subscription = await self._bus.listen(self._inbox, self._receive)

    async def close(self) -> None:
        """Stops listening, once what is on its way has arrived: what is dropped would come back after AckWait only."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await self._bus.stop_listening(subscription)

    @property
    def fitting(self) -> int:
        """How many messages of the size of the last ones may be under way at once."""
        return max(_LEAST, int(self.most_bytes / self._mean_bytes))

    def room(self, wanted: int) -> int:
        """How many more to ask for so that `wanted` are under way. Forgets requests that the broker has lost."""
        now = time.monotonic()
        if self._epoch != self._bus.epoch or (self.outstanding and now - self._heard_at > 2 * HEARTBEAT_S):
            self._epoch = self._bus.epoch
            self.outstanding = 0
        if self.gone or now < self._not_before or not self._bus.connected:
            return 0
        return max(0, wanted - self.outstanding)

    async def ask(self, count: int) -> None:
        """Requests `count` more messages."""
        self.outstanding += count
        self._low = self.outstanding // 2
        self._heard_at = time.monotonic()
        body = {"batch": count, "expires": int(EXPIRES_S * 1e9), "idle_heartbeat": int(HEARTBEAT_S * 1e9)}
        self._bus.send(self._subject, msgspec.json.encode(body), reply=self._inbox)

    def _receive(self, message: Message) -> None:
        self._heard_at = time.monotonic()
        if not message.body and "Status" in message.headers:
            self._status(message.headers)
            return
        self.outstanding = max(0, self.outstanding - 1)
        self._mean_bytes += _SMOOTHING * (len(message.body) + _BESIDE_BYTES - self._mean_bytes)
        self._on_message(message)
        if self.outstanding in (self._low, 0):
            self._on_low()

    def _status(self, headers: dict[str, Any]) -> None:
        status, description = headers["Status"], headers.get("Description", "").lower()
        if status == "100":
            return
        unserved = headers.get("Nats-Pending-Messages")
        self.outstanding = max(0, self.outstanding - int(unserved)) if unserved is not None else 0
        if status in ("408", "404"):
            return
        if "deleted" in description:
            self.gone = True
            return
        # 409 (leader change, shutdown, too many waiting) and 503 (not ready yet): ask again a little later.
        self._not_before = time.monotonic() + _BACKOFF_S
