"""A dataset on its way into a run: opened, checked, submitted, with what was rejected beside the output."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .. import catalog, dataset, registry, run
from ..agent import Workflow
from ..bus import Bus
from ..config import RunConfig
from ..errors import DatasetError
from ..registry import RunRecord
from .common import say
from .telling import submitting

Lines = AsyncGenerator[dataset.Line | dataset.Rejected, None]


@dataclass(frozen=True)
class Job:
    """What was asked for on the command line."""

    url: str
    flow: Workflow[Any]
    config: RunConfig
    data: str
    output: Path
    shape: run.Shape
    run_id: str = ""
    strict: bool = False
    shard: dataset.Shard = field(default_factory=dataset.Shard)

    def lines(self, path: str) -> Generator[dataset.Line | dataset.Rejected, None, None]:
        """The lines of the dataset at `path` that this job is about."""
        select = dataset.Selection(self.config.input, self.shard, catalog.describe(self.flow).parsed_fields)
        lines = dataset.read(path, self.flow.begin, select)
        size = self.config.input.shuffle
        return dataset.mixed(lines, size, self.config.seed) if size else lines


class Feed:
    """The rest of a dataset that a run does not have yet; made by `open_feed`."""

    def __init__(self, record: RunRecord, lines: Lines | None, job: Job, rejects: Rejects | None = None) -> None:
        self.record = record
        self._lines = lines
        self._job = job
        self._rejects = rejects or Rejects(job.output)
        self.rows = 0
        """Submitted so far."""
        self.reading = lines is not None
        """Whether more may come."""

    async def submit(self, bus: Bus, on_progress: Callable[[int], None] = lambda _: None) -> None:
        """Submits all of it, and says so."""
        if self._lines is None:
            return

        def progress(rows: int) -> None:
            self.rows = rows
            on_progress(rows)

        lines, shard = self._lines, self._job.shard
        done = await run.submit(
            bus, self.record, lines, shard=shard.index, on_reject=self._rejects.add, on_progress=progress
        )
        self.reading = False
        on_progress(-1)
        self._rejects.tell()
        of = f" of shard {shard}" if shard.count > 1 else ""
        say(f"run {self.record.id}: {done.rows} rows{of} submitted in {done.seconds:.1f} s")


async def open_feed(bus: Bus, path: str, job: Job) -> Feed:
    """Makes the job's run, or finds it and what it has; `path` is where its dataset lies now."""
    if job.strict:
        _refuse_rejected(path, job)
    record = run.new_record(
        job.flow, job.config, run=job.run_id, source=dataset.identity(job.data), shards=job.shard.count
    )
    await registry.prepare(bus, job.config.broker.replicas)
    if await registry.get(bus, record.id) is not None:
        record = await run.open_run(bus, record)
        if record.total is not None:
            submitting.append(record.id)
            say(f"run {record.id} is submitted already, with {record.total} rows: going on with it")
            return Feed(record, None, job)
        if job.shard.index in record.sealed:
            submitting.append(record.id)
            say(f"shard {job.shard} of run {record.id} is submitted already: waiting for the others")
            return Feed(record, None, job)
    rejects = Rejects(job.output)
    lines = dataset.in_thread(job.lines(path))  # a pipe may be slow, and outcomes are written meanwhile
    if job.shard.count == 1:  # a dataset without a row must not leave an empty run behind; a shard may have none
        first = await _first_row(lines, rejects)
        if first is None:
            raise DatasetError(f"no line of {job.data} could become a row: see {rejects.path}")
        lines = _chain(first, lines)
    record = await run.open_run(bus, record)
    await catalog.announce(bus, catalog.describe(job.flow))
    submitting.append(record.id)
    return Feed(record, lines, job, rejects)


def _refuse_rejected(path: str, job: Job) -> None:
    rejects = Rejects(job.output)
    for line in job.lines(path):
        if isinstance(line, dataset.Rejected):
            rejects.add(line)
    if rejects.count:
        raise DatasetError(
            f"{rejects.count} lines of {job.data} cannot become rows, so with --strict nothing is submitted: "
            f"line number and reason are in {rejects.path}"
        )


async def _chain(first: dataset.Line, rest: Lines) -> Lines:
    yield first
    async for line in rest:
        yield line


async def _first_row(lines: Lines, rejects: Rejects) -> dataset.Line | None:
    async for line in lines:
        if isinstance(line, dataset.Line):
            return line
        rejects.add(line)
    return None


class Rejects:
    """Lines that cannot become rows, written beside the output with their place and the reason."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.rejected.jsonl")
        self.count = 0

    def add(self, line: dataset.Rejected) -> None:
        """Writes one more."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab" if self.count else "wb") as file:
            file.write(msgspec.json.encode(line) + b"\n")
        self.count += 1

    def tell(self) -> None:
        """Says where they are."""
        if self.count:
            say(f"{self.count} lines rejected, with line number and reason in {self.path}")
