"""Several replicas of a model: launched, announced on the bus while they answer, drained at the end."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from matrix_bus import endpoints
from matrix_bus.bus import Bus
from matrix_bus.endpoints import Beacon, Replica
from matrix_bus.errors import UsageError
from matrix_bus.llm.metrics import running

from .backends import Launch
from .launcher import Server

_SEEN_S = 2 * endpoints.BEAT_S
_LOOK_S = 0.5


async def serve_replicas(
    bus: Bus,
    launches: Sequence[Launch],
    stopping: asyncio.Event,
    *,
    backend: str,
    logs: Path,
    say: Callable[[str], None],
    host: str = "127.0.0.1",
    advertise: str = "",
    capacity: float = 1.0,
    labels: dict[str, str] | None = None,
    drain_s: float = 60.0,
) -> None:
    """Runs until `stopping`: then no new calls come, those under way have `drain_s` seconds, and the servers end.

    `advertise` is the host name that workers reach the servers by. Raises `UsageError` if a server ends before it
    ever answered, or if nobody could reach it.
    """
    if host == "0.0.0.0" and not advertise:  # noqa: S104 - compared, not bound
        raise UsageError("--host 0.0.0.0 needs --advertise NAME: the host name that workers reach this machine by")
    if host != "127.0.0.1" and any("{host}" not in " ".join(launch.words) for launch in launches):
        raise UsageError(
            f"--host {host}: backend {backend!r} does not take it: leave it out; in a command of your own, {{host}} "
            "is where it goes"
        )
    await endpoints.prepare(bus)
    beacon = Beacon(bus)
    shown: dict[str, Replica] = {}

    async def keep(number: int, launch: Launch) -> None:
        server = Server(launch, logs / f"{_file_name(launch.name)}-{number}.log", host=host)
        url = f"http://{advertise or server.local_host}:{server.port}/v1"
        identity = f"{number}-{secrets.token_hex(6)}"  # machines start by the hundred in one second

        def changed(up: bool) -> None:
            if up:
                shown[identity] = Replica(
                    id=identity,
                    model=launch.name,
                    url=url,
                    backend=backend,
                    capacity=capacity,
                    labels=labels or {},
                    started_at=time.time(),
                )
                beacon.show(shown[identity])
                print(f"serving {launch.name} at {url}", flush=True)
            else:
                shown.pop(identity, None)
                gone = asyncio.create_task(beacon.hide(identity))
                withdrawing.add(gone)
                gone.add_done_callback(withdrawing.discard)

        say(f"starting {launch.name} on port {server.port}, log {server.log}")
        await server.run(changed, say)

    withdrawing: set[asyncio.Task[None]] = set()
    beating = asyncio.create_task(beacon.run())
    keepers = [asyncio.create_task(keep(number, launch)) for number, launch in enumerate(launches)]
    keeping = asyncio.gather(*keepers)
    stopped = asyncio.create_task(stopping.wait())
    both: list[asyncio.Future[Any]] = [keeping, stopped]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            keeping.result()
        await _drain(beacon, list(shown.values()), drain_s, say)
    finally:
        for replica in list(shown.values()):
            await beacon.hide(replica.id)
        for task in (*keepers, *both, beating):
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)


async def _drain(beacon: Beacon, replicas: list[Replica], drain_s: float, say: Callable[[str], None]) -> None:
    if not replicas:
        return
    for replica in replicas:
        beacon.show(msgspec.structs.replace(replica, state="draining"))
    await asyncio.sleep(_SEEN_S)
    deadline = time.monotonic() + drain_s
    while time.monotonic() < deadline:
        busy = sum([await running(replica.url) for replica in replicas])
        if not busy:
            return
        say(f"draining: {busy:.0f} calls under way")
        await asyncio.sleep(_LOOK_S)


def _file_name(model: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in model)
