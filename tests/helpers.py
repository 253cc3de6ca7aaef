"""What the tests of several rooms share: waiting on observable state, runs in process, workers in process."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from matrix_bus import OutcomeRecord, RunConfig, Workflow, registry, run
from matrix_bus.broker import find_server, server_info
from matrix_bus.bus import Bus
from matrix_bus.dataset import Line
from matrix_bus.orchestrator import decode_outcome
from matrix_bus.registry import RunRecord
from matrix_bus.service import free_port
from matrix_bus.worker import Worker

T = TypeVar("T")
_POLL_S = 0.01


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 15.0) -> Any:
    """The first true value of a condition, plain or awaitable; fails with `what` if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(_POLL_S)


def until_sync(condition: Callable[[], T], what: str, timeout_s: float = 30.0) -> T:
    """The same for tests without a loop."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(_POLL_S)
    return found


def unique(prefix: str) -> str:
    """A name that no other test uses."""
    return f"{prefix}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def server_with(directory: Path, settings: str, jetstream: str = "", user: str = "") -> Iterator[str]:
    """A nats-server that is told these lines of configuration, of `jetstream` besides; its address, with the user."""
    directory.mkdir(exist_ok=True)
    config, address = directory / "nats.conf", f"127.0.0.1:{free_port()}"
    config.write_text(f'listen: "{address}"\njetstream {{ store_dir: "{directory}", {jetstream} }}\n{settings}\n')
    with (directory / "nats.log").open("wb") as log:
        server = subprocess.Popen([find_server(), "-c", config], stderr=log)
    try:
        until_sync(lambda: server_info(f"nats://{address}"), "nats-server to answer")
        yield f"nats://{user}@{address}" if user else f"nats://{address}"
    finally:
        server.terminate()
        server.wait()


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Bus]:
    """A bus of its own, closed at the end."""
    async with await Bus.connect(url) as bus:
        yield bus


async def work_stream_of(bus: Bus, subject: str, **settings: Any) -> str:
    """Makes a work-queue stream of a fresh name for one subject."""
    name = unique("S")
    config = {"name": name, "subjects": [subject], "retention": "workqueue", "storage": "file", "allow_direct": True}
    await bus.api(f"STREAM.CREATE.{name}", {**config, **settings})
    return name


def numbered(bodies: Sequence[bytes]) -> list[Line]:
    """Lines of a dataset, in this order."""
    return [Line(number, body, str(number)) for number, body in enumerate(bodies)]


async def submitted(
    bus: Bus, flow: Workflow[Any], bodies: Sequence[bytes], config: RunConfig | None = None, name: str = ""
) -> RunRecord:
    """A run with these rows, unchecked, sealed."""
    record = run.new_record(flow, config or RunConfig(), run=name or unique(flow.name))
    record = await run.open_run(bus, record)
    await run.submit(bus, record, numbered(bodies))
    return record


async def all_outcomes(bus: Bus, record: RunRecord, timeout_s: float = 20.0) -> list[OutcomeRecord]:
    """The outcomes of a run, by row, once it is complete."""
    async with asyncio.timeout(timeout_s), contextlib.aclosing(run.outcomes(bus, record.id)) as stream:
        found = [decode_outcome(message.data) async for message in stream if message is not None]
    return sorted(found, key=lambda outcome: outcome.row)


async def consumer(bus: Bus, stream: str, name: str) -> dict[str, Any]:
    """The broker's account of a consumer."""
    return await bus.api(f"CONSUMER.INFO.{stream}.{name}")


async def messages(bus: Bus, stream: str) -> int:
    """How many messages lie in a stream."""
    info = await bus.api(f"STREAM.INFO.{stream}")
    return int(info["state"]["messages"])


@contextlib.asynccontextmanager
async def working(url: str, flow: Workflow[Any], **settings: Any) -> AsyncIterator[Worker]:
    """A worker on a connection of its own; it is stopped at the end, and must then return."""
    async with connected(url) as bus:
        worker = Worker(bus, [flow], **{"grace_s": 0.0, **settings})
        task = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            await asyncio.wait_for(task, 15)


async def done(bus: Bus, record: RunRecord) -> bool:
    """Whether the run is complete."""
    return (await registry.progress(bus, await registry.require(bus, record.id))).done
