"""Commands about runs: run, submit, collect, status, runs."""

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
from ..agent import Workflow, load_workflow
from ..bus import Bus
from ..config import RunConfig, compose
from ..errors import BusError, ConfigError, DatasetError, WorkflowError
from ..registry import RunRecord
from ..telemetry import configure_logs
from . import app
from .common import LogJson, LogLevel, Overrides, Server, WorkflowSpec, broker_url, embedded_model, go, say
from .show import ProgressLine, progress_text, summary

_STATUS_EVERY_S = 1.0
_SAY_MISSING_AFTER_S = 4.0

Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="JSONL, also .zst; - is stdin.")]
RunId = Annotated[str, typer.Option("--run", help="Id of the run; the same id and data again continue it.")]
OutputPath = Annotated[
    Path, typer.Option("--output", "-o", help="Where outcomes go, one JSON object a line; also .zst.")
]


@app.command("run")
def run_all(
    file: Dataset,
    overrides: Overrides = None,
    workflow: WorkflowSpec = "coral",
    output: OutputPath = Path("out.jsonl"),
    run_id: RunId = "",
    procs: Annotated[int, typer.Option("--procs", min=1, help="Worker processes.")] = 1,
    server: Server = "",
    log_level: LogLevel = "warning",
    log_json: LogJson = False,
) -> None:
    """Everything in one command: broker, model, workers, submit and collect.

    With no model named, the embedded one (135M parameters, on the CPU) answers: real text, not good answers.
    """
    configure_logs(level=log_level, json=log_json)
    flow, config = _load(workflow, overrides or [])
    if _uses_embedded(flow, config):
        words = [f"{key}={value}" for key, value in flow.quick.items()]
        config = compose([*words, *(overrides or [])])
        embedded_model()
        say(f"embedded model, so small limits: {' '.join(words)} (give your own as KEY=VALUE)")
    url = broker_url(server)
    command = [sys.executable, "-m", "matrix_bus", "worker", "--server", url, "--workflow", flow.spec]
    command += ["--procs", str(procs), "--log-level", log_level, *(["--log-json"] if log_json else [])]
    worker = subprocess.Popen(command, env=_import_here(), start_new_session=True)
    try:
        with _interruptible(output):
            go(_submit_and_wait(_Job(url, flow, config, file, output, run_id), worker))
    finally:
        worker.terminate()
        worker.wait()
    say("  try next: matrix-bus status · your own data with the same command · matrix-bus worker in more terminals")
    say("  the broker and the model keep running for the next command; matrix-bus broker stop, matrix-bus serve stop")


@app.command()
def submit(
    data: Dataset,
    overrides: Overrides = None,
    workflow: WorkflowSpec = "coral",
    output: OutputPath = Path("out.jsonl"),
    run_id: RunId = "",
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once everything is submitted; collect later.")
    ] = False,
    server: Server = "",
    log_level: LogLevel = "warning",
    log_json: LogJson = False,
) -> None:
    """Submit a dataset as a run, wait for it and write its outcomes.

    The rows are worked on by whatever `matrix-bus worker` processes there are, now or later. Ctrl-C ends the
    waiting, not the run.
    """
    configure_logs(level=log_level, json=log_json)
    flow, config = _load(workflow, overrides or [])
    job = _Job(broker_url(server), flow, config, data, output, run_id)
    with _interruptible(output):
        if detach:
            record = go(_detach(job))
            say(f"run {record.id} goes on by itself: matrix-bus status {record.id}")
            say(f"  outcomes, now or tomorrow: matrix-bus collect {record.id} -o {output}")
            print(record.id)
        else:
            go(_submit_and_wait(job))


@app.command()
def collect(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="As `matrix-bus runs` lists it.")],
    output: OutputPath = Path("out.jsonl"),
    follow: Annotated[bool, typer.Option("--follow", help="Wait until the run is complete.")] = False,
    server: Server = "",
    log_level: LogLevel = "warning",
) -> None:
    """Write a run's outcomes to a file; continues a file that was begun, and can be repeated at any time."""
    configure_logs(level=log_level)

    async def work() -> None:
        async with await Bus.connect(broker_url(server), name="matrix-bus collect") as bus:
            record = await registry.require(bus, run_id)
            tally = run.Tally(_flow_of(record))
            line = ProgressLine()
            written = await run.collect(
                bus,
                record,
                output,
                follow=follow,
                tally=tally,
                on_progress=lambda n: line.show(f"{n} outcomes"),
            )
            line.clear()
            _say_kept(written)
            await run.write_manifest(bus, record.id, output, tally, {})
            done = await registry.progress(bus, await registry.require(bus, run_id))
            of = f" of {done.total}" if done.total is not None else ", not sealed yet"
            say(f"{written.lines}{of} outcomes of run {run_id} in {output}")

    with _interruptible(output):
        go(work())


@app.command()
def status(
    run_id: Annotated[str, typer.Argument(metavar="[RUN]", help="Without it: every run.")] = "",
    server: Server = "",
) -> None:
    """Show where runs stand: rows waiting, in flight and done, and roles that nobody serves."""

    async def work() -> None:
        async with await Bus.connect(broker_url(server), name="matrix-bus status") as bus:
            records = [await registry.require(bus, run_id)] if run_id else await registry.runs(bus)
            if not records:
                say("no runs yet: matrix-bus submit DATASET starts one")
            for record in records:
                await _print_status(bus, record)

    go(work())


@app.command("runs")
def list_runs(server: Server = "") -> None:
    """List the runs on the broker, oldest first: id, state, workflow, rows, dataset."""

    async def work() -> None:
        async with await Bus.connect(broker_url(server), name="matrix-bus runs") as bus:
            for record in await registry.runs(bus):
                total = "not sealed" if record.total is None else f"{record.total} rows"
                print(f"{record.id}\t{record.state}\t{record.workflow}\t{total}\t{record.dataset}")

    go(work())


# --- inside -----------------------------------------------------------------------------------------------------


def _load(spec: str, overrides: list[str]) -> tuple[Workflow[Any], RunConfig]:
    flow = load_workflow(spec)
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"{word!r} is neither the dataset (there is one already) nor of the form KEY=VALUE")
    return flow, compose(overrides)


def _uses_embedded(flow: Workflow[Any], config: RunConfig) -> bool:
    models = {config.role(name).model or role.model for name, role in flow.roles.items() if role.wants_model}
    return any(alias in config.llm.models and not config.llm.models[alias].urls for alias in models)


def _flow_of(record: RunRecord) -> Workflow[Any] | None:
    """The run's workflow for its metrics, where it is installed here."""
    try:
        return load_workflow(record.workflow)
    except WorkflowError:
        return None


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


async def _start(bus: Bus, job: _Job) -> RunRecord:
    """Opens the run and submits the dataset to it."""
    lines = dataset.read(job.data, check=job.flow.begin)
    first = next(lines)  # an unreadable file must not leave an empty run behind
    record = run.new_record(job.flow, job.config, run=job.run_id, dataset=dataset.identity(job.data))
    record = await run.open_run(bus, record)
    await catalog.announce(bus, catalog.describe(job.flow))
    _submitting.append(record.id)
    if record.total is not None:
        say(f"run {record.id} is submitted already, with {record.total} rows: going on with it")
        return record
    rejects = _Rejects(job.output)
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
    if done.rows == 0:
        raise DatasetError(f"no line of {job.data} could become a row: see {rejects.path}")
    say(f"run {record.id}: {done.rows} rows submitted in {done.seconds:.1f} s")
    return record


async def _detach(job: _Job) -> RunRecord:
    async with await Bus.connect(job.url, name="matrix-bus submit") as bus:
        return await _start(bus, job)


_submitting: list[str] = []
"""The run that a Ctrl-C leaves alone, for the message that says so."""


async def _submit_and_wait(job: _Job, worker: subprocess.Popen[bytes] | None = None) -> None:
    async with await Bus.connect(job.url, name="matrix-bus submit") as bus:
        record = await _start(bus, job)
        tally = run.Tally(job.flow)
        async with _status_line(bus, record, tally, worker):
            written = await run.collect(bus, record, job.output, follow=True, tally=tally)
        _say_kept(written)
        facts = {"model": _model_facts(job.flow, job.config)}
        manifest = await run.write_manifest(bus, record.id, job.output, tally, facts)
        say(f"run {record.id} is complete")
        say(summary(tally) if tally.rows else "  no rows")
        say(f"  output: {job.output} · manifest: {manifest}")


@contextlib.asynccontextmanager
async def _status_line(
    bus: Bus, record: RunRecord, tally: run.Tally, worker: subprocess.Popen[bytes] | None
) -> AsyncIterator[None]:
    """Shows progress while the body runs, and says which roles nobody serves."""
    line = ProgressLine()

    async def keep_showing() -> None:
        missing_since = 0.0
        said: list[str] = []
        child = worker
        while True:
            await asyncio.sleep(_STATUS_EVERY_S)
            if child is not None and child.poll() is not None:
                line.clear()
                say(f"the worker ended with exit code {child.returncode}; the run is kept: start matrix-bus worker")
                child = None
            try:
                progress = await registry.progress(bus, await registry.require(bus, record.id))
            except BusError as error:
                line.show(f"waiting for the broker: {error}")
                continue
            line.show(progress_text(progress.total, progress.in_flight, progress.waiting, tally))
            if not progress.idle_roles or progress.idle_roles == said:
                missing_since = 0.0
                continue
            missing_since = missing_since or time.monotonic()
            if time.monotonic() - missing_since > _SAY_MISSING_AFTER_S:
                said = progress.idle_roles
                line.clear()
                say(f"no worker serves {', '.join(said)}: waiting for one. Start it in another terminal:")
                say(f"  {_worker_command(record, said)}")

    showing = asyncio.create_task(keep_showing())
    try:
        yield
    finally:
        showing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await showing
        line.clear()


def _worker_command(record: RunRecord, roles: list[str]) -> str:
    words = ["matrix-bus worker"]
    if set(roles) != set(record.roles):
        words += [f"--role {role}" for role in roles]
    return " ".join(words) + _server_option()


def _server_option() -> str:
    """What a command in another terminal must be told to reach the same broker."""
    server = next((word for flag, word in itertools.pairwise(sys.argv) if flag == "--server"), "")
    return f" --server {server}" if server else ""


async def _print_status(bus: Bus, record: RunRecord) -> None:
    progress = await registry.progress(bus, record)
    total = "not sealed yet" if progress.total is None else f"of {progress.total}"
    state = "complete" if progress.done else record.state
    print(f"{record.id}  {state}  {record.workflow}")
    print(f"  outcomes {progress.outcomes} {total} · in flight {progress.in_flight} · waiting {progress.waiting}")
    if progress.idle_roles and not progress.done:
        command = _worker_command(record, progress.idle_roles)
        print(f"  no worker serves {', '.join(progress.idle_roles)}: {command}")


def _model_facts(flow: Workflow[Any], config: RunConfig) -> dict[str, str]:
    if not _uses_embedded(flow, config):
        return {}
    from matrix_serving import model_facts

    return model_facts()


def _say_kept(output: dataset.Output) -> None:
    if output.kept is not None:
        say(f"{output.path} was there from another run: kept as {output.kept}")


@contextlib.contextmanager
def _interruptible(output: Path) -> Iterator[None]:
    """Ctrl-C ends the waiting, not the run, and says so; so does an output that cannot be written."""
    try:
        yield
    except (KeyboardInterrupt, DatasetError):
        for run_id in _submitting:
            server = _server_option()
            say(f"\nrun {run_id} goes on without this terminal: matrix-bus status {run_id}{server}")
            say(f"  its outcomes: matrix-bus collect {run_id} -o {output} --follow{server}")
            say(f"  if not all rows were submitted yet: the same command again, with --run {run_id}")
            say(f"  to end it: matrix-bus cancel {run_id}{server}")
        raise
