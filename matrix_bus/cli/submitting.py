"""Commands that make a run: run, submit; and config, which shows with what."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from .. import catalog, dataset, registry, run
from ..agent import Workflow
from ..bus import Bus
from ..config import RunConfig
from ..errors import BusError, DatasetError, RunError
from ..registry import RunRecord
from ..telemetry import configure_logs
from . import app
from .common import LogJson, LogLevel, OutputPath, Server, WorkflowSpec, broker_url, embedded_model, go, say
from .settings import ConfigDir, Words, load
from .show import ProgressLine, progress_text, summary
from .telling import interruptible, paused_text, say_kept, submitting, worker_command

_STATUS_EVERY_S = 1.0
_SAY_MISSING_AFTER_S = 4.0

RunId = Annotated[str, typer.Option("--run", help="Id of the run; the same id and data again continue it.")]
Strict = Annotated[bool, typer.Option("--strict", help="Submit nothing if a line cannot become a row.")]


@app.command("run")
def run_all(
    words: Words,
    workflow: WorkflowSpec = "coral",
    output: OutputPath = Path("out.jsonl"),
    run_id: RunId = "",
    strict: Strict = False,
    config_dir: ConfigDir = None,
    procs: Annotated[int, typer.Option("--procs", min=1, help="Worker processes.")] = 1,
    server: Server = "",
    log_level: LogLevel = "warning",
    log_json: LogJson = False,
) -> None:
    """Everything in one command: broker, model, workers, submit and collect.

    With no model named, the embedded one (135M parameters, on the CPU) answers: real text, not good answers.
    """
    configure_logs(level=log_level, json=log_json)
    data, flow, config = load(workflow, words, config_dir)
    if _uses_embedded(flow, config):
        data, flow, config = load(workflow, words, config_dir, quick=True)
        run.new_record(flow, config)  # a mistake shows before a model is fetched
        embedded_model()
        quick = " ".join(f"{key}={value}" for key, value in flow.quick.items())
        say(f"embedded model, so small limits: {quick} (give your own as KEY=VALUE)")
    run.new_record(flow, config)
    _say_missing_models(flow, config)
    go(_check_models(flow, config))
    url = broker_url(server or config.broker.url)
    command = [sys.executable, "-m", "matrix_bus", "worker", "--workflow", flow.spec]
    command += ["--procs", str(procs), "--log-level", log_level, *(["--log-json"] if log_json else [])]
    # The address in the environment: on the command line everybody could read the password in it.
    worker = subprocess.Popen(command, env={**_import_here(), "MATRIX_BUS_SERVER": url}, start_new_session=True)
    try:
        with interruptible(output):
            tally = go(_submit_and_wait(_Job(url, flow, config, data, output, run_id, strict), worker))
    finally:
        worker.terminate()
        worker.wait()
    say("  try next: matrix-bus status · your own data with the same command · matrix-bus worker in more terminals")
    say("  the broker and the model keep running for the next command; matrix-bus broker stop, matrix-bus serve stop")
    _end(tally, output)


@app.command()
def submit(
    words: Words,
    workflow: WorkflowSpec = "coral",
    output: OutputPath = Path("out.jsonl"),
    run_id: RunId = "",
    strict: Strict = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once everything is submitted; collect later.")
    ] = False,
    config_dir: ConfigDir = None,
    server: Server = "",
    log_level: LogLevel = "warning",
    log_json: LogJson = False,
) -> None:
    """Submit a dataset as a run, wait for it and write its outcomes.

    The rows are worked on by whatever `matrix-bus worker` processes there are, now or later. Ctrl-C ends the
    waiting, not the run.
    """
    configure_logs(level=log_level, json=log_json)
    data, flow, config = load(workflow, words, config_dir)
    run.new_record(flow, config)  # a mistake shows before a broker is started
    _say_missing_models(flow, config)
    job = _Job(broker_url(server or config.broker.url), flow, config, data, output, run_id, strict)
    with interruptible(output):
        if detach:
            record = go(_detach(job))
            say(f"run {record.id} goes on by itself: matrix-bus status {record.id}")
            say(f"  outcomes, now or tomorrow: matrix-bus collect {record.id} -o {output}")
            print(record.id)
            return
        tally = go(_submit_and_wait(job))
    _end(tally, output)


# --- inside -----------------------------------------------------------------------------------------------------


def _end(tally: run.Tally, output: Path) -> None:
    """A failed row is data; a run of nothing else is a mistake that a script must notice."""
    if tally.rows and tally.kinds["failed"] == tally.rows:
        raise RunError(f"every row failed; the errors are in {output}, one of them: {tally.example}")


def _models_of(flow: Workflow[Any], config: RunConfig) -> set[str]:
    return {config.alias_of(name, role.model) for name, role in flow.roles.items() if role.wants_model}


def _say_missing_models(flow: Workflow[Any], config: RunConfig) -> None:
    """An alias that the workflow declares and nobody has set is answered by the default model: worth a line."""
    declared = {role.model for name, role in flow.roles.items() if role.wants_model and not config.role(name).model}
    for alias in sorted(declared.difference(config.llm.aliases)):
        say(f"no llm.models.{alias} is set: the default model answers in its place (llm.models.{alias}.model=NAME)")


def _uses_embedded(flow: Workflow[Any], config: RunConfig) -> bool:
    return any(config.llm.named(alias).is_embedded for alias in _models_of(flow, config))


async def _check_models(flow: Workflow[Any], config: RunConfig) -> None:
    """A server that is not there, or has another model, shows before any row is submitted."""
    from ..worker.models import Models

    models = Models(None)
    try:
        for alias in _models_of(flow, config):
            if (model := config.llm.named(alias)).urls:
                await (await models.pool(model)).check()
    finally:
        await models.close()


def _import_here() -> dict[str, str]:
    """The environment of a child that imports what we import, also from an uninstalled checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


class _Rejects:
    """Lines that cannot become rows, written beside the output with their place and the reason."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.rejected.jsonl")
        self.count = 0

    def add(self, line: dataset.Rejected) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab" if self.count else "wb") as file:
            file.write(msgspec.json.encode(line) + b"\n")
        self.count += 1

    def tell(self) -> None:
        if self.count:
            say(f"{self.count} lines rejected, with line number and reason in {self.path}")


@dataclass(frozen=True)
class _Job:
    """What was asked for on the command line."""

    url: str
    flow: Workflow[Any]
    config: RunConfig
    data: str
    output: Path
    run_id: str
    strict: bool


async def _start(bus: Bus, job: _Job) -> RunRecord:
    """Opens the run and submits the dataset to it."""
    with dataset.repeatable(job.data, twice=job.strict) as path:
        if job.strict:
            _refuse_rejected(path, job)
        return await _submit(bus, path, job)


def _refuse_rejected(path: str, job: _Job) -> None:
    rejects = _Rejects(job.output)
    for line in dataset.read(path, check=job.flow.begin):
        if isinstance(line, dataset.Rejected):
            rejects.add(line)
    if rejects.count:
        raise DatasetError(
            f"{rejects.count} lines of {job.data} cannot become rows, so with --strict nothing is submitted: "
            f"line number and reason are in {rejects.path}"
        )


async def _submit(bus: Bus, path: str, job: _Job) -> RunRecord:
    record = run.new_record(job.flow, job.config, run=job.run_id, source=dataset.identity(job.data))
    await registry.prepare(bus, job.config.broker.replicas)
    if await registry.get(bus, record.id) is not None:
        record = await run.open_run(bus, record)
        if record.total is not None:
            submitting.append(record.id)
            say(f"run {record.id} is submitted already, with {record.total} rows: going on with it")
            return record
    rejects = _Rejects(job.output)
    lines = dataset.read(path, check=job.flow.begin)
    first = _first_row(lines, rejects)  # a file without one must not leave an empty run behind
    if first is None:
        raise DatasetError(f"no line of {job.data} could become a row: see {rejects.path}")
    record = await run.open_run(bus, record)
    await catalog.announce(bus, catalog.describe(job.flow))
    submitting.append(record.id)
    line = ProgressLine()
    done = await run.submit(
        bus,
        record,
        itertools.chain([first], lines),
        on_reject=rejects.add,
        on_progress=lambda n: line.show(f"{n} rows submitted"),
    )
    line.clear()
    rejects.tell()
    say(f"run {record.id}: {done.rows} rows submitted in {done.seconds:.1f} s")
    return record


def _first_row(lines: Iterator[dataset.Line | dataset.Rejected], rejects: _Rejects) -> dataset.Line | None:
    for line in lines:
        if isinstance(line, dataset.Line):
            return line
        rejects.add(line)
    return None


async def _detach(job: _Job) -> RunRecord:
    async with await Bus.connect(job.url, name="matrix-bus submit") as bus:
        return await _start(bus, job)


async def _submit_and_wait(job: _Job, worker: subprocess.Popen[bytes] | None = None) -> run.Tally:
    async with await Bus.connect(job.url, name="matrix-bus submit") as bus:
        record = await _start(bus, job)
        tally = run.Tally(job.flow)
        async with _status_line(bus, record, tally, worker, job.flow.spec):
            written = await run.collect(bus, record, job.output, follow=True, tally=tally)
        say_kept(written)
        facts = {"model": _model_facts(job.flow, job.config)}
        manifest = await run.write_manifest(bus, record.id, job.output, tally, facts)
        say(f"run {record.id} is complete")
        say(summary(tally) if tally.rows else "  no rows")
        say(f"  output: {job.output} · manifest: {manifest}")
    return tally


@contextlib.asynccontextmanager
async def _status_line(
    bus: Bus, record: RunRecord, tally: run.Tally, worker: subprocess.Popen[bytes] | None, spec: str
) -> AsyncIterator[None]:
    """Shows progress while the body runs, and says which roles nobody serves."""
    line = ProgressLine()

    async def keep_showing() -> None:
        missing_since = 0.0
        said: list[str] = []
        paused: str | None = None
        child = worker
        while True:
            await asyncio.sleep(_STATUS_EVERY_S)
            if child is not None and child.poll() is not None:
                line.clear()
                say(f"the worker ended with exit code {child.returncode}; the run is kept: start matrix-bus worker")
                child = None
            try:
                now = await registry.require(bus, record.id)
                progress = await registry.progress(bus, now)
            except BusError as error:
                line.show(f"waiting for the broker: {error}")
                continue
            line.show(progress_text(progress.total, progress.in_flight, progress.waiting, tally))
            if now.state == "paused":
                if paused != now.why:
                    paused = now.why
                    line.clear()
                    say(paused_text(now))
                continue
            paused = None
            if not progress.idle_roles or progress.idle_roles == said:
                missing_since = 0.0
                continue
            missing_since = missing_since or time.monotonic()
            if time.monotonic() - missing_since > _SAY_MISSING_AFTER_S:
                said = progress.idle_roles
                line.clear()
                say(f"no worker serves {', '.join(said)}: waiting for one. Start it in another terminal:")
                say(f"  {worker_command(record, said, spec)}")

    showing = asyncio.create_task(keep_showing())
    try:
        yield
    finally:
        showing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await showing
        line.clear()


def _model_facts(flow: Workflow[Any], config: RunConfig) -> dict[str, str]:
    if not _uses_embedded(flow, config):
        return {}
    from matrix_serving import model_facts

    return model_facts()
