"""One run in one worker process: its lanes, what it holds, and the one place where each delivery is settled."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

import msgspec

from .. import metrics, telemetry
from ..agent import Next, Workflow, encode_state
from ..answers import Answers
from ..bus import Bus, Message, delivery_facts
from ..errors import BusError, BusUnavailable, LimitReached, RowError, WorkerCrashed, is_transient
from ..orchestrator import (
    LEASE_ROLE,
    Kind,
    Orchestrator,
    RowMessage,
    admit,
    advance,
    decode,
    decode_row,
    encode,
    finish,
    hop_subject,
    retry,
    row_in,
    work_stream,
)
from ..payload import Payloads
from ..registry import RunRecord
from . import limits
from .deadlines import Deadlines
from .delivery import Delivery
from .failure import backoff_s, describe, reason_of, say_defect
from .handlers import Caller, Executors
from .heartbeat import Wheel
from .horizon import Horizon
from .lanes import Lanes
from .moves import Moves
from .offload import Offload
from .ownership import Ownership
from .pulling import Pool, Pump, Share
from .served import Resolve, Served
from .suspects import Suspects

_GIVE_BACK_S = 2.0

log = telemetry.logger("worker")


class Session:
    """Serves some roles of one run, and admits its rows, until it is closed."""

    def __init__(
        self,
        bus: Bus,
        record: RunRecord,
        flow: Workflow[Any],
        pools: Mapping[str, Pool],
        pump: Pump,
        executors: Executors,
        resolve: Resolve,
        available: Mapping[Any, Any],
        beside: contextlib.AsyncExitStack,
    ) -> None:
        """`available` are config and resources for the handlers; `beside` is closed with the session, after it."""
        self.record = record
        self.flow = flow
        self.touched_at = time.monotonic()
        """When something last arrived."""
        self._bus = bus
        self._lanes = Lanes(bus, record.id, pools, record.weight, pump, self._receive)
        self._pump = pump
        self._offload = Offload(bus, Payloads(bus, record.id), flow, record.config.io.offload_above_bytes)
        self._stop_rule = limits.StopRule(bus, record.id, record.config.limits)
        self._held: dict[int, Delivery] = {}
        """By stream sequence."""
        self._deadlines = Deadlines(self._held)
        self._wheel = Wheel(bus, record.config.ack_wait_s, self._was_stopped)
        self._horizon = Horizon(bus, work_stream(record.id), self._wheel, self._held)
        self._moves = Moves(bus, record.id, self._horizon.doubts)
        self._travelling: set[int] = set()
        """Rows of which a hop is held."""
        self._ownership = Ownership(bus, record.id, self._moves, self._held)
        self._aside: set[asyncio.Task[None]] = set()
        """What runs beside the deliveries, each of which has a task of its own."""
        self._closing = self._paused = False
        self._suspects = Suspects(self._moves)
        self._loop = asyncio.get_running_loop()
        self._stack = beside
        kind = record.config.llm.cache
        cache = None if kind == "off" else Answers(bus, record.id if kind == "run" else "")
        self._served = {
            name: Served(
                record,
                flow,
                name,
                Caller(flow, flow.roles[name], available, executors, record.config.trials, self._offload.store),
                self._deadlines,
                resolve,
                cache,
            )
            for name in pools
            if name != LEASE_ROLE
        }

    async def open(self) -> None:
        """Starts to admit and to serve. Raises `BusError`."""
        await self._horizon.note()
        self._stack.callback(self._bus.on_reconnect(self._reconnected))
        self._stack.push_async_callback(await self._ownership.listen())
        for beside in (self._wheel.turn(), self._deadlines.watch()):
            self._stack.callback(self._loop.create_task(beside, name=f"beside {self.record.id}").cancel)
        await self._lanes.open()

    @property
    def roles(self) -> list[str]:
        """What is served of the run, the admission of its rows included."""
        return self._lanes.roles

    @property
    def holds(self) -> int:
        """Deliveries that are not settled yet."""
        return len(self._held)

    @property
    def gone(self) -> bool:
        """True if the run's stream was deleted under us."""
        return self._lanes.gone

    async def follow(self, record: RunRecord, pools: Mapping[str, Pool]) -> None:
        """Takes over what was changed of the run. Paused, it starts nothing more; handlers at work go on."""
        self._lanes.arrange(pools, record.weight)
        self._paused = record.state == "paused"
        if self._paused and self._lanes.is_open:
            await self._lanes.close()
        elif not (self._paused or self._closing or self._lanes.is_open):
            await self._lanes.open()
        self.record = record

    async def close(self, grace_s: float) -> None:
        """Stops pulling at once, lets handlers finish for up to `grace_s`, hands the rest back at no cost."""
        self._closing = True
        await self._lanes.close()  # what is on its way still arrives, and is handed back in _settle
        await asyncio.sleep(0)  # a task that is cancelled before its first step hands nothing back
        if (tasks := self._at_work()) and grace_s > 0:
            await asyncio.wait(tasks, timeout=grace_s)
        tasks = self._at_work()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stack.aclose()

    def _at_work(self) -> list[asyncio.Task[None]]:
        return [*self._aside, *(delivery.task for delivery in self._held.values())]

    def _set_aside(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    # --- arriving -----------------------------------------------------------------------------------------------

    def _receive(self, share: Share, message: Message) -> None:
        now = self.touched_at = share.heard_at = time.monotonic()
        if share.role == LEASE_ROLE and self._is_here(message):
            self._moves.put_aside(message.reply)
            self._pump.touch(share.pool)
            return
        delivery = Delivery(message, self._horizon.end(now), now)
        if (held := self._held.get(delivery.seq)) is not None:
            held.ack_subject = delivery.ack_subject
            held.beat_at = now
            return
        delivery.share = share
        work = self._admit
        if share.role != LEASE_ROLE:
            self._travelling.add(delivery.n)
            work = self._hop
        self._held[delivery.seq] = delivery
        # Now, not when its task begins: the pump may count free slots in between.
        share.take()
        delivery.task = self._loop.create_task(self._settle(delivery, work))

    def _is_here(self, message: Message) -> bool:
        """Whether it is a lease that has come again, of a row of which a hop is held: nothing has to be looked up."""
        deliveries, _ = delivery_facts(message.reply)
        return deliveries > 1 and row_in(message.subject) in self._travelling

    async def _settle(self, delivery: Delivery, work: Callable[[Delivery], Any]) -> None:
        """Every delivery ends here: settled by `work`, or handed back."""
        role, share = delivery.role, delivery.share
        if role != LEASE_ROLE:  # an expired lease costs one refused publish, a heartbeat for each would cost more
            self._wheel.add(delivery)
        telemetry.current_hop.set((self.record.id, delivery.n, delivery.hop, role))
        try:
            if self._closing or self._paused:
                await self._hand_back(delivery)
            else:
                await work(delivery)
        except (asyncio.CancelledError, BusUnavailable):  # unavailable: the connection was closed for good
            await self._hand_back(delivery)
        except Exception:
            # A defect of ours, or a broker that refuses for good: the row stays in the queue and comes again.
            log.exception("worker.settling_failed")
        finally:
            self._wheel.remove(delivery)
            del self._held[delivery.seq]
            if role != LEASE_ROLE:
                self._travelling.discard(delivery.n)
            share.free()
            self._pump.touch(share.pool)

    async def _hand_back(self, delivery: Delivery) -> None:
        self._wheel.remove(delivery)
        # After AckWait the message may be with another worker, and a NAK would take it from there.
        wait_s = self.record.config.ack_wait_s
        if time.monotonic() - delivery.beat_at < wait_s and self._bus.connected:
            with contextlib.suppress(BusError, TimeoutError):
                # Given back as new where one delivery more would make it suspect: shutting down costs nothing.
                if delivery.running and (delivery.deliveries > 1 or delivery.noted):
                    async with asyncio.timeout(_GIVE_BACK_S):
                        await self._moves.again(delivery, delivery.noted)
                else:
                    self._bus.nak(delivery.ack_subject)

    # --- rows ---------------------------------------------------------------------------------------------------

    async def _admit(self, delivery: Delivery) -> None:
        """A row message: sets the row off, and keeps its lease until an outcome exists."""
        try:
            row = decode_row(delivery.body)
        except RowError as error:
            await self._bury(delivery, error)
            return
        if await self._moves.has_outcome(delivery.n, row.generation):
            await self._moves.free(delivery, "")
            return
        now = time.time()
        start = self.flow.start
        message = admit(row, self.record.id, delivery.n, start, b"", now)
        try:
            message.state = encode_state(self.flow.begin(await self._offload.line(row)))
            body = encode(message)
            if not self._offload.fits(body):
                body = await self._offload.pack(message)
        except RowError as error:
            message.hop = 0
            await self._fail(delivery, message, error, "")
            return
        if await self._moves.move(delivery, message, body, delivery.ack_subject):
            metrics.ADMITTED.labels(self.flow.name).inc()
            self._moves.put_aside(delivery.ack_subject)
        else:  # set off by somebody else: it may have ended without its lease, so it is asked about soon, then seldom
            wait_s = self.record.config.ack_wait_s * 2.0 ** min(delivery.deliveries - 1, 10)
            self._moves.put_aside(delivery.ack_subject, wait_s)

    # --- hops ---------------------------------------------------------------------------------------------------

    async def _hop(self, delivery: Delivery) -> None:
        """A hop message: the handler's turn."""
        try:
            message = decode(delivery.body)
        except RowError as error:
            await self._bury(delivery, error)
            return
        delivery.forget_body()
        lease = delivery.lease
        if delivery.old and not await self._ownership.needs_handler(delivery, message.generation, lease):
            return
        if delivery.suspect:
            await self._after_crashes(delivery, message, lease)
            return
        served = self._served[delivery.role]
        if message.not_before:
            await self._wait_until(message.not_before, delivery.share)
            if self._paused:
                await self._hand_back(delivery)
                return
        try:
            limits.check(message, self.record.config.limits, time.time())
            if self._offload.is_packed(message, role := self.flow.roles[delivery.role]):
                await self._offload.unpack(message, role)
        except (RowError, LimitReached) as error:
            await self._fail(delivery, message, error, lease)
            return
        result, message.state = await served.handle(delivery, message)
        # Still the owner while publishing: the answer is here, nobody else should work for it.
        if isinstance(result, Exception):
            await self._after_error(delivery, message, result, lease)
        elif isinstance(result, Next):
            await self._forward(delivery, message, advance(message, result.role), lease, "advance")
        else:
            await self._finish(delivery, message, result.kind, result.reason, lease)

    async def _after_crashes(self, delivery: Delivery, message: Orchestrator, lease: str) -> None:
        """Two workers died with the hop in them, or more: that is noted where it lasts before it is executed again."""
        if delivery.crashes >= self.record.config.limits.crashes:
            error = WorkerCrashed(
                f"{delivery.crashes} workers died while they executed this hop of role {message.role!r}: does its "
                "handler use up the memory, or crash the interpreter?"
            )
            await self._fail(delivery, message, error, lease)
            return
        with self._without_slot(delivery.share):
            await self._suspects.send_on(delivery)

    async def _forward(
        self, delivery: Delivery, message: Orchestrator, following: Orchestrator, lease: str, how: str
    ) -> None:
        """Moves the row on, be it to the next role or to the same one again; a row that cannot travel fails."""
        try:
            body = encode(following)
            if not self._offload.fits(body):
                body = await self._offload.pack(following)
            await self._moves.move(delivery, following, body, lease)
        except RowError as error:
            await self._fail(delivery, message, error, lease)
            return
        self._moves.ack(delivery)
        self._served[delivery.role].stats.settled[how] += 1

    async def _after_error(self, delivery: Delivery, message: Orchestrator, error: Exception, lease: str) -> None:
        now = time.time()
        not_before = now + backoff_s(message.attempt, error)
        most_attempts = self._served[message.role].max_attempts
        if is_transient(error) and not limits.seconds_left(message, self.record.config.limits, not_before):
            message.errors = [*message.errors, describe(error, message, now)]
            error = LimitReached(f"limits.row_s={self.record.config.limits.row_s:g} leaves no time for another attempt")
            await self._fail(delivery, message, error, lease)
        elif not is_transient(error) or message.attempt >= most_attempts:
            await self._fail(delivery, message, error, lease)
        else:
            log.info("worker.retry", attempt=message.attempt, error=str(error))
            again = retry(message, describe(error, message, now), not_before)
            await self._forward(delivery, message, again, lease, "retry")

    async def _fail(self, delivery: Delivery, message: Orchestrator, error: Exception, lease: str) -> None:
        message.errors = [*message.errors, describe(error, message, time.time())]
        say_defect(error)
        await self._finish(delivery, message, "failed", reason_of(error), lease)

    async def _finish(self, delivery: Delivery, message: Orchestrator, kind: Kind, reason: str, lease: str) -> None:
        now, trials = time.time(), self.record.config.trials
        body = await self._offload.pack_outcome(
            message, lambda: finish(message, self.flow.name, trials, kind, reason, now)
        )
        if await self._moves.outcome(delivery, message.generation, body, lease):
            metrics.OUTCOMES.labels(self.flow.name, kind).inc()
            if self._stop_rule.suspects(kind == "failed"):
                self._set_aside(self._stop_rule.check())
        if delivery.role != LEASE_ROLE:
            self._served[delivery.role].stats.settled["outcome"] += 1

    async def _bury(self, delivery: Delivery, error: RowError) -> None:
        """Bytes that nobody can read: kept for a person to see, and the row ends as failed."""
        subject = hop_subject(self.record.id, delivery.role, delivery.n, delivery.hop)
        await self._moves.dead_letter(delivery, subject, str(error))
        row = await self._moves.row(delivery.n) or RowMessage(
            input=msgspec.Raw(b"null"), id=str(delivery.n), seed=0, submitted_at=0.0, generation=delivery.generation
        )
        message = admit(row, self.record.id, delivery.n, delivery.role, b"", time.time())
        message.hop = delivery.hop
        await self._fail(delivery, message, error, delivery.lease)

    async def _wait_until(self, not_before: float, share: Share) -> None:
        """A retry waits for its time under heartbeat, and without a slot."""
        delay = not_before - time.time()
        if delay > 0:
            with self._without_slot(share):
                await asyncio.sleep(delay)

    @contextlib.contextmanager
    def _without_slot(self, share: Share) -> Iterator[None]:
        share.free()
        self._pump.touch(share.pool)
        try:
            yield
        finally:
            share.take()

    # --- after an outage ------------------------------------------------------------------------------------------

    async def _reconnected(self) -> None:
        """A restarted broker forgets delivery counts: all that is in the queue now may have been handled before."""
        await self._horizon.note()
        self._pump.touch_all()

    def _was_stopped(self) -> None:
        """What waited for us in the socket meanwhile may have been given to others, and handled, in the first place."""
        self._horizon.forget()
        self._set_aside(self._horizon.note())
