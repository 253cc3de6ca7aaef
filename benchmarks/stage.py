"""What benchmarks of whole hops stand on: a private broker, open runs, worker processes that serve them.

The CPU of a process is what the system says of it, user and system time together.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

import psutil
from msgspec import Struct

from matrix_bus import RunConfig, load_workflow, run
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.orchestrator import outcome_stream, work_stream
from matrix_bus.registry import RunRecord

ROOT = Path(__file__).resolve().parent.parent
LOOK_S = 0.05
_SETTLE_S = 0.5
_EVENT = re.compile(r"\b(?:worker|bus)\.\w+")


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


class Client:
    """A Python module that runs as a process of its own; its stderr goes to a file in `directory`."""

    def __init__(self, directory: Path, number: int, words: Sequence[str]) -> None:
        self._log = directory / f"client-{number}.log"
        self._seen: IO[str] | None = None
        self._events: Counter[str] = Counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._known = psutil.Process(self._process.pid)

    @property
    def cpu_s(self) -> float:
        return cpu_s(self._known)

    @property
    def rss_mib(self) -> float:
        return float(self._known.memory_info().rss) / (1 << 20)

    def said(self, event: str) -> int:
        """How often an event is in its log so far."""
        self._seen = self._seen or self._log.open()
        self._events.update(_EVENT.findall(self._seen.read()))
        return self._events[event]

    def check(self) -> None:
        """Raises `SystemExit` if it has ended."""
        if self._process.poll() is not None:
            raise SystemExit(f"a measured process ended early:\n{self._log.read_text()[-2000:]}")

    async def read(self) -> str:
        """The next line that it prints. Raises `SystemExit` if it has ended."""
        assert self._process.stdout is not None
        if text := await asyncio.to_thread(self._process.stdout.readline):
            return text.strip()
        self._process.wait()
        raise SystemExit(f"a measured process ended early:\n{self._log.read_text()[-2000:]}")

    def write(self, text: str) -> None:
        """Gives it a line to read."""
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        if self._seen is not None:
            self._seen.close()
        self._process.terminate()
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def worker(directory: Path, number: int, url: str, spec: str, slots: int, words: Sequence[str] = ()) -> Client:
    """`matrix-bus worker` with all roles of a workflow; `words` are more of its options."""
    options = ["--server", url, "--workflow", spec, "--slots", str(slots), *words]
    return Client(directory, number, ["matrix_bus", "worker", "--log-level", "info", *options])


class Stage(Struct):
    """Broker, runs and workers, ready for rows."""

    directory: Path
    bus: Bus
    broker: psutil.Process
    records: list[RunRecord]
    workers: list[Client]

    def check(self) -> None:
        """Raises `SystemExit` if a worker has ended."""
        for client in self.workers:
            client.check()

    @property
    def workers_cpu_s(self) -> float:
        return sum(client.cpu_s for client in self.workers)

    @property
    def disconnected(self) -> int:
        """How often a worker lost its connection: the broker cuts off who has 64 MiB waiting for it."""
        return sum(client.said("bus.disconnected") for client in self.workers)


@asynccontextmanager
async def stage(
    spec: str,
    config: RunConfig,
    *,
    directory: Path | None = None,
    runs: int = 1,
    workers: int = 1,
    words: Sequence[str] = (),
    monitor_port: int | None = None,
) -> AsyncIterator[Stage]:
    """Opens the runs and waits until all workers serve all of them; a worker has a slot per role and row in flight."""
    async with AsyncExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="matrix-bus-bench-")))
        broker = stack.enter_context(Broker(directory / "broker", monitor_port=monitor_port))
        bus = await stack.enter_async_context(await Bus.connect(broker.url))
        flow = load_workflow(spec)
        new = [run.new_record(flow, config, run=f"bench-{number}") for number in range(runs)]
        records = [await run.open_run(bus, record) for record in new]
        made = Stage(directory, bus, psutil.Process(broker.pid), records, [])
        for number in range(workers):
            made.workers.append(worker(directory, number, broker.url, spec, config.max_in_flight, words))
            stack.callback(made.workers[-1].stop)
        async with asyncio.timeout(60 + runs):
            while any(client.said("worker.serving") < runs for client in made.workers):
                made.check()
                await asyncio.sleep(LOOK_S)
        await asyncio.sleep(_SETTLE_S)
        yield made


async def last_outcome(here: Stage, rows: Sequence[int]) -> float:
    """When the broker stored the last outcome of all runs, as Unix time. Looks at one run at a time."""
    latest = 0.0
    for record, wanted in zip(here.records, rows, strict=True):
        while True:
            state = (await here.bus.api(f"STREAM.INFO.{outcome_stream(record.id)}"))["state"]
            if state["messages"] >= wanted:
                latest = max(latest, datetime.fromisoformat(state["last_ts"]).timestamp() if wanted else 0.0)
                break
            here.check()
            await asyncio.sleep(LOOK_S)
    return latest


async def empty(here: Stage) -> None:
    """Returns when all acks have reached the work queues."""
    for record in here.records:
        while (await here.bus.api(f"STREAM.INFO.{work_stream(record.id)}"))["state"]["messages"]:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S / 5)
