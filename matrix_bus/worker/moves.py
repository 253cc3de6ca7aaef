"""The moves of the protocol: publishes and acks in the one order in which a crash between any two is harmless.

A hop is published fenced on its predecessor being the row's last message, so of any number of executions of a hop
exactly one moves the row on. An outcome is published where the server allows one message per subject for ever. An
ack is sent only after what makes the message unnecessary is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..bus import FIRST_WAIT_S, Bus, Headers, fence, fence_lines, is_lost_race, note_refusal, patiently, pause
from ..errors import BusError, BusTimeout, BusUnavailable, PublishRefused, RowError
from ..metrics import DEAD_LETTERS
from ..orchestrator import (
    HEADER_CRASHES,
    HEADER_GENERATION,
    HEADER_LEASE,
    Orchestrator,
    RowMessage,
    decode_row,
    family,
    hop_subject,
    outcome_subject,
    row_subject,
    work_stream,
)
from ..telemetry import logger
from .delivery import Delivery

_LEASE_TRIES = 5
_ASIDE_S = 300.0
"""How long a row that travels keeps its lease before somebody looks whether its end was missed."""

log = logger("worker")


class Moves:
    """The protocol for one run. Every method returns only when its last step is sent or somebody else did it."""

    def __init__(self, bus: Bus, run: str, doubts: Callable[[Delivery], bool] = lambda _: False) -> None:
        """`doubts` says of a delivery whether others may have been given it meanwhile."""
        self._bus = bus
        self._doubts = doubts
        self._run = run
        self._work = work_stream(run)

    async def is_last(self, delivery: Delivery) -> bool:
        """True if the delivery is the newest message of its row: nobody has moved the row on.

        False only where that is proven, by a newer message or an outcome, since what follows from it is an ack. A
        broker that does not even know the delivered message yet is asked again.
        """
        while True:
            newest = await self.newest_of(delivery.n)
            if newest >= delivery.seq:
                return newest == delivery.seq
            if await self.has_outcome(delivery.n, delivery.generation):
                return False
            await pause(self._bus)

    async def newest_of(self, n: int) -> int:
        """Sequence of the row's newest message in the work stream, 0 if it has none."""
        return await patiently(self._bus, lambda: self._bus.last_of(row_subject(self._run, n), family(self._run, n)))

    async def has_outcome(self, n: int, generation: int) -> bool:
        subject = outcome_subject(self._run, n, generation)
        return await patiently(self._bus, lambda: self._bus.last_of(subject)) != 0

    async def row(self, n: int) -> RowMessage | None:
        """The row as submitted, while it has no outcome; None if it cannot be read."""
        stored = await patiently(self._bus, lambda: self._bus.last(self._work, row_subject(self._run, n)))
        try:
            return decode_row(stored.data) if stored is not None else None
        except RowError:
            return None

    async def is_current(self, delivery: Delivery, generation: int) -> bool:
        """True if nobody has moved the row on from the delivery, be it to its end.

        Being its newest message is not enough: when a row has ended, all that came after this one is gone again.
        """
        return await self.is_last(delivery) and not await self.has_outcome(delivery.n, generation)

    async def move(self, delivery: Delivery, message: Orchestrator, body: bytes, lease: str) -> bool:
        """Publishes the row's next message. True if it is stored, False if somebody else had moved the row on.

        Raises `RowError` if the broker will never take it.
        """
        if self._doubts(delivery) and not await self.is_current(delivery, message.generation):
            return False
        subject = hop_subject(self._run, message.role, message.n, message.hop)
        headers = fence_lines(delivery.seq, family(self._run, message.n)) + f"{HEADER_LEASE}: {lease}\r\n"
        if message.generation:
            headers += f"{HEADER_GENERATION}: {message.generation}\r\n"
        headers += self._bus.id_line(self._run, message.n, message.generation, message.hop, message.attempt)
        try:
            await self._bus.publish(subject, body, headers)
        except (PublishRefused, BusTimeout, BusUnavailable) as error:
            try:
                return await self._insist(delivery, message.generation, subject, body, headers, error) != 0
            except PublishRefused as refused:
                raise RowError(f"the broker does not take the row's next message: {refused}") from None
        return True

    async def again(self, delivery: Delivery, crashes: int) -> int:
        """Publishes the hop itself once more, as if it had never been delivered, and acks this delivery.

        Returns the sequence of the new message, 0 if somebody else had moved the row on.

        The new message counts its deliveries from one; `crashes` goes on counting those that ended with a worker.
        """
        if self._doubts(delivery) and not await self.is_current(delivery, delivery.generation):
            self.ack(delivery)
            return 0
        subject = hop_subject(self._run, delivery.role, delivery.n, delivery.hop)
        place = (delivery.n, delivery.generation, delivery.hop, "after", delivery.seq)
        headers = {
            **self._bus.named(fence(delivery.seq, family(self._run, delivery.n)), self._run, *place),
            HEADER_LEASE: delivery.lease,
            HEADER_CRASHES: str(crashes),
            HEADER_GENERATION: str(delivery.generation),
        }
        try:
            sequence = (await self._bus.publish(subject, delivery.data, headers)).seq
        except (PublishRefused, BusTimeout, BusUnavailable) as error:
            sequence = await self._insist(delivery, delivery.generation, subject, delivery.data, headers, error)
        self.ack(delivery)
        return sequence

    async def _insist(
        self,
        delivery: Delivery,
        generation: int,
        subject: str,
        body: bytes,
        headers: Headers,
        error: PublishRefused | BusTimeout | BusUnavailable,
    ) -> int:
        """Publishes again what follows the delivery, fenced on it, after a first try has met with `error`.

        Returns its sequence, or 0 if the row has moved on. Raises `PublishRefused` if the broker will never take it.
        """
        wait_s = FIRST_WAIT_S
        while True:
            if isinstance(error, PublishRefused) and not is_lost_race(error):
                note_refusal(self._bus, error)
            # What was not confirmed may be stored, and the row may have ended since. Then its newer messages are gone,
            # the delivery is its newest one once more, and the fence would let the same bytes pass a second time.
            if not await self.is_current(delivery, generation):
                return 0
            try:
                return (await self._bus.publish(subject, body, headers)).seq
            except (PublishRefused, BusTimeout, BusUnavailable) as another:
                error = another
            wait_s = await pause(self._bus, wait_s)

    async def outcome(self, delivery: Delivery, generation: int, body: bytes, lease: str) -> bool:
        """Publishes the outcome, then frees the row's lease, then the hop. False if the row had moved on.

        `lease` is empty where the delivery is itself the row message.
        """
        if not await self.is_last(delivery):
            self._bus.ack(delivery.ack_subject)
            return False
        subject = outcome_subject(self._run, delivery.n, generation)
        headers = self._bus.named(fence(0), self._run, delivery.n, generation, -1)
        wait_s = FIRST_WAIT_S
        stored = False
        while not stored:
            try:
                await self._bus.publish(subject, body, headers)
                stored = True
            except PublishRefused as error:
                # A full store refuses a first outcome and a taken subject a second one with codes that overlap.
                if await self.has_outcome(delivery.n, generation):
                    break
                if not is_lost_race(error):
                    note_refusal(self._bus, error)
            except (BusTimeout, BusUnavailable):
                pass
            if not stored:
                wait_s = await pause(self._bus, wait_s)
        await self.free(delivery, lease)
        return stored

    def put_aside(self, lease: str, seconds: float = math.inf) -> None:
        """Keeps the row's lease, and has it come again later, after five minutes at most: the row travels.

        Until then AckWait runs, which is short, so that a row comes back soon whose worker dies before setting it off.
        """
        self._bus.put_aside(lease, min(seconds, _ASIDE_S))

    async def free(self, delivery: Delivery, lease: str) -> None:
        """Acks the row's lease and then the delivery, because an outcome exists.

        The hop must not go before the row message: an admission that has looked for the outcome a moment too early
        would find the row message to be the row's last one, and set the row off once more.
        """
        if await self._end_lease(lease or delivery.ack_subject, delivery.n) and lease:
            self._bus.ack(delivery.ack_subject)

    async def _end_lease(self, ack_subject: str, n: int) -> bool:
        """True once the row message is gone; False if the broker has forgotten the lease: it delivers the row again."""
        subject = row_subject(self._run, n)
        for _ in range(_LEASE_TRIES):
            try:
                await self._bus.ack_confirmed(ack_subject)
            except BusError:
                await self._bus.wait_connected()
                if not await patiently(self._bus, lambda: self._bus.last_of(subject)):
                    return True
            else:
                return True
        log.info("worker.lease_unconfirmed", ack_subject=ack_subject)
        return False

    def ack(self, delivery: Delivery) -> None:
        """Acks a hop after the row has moved on. If the ack is lost, the hop comes again and is found to be old."""
        self._bus.ack(delivery.ack_subject)

    async def dead_letter(self, delivery: Delivery, subject: str, reason: str) -> None:
        """Stores unreadable bytes, with the reason, where a person can look at them."""
        DEAD_LETTERS.inc()
        body = delivery.data
        if (size := len(body)) > self._bus.max_body:
            body, reason = body[: self._bus.max_body], f"(cut, it had {size} bytes) {reason}"
        headers = {
            "Nats-Msg-Id": f"dead:{self._run}:{delivery.seq}",
            "Mb-Reason": reason.replace("\n", " ")[:500],
            "Mb-Subject": subject,
        }
        await patiently(self._bus, lambda: self._bus.publish(f"dead.{self._run}.{delivery.n}", body, headers))
