"""What the hop benchmark measures, twice: as a workflow of matrix-bus and as a bare nats-py loop, the floor.

The workload is that of the reference's own overhead test, coral without a model: solver → extractor → matcher,
then reviewer → extractor → matcher, and so on in turns until the two agree. Every agent answers at once with
1 024 ± 20 % characters. A matcher ends the row after 2, 3 or 4 turns with odds of 3 : 6 : 1, so agreement comes
around turn 3 and a row makes 3 x 2.8 = 8.4 hops on average. Turns and lengths follow from the row's seed.

Run as a program this module is the floor: it sends, from one process, every message that the submitter and the
worker send for these rows, in the same order per row and of the same sizes, and does nothing else. What is awaited
elsewhere is a callback here, so that no message costs a task. Heartbeats are left out: no hop lives long enough.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Raw, Struct

from matrix_bus import Next, Outcome, Row, State, Workflow, success, to
from matrix_bus.orchestrator import RowMessage, admit, advance, encode, finish, row_seed

RUN_SEED = 0
LENGTH, SPREAD = 1024, 0.2
CYCLE = ("solver", "extractor", "matcher", "reviewer", "extractor", "matcher")
_TEXT = "The option fits the premises, since each step follows from the one before and no other does. " * 16
_SUBMIT_WINDOW = 1024
"""As the submitter's: rows published and not confirmed yet."""


class Debate(State):
    """The question, and what was said so far."""

    question: str
    said: list[str] = msgspec.field(default_factory=list)


def hops_of(seed: int) -> int:
    """How many hops the row with this seed makes."""
    draw = seed % 10
    return 3 * (2 if draw < 3 else 3 if draw < 9 else 4)


def answer(seed: int, hop: int) -> str:
    """What the agent at this hop says: uniform in 1 024 ± 20 % characters."""
    low, high = int(LENGTH * (1 - SPREAD)), int(LENGTH * (1 + SPREAD))
    return _TEXT[: low + (seed + hop * 2_654_435_761) % (high - low + 1)]


def line(n: int) -> bytes:
    """A line of the dataset: a question of 256 to 767 characters."""
    return msgspec.json.encode({"id": f"q{n}", "question": _TEXT[: 256 + n * 7919 % 512]})


flow = Workflow("coral_bare", state=Debate, start="solver")


def _say(row: Row[Debate]) -> None:
    row.state.said.append(answer(row.seed, row.hop))


@flow.role
async def solver(row: Row[Debate]) -> Next | Outcome:
    _say(row)
    return to("extractor")


@flow.role
async def extractor(row: Row[Debate]) -> Next | Outcome:
    _say(row)
    return to("matcher")


@flow.role
async def matcher(row: Row[Debate]) -> Next | Outcome:
    _say(row)
    if row.hop >= hops_of(row.seed):
        return success()
    return to("solver") if row.hop % 6 == 0 else to("reviewer")


@flow.role
async def reviewer(row: Row[Debate]) -> Next | Outcome:
    _say(row)
    return to("extractor")


def sizes(run: str, n: int) -> list[int]:
    """Bytes of the bodies that row `n` sends: the row, its hops, its outcome."""
    now = time.time()
    body = line(n)
    seed = row_seed(RUN_SEED, n, 0)
    row = RowMessage(input=Raw(body), id=f"q{n}", seed=seed, submitted_at=now)
    state = flow.begin(body)
    message = admit(row, run, n, flow.start, msgspec.json.encode(state), now)
    found = [len(encode(row)), len(encode(message))]
    for hop in range(1, hops_of(seed) + 1):
        state.said.append(answer(seed, hop))
        message.state = msgspec.json.encode(state)
        message.calls, message.handler_s = hop, now
        if hop < hops_of(seed):
            message = advance(message, CYCLE[hop % len(CYCLE)])
            found.append(len(encode(message)))
    found.append(len(encode(finish(message, flow.name, 1, "success", "", now))))
    return found


class _Error(Struct):
    err_code: int = 0
    description: str = ""


class _Answer(Struct):
    """What a publish is answered with."""

    error: _Error | None = None


_answer = msgspec.json.Decoder(_Answer)
_EXPECT = "Nats-Expected-Last-Subject-Sequence"
_NEVER = str((1 << 63) - 1)
Then = Callable[..., Awaitable[None]]


class Floor:
    """The rows' messages over one connection, driven by what arrives."""

    def __init__(self, client: Any, run: str, rows: int, in_flight: int) -> None:
        self.hops = 0
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._nc = client
        self._run = run
        self._in_flight = in_flight
        self._left = rows
        self._sizes = [sizes(run, n) for n in range(rows)]
        self._filler = b"x" * max(map(max, self._sizes))
        self._inbox = client.new_inbox() + "."
        self._tokens = itertools.count()
        self._waiting: dict[str, tuple[Then, tuple[Any, ...]]] = {}
        self._unconfirmed = asyncio.Semaphore(_SUBMIT_WINDOW)

    async def open(self) -> None:
        """Listens for replies and asks for rows and hops."""
        unlimited = {"pending_msgs_limit": 0, "pending_bytes_limit": 0}
        await self._nc.subscribe(self._inbox + "*", cb=self._on_reply, **unlimited)
        for consumer in ("_", *flow.roles):
            await self._lane(consumer, self._row if consumer == "_" else self._hop, unlimited)

    async def submit(self) -> None:
        """Publishes all rows, so many unconfirmed at a time."""
        run = self._run
        for n, found in enumerate(self._sizes):
            await self._unconfirmed.acquire()
            headers = self._fenced(0, n)
            await self._call(f"q.{run}._.{n}.0", self._filler[: found[0]], headers, self._accepted)
            if n % 64 == 0:
                await asyncio.sleep(0)

    async def _lane(self, consumer: str, then: Then, limits: dict[str, int]) -> None:
        """One inbox for a consumer, with the next request sent while the one before is still being served."""
        subject = f"$JS.API.CONSUMER.MSG.NEXT.W_{self._run}.{consumer}"
        inbox = self._nc.new_inbox()
        outstanding = 0

        async def ask() -> None:
            nonlocal outstanding
            count = self._in_flight - outstanding
            outstanding += count
            body = {"batch": count, "expires": 30_000_000_000, "idle_heartbeat": 5_000_000_000}
            await self._nc.publish(subject, msgspec.json.encode(body), inbox)

        async def receive(message: Any) -> None:
            nonlocal outstanding
            if message.reply:
                outstanding -= 1
                await then(message)
            elif message.headers and (unserved := message.headers.get("Nats-Pending-Messages")):
                outstanding -= int(unserved)
            if outstanding * 2 <= self._in_flight:
                await ask()

        await self._nc.subscribe(inbox, cb=receive, **limits)
        await ask()

    async def _call(self, subject: str, body: bytes, headers: dict[str, str] | None, then: Then, *values: Any) -> None:
        token = str(next(self._tokens))
        self._waiting[token] = (then, values)
        await self._nc.publish(subject, body, self._inbox + token, headers)

    async def _on_reply(self, message: Any) -> None:
        then, values = self._waiting.pop(message.subject[len(self._inbox) :])
        await then(message, *values)

    def _fenced(self, seq: int, n: int) -> dict[str, str]:
        return {
            _EXPECT: str(seq),
            f"{_EXPECT}-Subject": f"q.{self._run}.*.{n}.*",
        }

    async def _accepted(self, reply: Any) -> None:
        _stored(reply)
        self._unconfirmed.release()

    async def _row(self, message: Any) -> None:
        n = int(message.subject.split(".")[3])
        await self._call(f"out.{self._run}.{n}.0", b"", {_EXPECT: _NEVER}, self._admitted, n, message.reply)

    async def _admitted(self, reply: Any, n: int, lease: str) -> None:
        assert _refused_with(reply) == 0
        await self._move(n, 1, _sequence(lease), lease, "")

    async def _move(self, n: int, hop: int, seq: int, lease: str, ack: str) -> None:
        headers = self._fenced(seq, n)
        headers["Mb-Lease"] = lease
        subject = f"q.{self._run}.{CYCLE[(hop - 1) % len(CYCLE)]}.{n}.{hop}"
        await self._call(subject, self._filler[: self._sizes[n][hop]], headers, self._moved, ack)

    async def _moved(self, reply: Any, ack: str) -> None:
        _stored(reply)
        if ack:
            await self._nc.publish(ack, b"+ACK")

    async def _hop(self, message: Any) -> None:
        self.hops += 1
        _, _, _, n_, hop_ = message.subject.split(".")
        n, hop = int(n_), int(hop_)
        lease, ack = message.headers["Mb-Lease"], message.reply
        if hop < len(self._sizes[n]) - 2:
            await self._move(n, hop + 1, _sequence(ack), lease, ack)
            return
        probe = {_EXPECT: _NEVER, f"{_EXPECT}-Subject": f"q.{self._run}.*.{n}.*"}
        await self._call(f"q.{self._run}._.{n}.0", b"", probe, self._looked_up, n, lease, ack)

    async def _looked_up(self, reply: Any, n: int, lease: str, ack: str) -> None:
        assert _refused_with(reply) == _sequence(ack)
        headers = {_EXPECT: "0"}
        body = self._filler[: self._sizes[n][-1]]
        await self._call(f"out.{self._run}.{n}.0", body, headers, self._ended, lease, ack)

    async def _ended(self, reply: Any, lease: str, ack: str) -> None:
        _stored(reply)
        await self._call(lease, b"+ACK", None, self._freed, ack)

    async def _freed(self, _: Any, ack: str) -> None:
        await self._nc.publish(ack, b"+ACK")
        self._left -= 1
        if self._left == 0:
            self.finished.set_result(None)


def _stored(reply: Any) -> None:
    error = _answer.decode(reply.data).error
    assert error is None, error


def _refused_with(reply: Any) -> int:
    """The sequence that a publish which had to be refused was told."""
    error = _answer.decode(reply.data).error
    assert error is not None, "a probe was stored"
    return int(error.description.rpartition(" ")[2])


def _sequence(ack: str) -> int:
    return int(ack.split(".")[-4])


async def _floor(url: str, run: str, rows: int, in_flight: int) -> None:
    """Says "ready", waits for a line, sends everything, and prints what it counted as JSON."""
    import nats

    async def on_error(error: Exception) -> None:
        if not floor.finished.done():
            floor.finished.set_exception(error)

    client = await nats.connect(url, error_cb=on_error, pending_size=16 << 20, skip_subject_validation=True)
    floor = Floor(client, run, rows, in_flight)
    await floor.open()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    started, cpu_s = time.time(), time.process_time()
    await asyncio.gather(floor.submit(), floor.finished)
    await client.flush()
    counted = {"started": started, "cpu_s": time.process_time() - cpu_s, "hops": floor.hops}
    await client.close()
    print(msgspec.json.encode(counted).decode(), flush=True)


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_floor(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
