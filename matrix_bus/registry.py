"""The runs on a bus: their records in a key-value bucket, their streams and their consumers.

Submitters and workers never meet; this is where the one leaves what the other needs. Workers only read here and
bind to what exists: they need no right to create anything.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from . import answers, catalog, payload, quota
from .bus import STREAM_NOT_FOUND, Bus, Stored, create_bucket, create_stream, fence, is_lost_race, patiently
from .config import RunConfig
from .errors import BusError, ConfigError, PublishRefused, RunError
from .orchestrator import LEASE_ROLE, SCHEMA, is_token, outcome_stream, outcome_subjects, work_stream, work_subjects
from .telemetry import logger

if TYPE_CHECKING:
    from nats.aio.msg import Msg

BUCKET = "mb_runs"
_KEYS = f"KV_{BUCKET}"
DEAD = "mb_dead"
"""Stream of messages that nobody could read, with the reason in a header."""

_RELIST_S = 2.0
_NS = 1_000_000_000

log = logger("registry")

RunState = Literal["active", "paused", "cancelled", "deleted"]


class Changed(Struct, kw_only=True, omit_defaults=True):
    """What was changed of a run's settings while it goes on; what is not set is as submitted."""

    max_in_flight: int | None = None
    slots: dict[str, int] = {}
    """By role."""
    weight: float | None = None


class RunRecord(Struct, kw_only=True):
    """What is known of a run beside its messages; the value of its key, as JSON."""

    id: str
    state: RunState = "active"
    workflow: str
    code_hash: str
    roles: list[str]
    start: str
    config: RunConfig
    dataset: str = ""
    """Where the rows came from, for people."""
    created_at: float = 0.0
    total: int | None = None
    """Rows of the run, once it is sealed; before that None."""
    versions: dict[str, str] = {}
    total_before: int | None = None
    """The total that it had before it was opened again, for more lines or for failed rows."""
    lines: int = 0
    """Lines of the dataset that are in the run for sure: what is added behind them can still be submitted."""
    shards: int = 1
    """Parts that the dataset is submitted in, each by a submitter of its own."""
    sealed: dict[int, tuple[int, int]] = {}
    """By number from 1, of the shards that are submitted: (rows, lines); until the last of them is."""
    retried: int = 0
    """How many times failed rows were sent again: outcomes outnumber rows then."""
    retrying: bool | None = None
    """Why it is open again: failed rows are sent, or lines are added. None where neither, or where nobody noted it."""
    why: str = ""
    """Why it is paused."""
    watch_from: int = 0
    """The stop rule looks at outcomes after this one, by the sequence of the outcome stream."""
    changed: Changed = msgspec.field(default_factory=Changed)
    schema: int = SCHEMA
    """Of the run's messages: every worker writes this one, and one that cannot leaves the run to others."""

    @property
    def weight(self) -> float:
        """The run's share of what workers share among runs."""
        return self.config.weight if self.changed.weight is None else self.changed.weight

    @property
    def max_in_flight(self) -> int:
        """Rows that may be under way at once."""
        return self.changed.max_in_flight or self.config.max_in_flight

    def slots(self, role: str) -> int | None:
        """Hops of the role in flight per worker process, for this run alone; None: what the worker has for all."""
        return self.changed.slots.get(role) or self.config.role(role).slots


class Progress(Struct):
    """Counts of a run at one moment."""

    total: int | None
    """None until sealed."""
    outcomes: int
    in_flight: int
    """Rows admitted and not finished."""
    waiting: int
    """Rows in the queue and not admitted yet."""
    idle_roles: list[str]
    """Roles that no worker pulls for at this moment."""
    queued: int = 0
    """Messages in the queue, rows and hops: a few may be left for a moment after the last outcome."""
    retried: int = 0
    """How many times rows were sent again: `outcomes` counts the old ones too."""

    @property
    def done(self) -> bool:
        if self.total is None or self.outcomes < self.total:
            return False
        return not self.retried or self.in_flight + self.waiting == 0


_decode = msgspec.json.Decoder(RunRecord)


def new_run_id(workflow: str) -> str:
    """A fresh id that sorts by time: ids are never used again, since an old ack would hit the new run."""
    return f"{workflow}-{time.strftime('%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def _key(run: str) -> str:
    return f"$KV.{BUCKET}.{run}"


async def prepare(bus: Bus, replicas: int = 1) -> None:
    """Creates what all runs share, if it is not there yet, on so many servers of a cluster."""
    await catalog.prepare(bus, replicas)
    await create_bucket(bus, BUCKET, replicas)
    await create_stream(
        bus,
        {
            "name": DEAD,
            "subjects": ["dead.>"],
            "retention": "limits",
            "allow_direct": True,
            "storage": "file",
            "num_replicas": replicas,
        },
        shared=True,
    )


async def create(bus: Bus, record: RunRecord) -> None:
    """Makes the run's streams and consumers, then its record: a worker that sees the record finds all of it.

    Raises `RunError` if the id is taken, also by a run that was deleted; `ConfigError` if the broker takes no message
    that holds the record.
    """
    if not is_token(record.id):
        raise RunError(f"run id {record.id!r} must be 1 to 64 of A-Z a-z 0-9 _ -")
    record.created_at = record.created_at or time.time()
    body = msgspec.json.encode(record)
    if len(body) > bus.max_body:
        raise ConfigError(
            f"the settings of run {record.id!r} are {len(body)} bytes, and the broker at {bus.url} takes "
            f"{bus.max_body}: shorten them (prompts under workflow?), or raise its max_payload"
        )
    await prepare(bus, record.config.broker.replicas)
    if (there := await get(bus, record.id)) is not None:
        raise RunError(f"run {record.id!r} exists already (state {there.state}): choose another --run")
    replicas = record.config.broker.replicas
    await create_stream(
        bus,
        {
            "name": work_stream(record.id),
            "subjects": [work_subjects(record.id)],
            "retention": "workqueue",
            "discard": "new",  # and no limit: a full queue would deadlock the workers that must forward
            "duplicate_window": 120 * _NS,
            "allow_direct": True,
            "storage": "file",
            "num_replicas": replicas,
        },
    )
    await create_stream(
        bus,
        {
            "name": outcome_stream(record.id),
            "subjects": [outcome_subjects(record.id)],
            "retention": "limits",
            "max_msgs_per_subject": 1,
            "discard": "new",
            "discard_new_per_subject": True,
            "allow_direct": True,
            "storage": "file",
            "num_replicas": replicas,
        },
    )
    await create_stream(bus, {**payload.stream_config(record.id), "num_replicas": replicas})
    if any(record.config.llm.named(alias).is_metered for alias in record.config.llm.aliases):
        await quota.prepare(bus, replicas)
    if record.config.llm.cache != "off":
        await answers.prepare(bus, replicas)
    await admit_at_most(bus, record)
    for role in record.roles:
        await _consumer(bus, record, role, -1)
    try:
        await patiently(bus, lambda: bus.publish(_key(record.id), body, fence(0)))
    except PublishRefused as error:
        if is_lost_race(error) and await get(bus, record.id) != record:
            raise RunError(f"run {record.id!r} was created by somebody else just now: choose another --run") from None
        if not is_lost_race(error):  # else it was we who created it, with a confirmation that got lost
            raise


async def admit_at_most(bus: Bus, record: RunRecord) -> None:
    """Makes the broker keep to the record's `max_in_flight`; rows that are under way go on."""
    await _consumer(bus, record, LEASE_ROLE, record.max_in_flight)


async def _consumer(bus: Bus, record: RunRecord, role: str, max_ack_pending: int) -> None:
    run = record.id
    await bus.api(
        f"CONSUMER.CREATE.{work_stream(run)}.{role}.q.{run}.{role}.*.*",
        {
            "stream_name": work_stream(run),
            "config": {
                "durable_name": role,
                "name": role,
                "filter_subject": f"q.{run}.{role}.*.*",
                "ack_policy": "explicit",
                "ack_wait": int(record.config.ack_wait_s * _NS),
                "max_deliver": -1,  # a finite one strands messages
                "max_ack_pending": max_ack_pending,
                "max_waiting": 16_384,
            },
        },
    )


async def get(bus: Bus, run: str) -> RunRecord | None:
    """The run's record, or None."""
    stored = await bus.last(_KEYS, _key(run))
    return _decode.decode(stored.data) if stored is not None else None


async def require(bus: Bus, run: str) -> RunRecord:
    """The run's record. Raises `RunError` if there is none, naming the runs there are."""
    try:
        record = await get(bus, run)
    except PublishRefused as error:
        if error.code != STREAM_NOT_FOUND:
            raise
        record = None
    if record is None or record.state == "deleted":
        known = ", ".join(r.id for r in await runs(bus)) or "none"
        raise RunError(f"no run {run!r} on this broker; there are: {known}")
    return record


async def runs(bus: Bus, said: set[str] | None = None) -> list[RunRecord]:
    """All runs that are not deleted, oldest first. Those in `said` are known to be unreadable. Raises `BusError`."""
    # The bucket keeps the newest of each key, and is not there before the first run.
    stored = [message async for message in bus.read_if_there(_KEYS)]
    said = said if said is not None else set()
    records = [record for message in stored if (record := _readable(message, said)) is not None]
    return sorted((r for r in records if r.state != "deleted"), key=lambda r: r.created_at)


def _readable(message: Stored, said: set[str]) -> RunRecord | None:
    """One run that a newer version wrote must not keep a worker from all others; it is said once."""
    try:
        return _decode.decode(message.data)
    except msgspec.DecodeError as error:
        if message.subject not in said:
            said.add(message.subject)
            log.warning("registry.unreadable_run", key=message.subject, error=str(error))
        return None


async def update(bus: Bus, run: str, *, when: RunState | None = None, **changes: Any) -> RunRecord:
    """Changes fields of the record, on top of whatever anybody else changed meanwhile.

    With `when` only in that state; returns the record as it is then.
    """

    def changed(record: RunRecord) -> RunRecord:
        return record if when not in (None, record.state) else msgspec.structs.replace(record, **changes)

    return await change(bus, run, changed)


async def seal(bus: Bus, opened: RunRecord, shard: int, rows: int, lines: int) -> RunRecord:
    """Notes that all `rows` of a shard are submitted, of so many `lines`; the last shard gives the run its total.

    `opened` is the run as it was when the submission began. Nothing changes where it is not for the submitter to seal.
    """

    def with_shard(record: RunRecord) -> RunRecord:
        if not is_open_since(record, opened):
            return record
        sealed = {**record.sealed, shard: (rows, lines)}
        if len(sealed) < record.shards:
            return msgspec.structs.replace(record, sealed=sealed)
        total = (opened.total_before or 0) + sum(of[0] for of in sealed.values())
        most = max(record.lines, *(of[1] for of in sealed.values()))
        return msgspec.structs.replace(record, total=total, total_before=None, lines=most, sealed={}, retrying=None)

    return await change(bus, opened.id, with_shard)


def is_open_since(record: RunRecord, opened: RunRecord) -> bool:
    """Whether the run is to be sealed by who found it as `opened`.

    It may be sealed: by another who did the same, or by the same one, with a confirmation that got lost. And if its
    dataset has grown since, whoever submits the rest of it seals it.
    """
    return record.total is None and record.dataset == opened.dataset


async def change(bus: Bus, run: str, changed: Callable[[RunRecord], RunRecord]) -> RunRecord:
    """Replaces the record by what `changed` makes of it, which is asked again if somebody else was faster."""
    while True:
        stored = await bus.last(_KEYS, _key(run))
        if stored is None:
            raise RunError(f"no run {run!r} on this broker")
        found = _decode.decode(stored.data)
        if (record := changed(found)) == found:
            return record
        try:
            body, headers = msgspec.json.encode(record), fence(stored.seq)
            await patiently(bus, lambda: bus.publish(_key(run), body, headers))  # noqa: B023 - awaited at once
        except PublishRefused as error:
            if not is_lost_race(error):
                raise
        else:
            return record


async def watch(bus: Bus) -> AsyncGenerator[list[RunRecord], None]:
    """The runs that are active or paused: now, after each change and reconnect, and every few seconds in any case.

    A change of a key passes by as an ordinary message; it only says that it is time to look.
    """
    changed = asyncio.Event()
    changed.set()
    said: set[str] = set()

    async def wake(_: Msg | None = None) -> None:
        changed.set()

    subscription = await bus.nc.subscribe(_key(">"), cb=wake)
    forget = bus.on_reconnect(wake)
    try:
        while True:
            changed.clear()
            try:
                yield [record for record in await runs(bus, said) if record.state in ("active", "paused")]
            except BusError as error:
                log.debug("registry.unreadable", error=str(error))
                await bus.wait_connected()
            try:
                async with asyncio.timeout(_RELIST_S):
                    await changed.wait()
            except TimeoutError:
                continue
    finally:
        forget()
        if not bus.nc.is_closed:
            await subscription.unsubscribe()


async def progress(bus: Bus, record: RunRecord) -> Progress:
    """Counts of the run, from the broker."""
    outcomes = await bus.api(f"STREAM.INFO.{outcome_stream(record.id)}")
    stored = outcomes["state"]["messages"]
    counts = Progress(record.total, stored, in_flight=0, waiting=0, idle_roles=[], retried=record.retried)
    try:
        lease = await bus.api(f"CONSUMER.INFO.{work_stream(record.id)}.{LEASE_ROLE}")
        counts.in_flight, counts.waiting = lease["num_ack_pending"], lease["num_pending"]
        counts.queued = counts.in_flight + counts.waiting
        for role in record.roles:
            info = await bus.api(f"CONSUMER.INFO.{work_stream(record.id)}.{role}")
            counts.queued += info["num_ack_pending"] + info["num_pending"]
            if info["num_waiting"] == 0 and info["num_ack_pending"] == 0:
                counts.idle_roles.append(role)
    except PublishRefused as error:
        if error.code != STREAM_NOT_FOUND or record.state == "active":
            raise  # only a cancelled run goes on without its queue
    return counts
