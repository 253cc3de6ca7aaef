"""Model servers on a bus: whoever serves a model announces its replicas, workers follow what is there.

One key per replica in a bucket whose values expire. A replica repeats its key twice a second; what has not been heard
for two seconds is gone, by the clock of whoever listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from .bus import Bus, create_bucket
from .errors import BusError

if TYPE_CHECKING:
    from nats.aio.msg import Msg

BUCKET = "mb_endpoints"
_STREAM = f"KV_{BUCKET}"
BEAT_S = 0.5
EXPIRES_S = 2.0
_LOOK_S = 0.25


class Replica(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One server of a model, as it announces itself; the value of its key, as JSON."""

    id: str
    model: str
    """The name that it is called by."""
    url: str
    """Base URL, with `/v1`."""
    backend: str = ""
    capacity: float = 1.0
    """Its share of the calls, beside other replicas of the model."""
    transport: Literal["direct", "sdk", "azure"] = "direct"
    """How workers call it, as in `llm.transport`."""
    api_version: str = ""
    """Of Azure's interface."""
    api_key_env: str = ""
    """Environment variable of the workers that holds its key; empty: the one that the run names."""
    labels: dict[str, str] = {}
    state: Literal["up", "draining"] = "up"
    """Draining: no new calls, those under way go on."""
    started_at: float = 0.0


_decoder = msgspec.json.Decoder(Replica)


def _decode(data: bytes) -> Replica | None:
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError:
        return None  # withdrawn, or of a newer version


def _model_key(model: str) -> str:
    return blake2b(model.encode(), digest_size=6).hexdigest()  # names have slashes and dots


def _key(replica: Replica) -> str:
    return f"$KV.{BUCKET}.{_model_key(replica.model)}.{replica.id}"


async def prepare(bus: Bus, replicas: int = 1) -> None:
    """Creates the bucket, if it is not there yet. Raises `BusError`."""
    await create_bucket(bus, BUCKET, replicas, max_age_s=2 * EXPIRES_S)


async def announce(bus: Bus, replica: Replica) -> None:
    """One heartbeat. Raises `BusError`."""
    await bus.publish(_key(replica), msgspec.json.encode(replica))


async def withdraw(bus: Bus, replica: Replica) -> None:
    """It is gone for good, and need not be waited for. Raises `BusError`."""
    await bus.publish(_key(replica), b"", {"KV-Operation": "DEL"})


async def listing(bus: Bus, model: str | None = None) -> list[Replica]:
    """The replicas of a model, or of all, that were heard of within the last seconds, by model. Raises `BusError`."""
    subject = f"$KV.{BUCKET}.{_model_key(model) if model else '*'}.*"
    stored = [message async for message in bus.read_if_there(_STREAM, subject=subject)]
    found = [replica for message in stored if (replica := _decode(message.data))]
    return sorted(found, key=lambda replica: (replica.model, replica.url))


class Change(Struct, frozen=True):
    """The replicas of a model as they are now."""

    up: dict[str, Replica]
    """By URL: those that take calls."""
    lost: frozenset[str]
    """URLs that were up and are not heard of any more: their calls will not be answered."""


async def watch(bus: Bus, model: str) -> AsyncGenerator[Change, None]:
    """What serves a model: now, and after each change. Waits while the broker is away; what was up stays up then."""
    heard: dict[str, tuple[Replica, float]] = {}
    arrived = asyncio.Event()

    async def hear(message: Msg) -> None:
        name = message.subject.rpartition(".")[2]
        if replica := _decode(message.data):
            heard[name] = (replica, time.monotonic())
        elif not message.data:
            heard.pop(name, None)
        arrived.set()

    subject = f"$KV.{BUCKET}.{_model_key(model)}.*"
    subscription = await bus.nc.subscribe(subject, cb=hear)
    before: dict[str, Replica] | None = None
    try:
        # All that are there at once: whoever followed the heartbeats alone would give the first replica that is heard
        # every call that waits. What is stored may be of a replica that died since, so it has less time to speak up.
        with contextlib.suppress(BusError):  # the heartbeats will tell
            for replica in await listing(bus, model):
                heard.setdefault(replica.id, (replica, time.monotonic() - EXPIRES_S / 2))
        while True:
            now = time.monotonic()
            if not bus.connected or now - bus.reconnected_at < EXPIRES_S:
                # Heartbeats could not come: that says nothing about the servers.
                heard = {name: (replica, max(at, now - EXPIRES_S / 2)) for name, (replica, at) in heard.items()}
            lost = {replica.url for replica, at in heard.values() if now - at > EXPIRES_S}
            heard = {name: entry for name, entry in heard.items() if now - entry[1] <= EXPIRES_S}
            up = {replica.url: replica for replica, _ in heard.values() if replica.state == "up"}
            if up != before:
                before = up
                yield Change(up, frozenset(lost - up.keys()))
            arrived.clear()
            try:
                async with asyncio.timeout(_LOOK_S):
                    await arrived.wait()
            except TimeoutError:
                continue
    finally:
        if not bus.nc.is_closed:
            await subscription.unsubscribe()


class Beacon:
    """Keeps replicas announced until it is closed; a broker that is away is waited for."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._replicas: dict[str, Replica] = {}

    def show(self, replica: Replica) -> None:
        """Announces it from now on, or what changed of it."""
        self._replicas[replica.id] = replica

    async def hide(self, replica_id: str) -> None:
        """It is gone."""
        replica = self._replicas.pop(replica_id, None)
        if replica is not None:
            try:
                await withdraw(self._bus, replica)
            except BusError:
                return  # it expires by itself

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            for replica in list(self._replicas.values()):
                try:
                    await announce(self._bus, replica)
                except BusError:
                    await self._bus.wait_connected()
            await asyncio.sleep(BEAT_S)
