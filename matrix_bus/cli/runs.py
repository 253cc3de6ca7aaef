"""Commands about runs that are there: collect, status, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import registry, run
from ..agent import Workflow, load_workflow
from ..bus import Bus
from ..errors import WorkflowError
from ..registry import RunRecord
from ..telemetry import configure_logs
from . import app
from .common import LogLevel, OutputPath, RunArgument, Server, broker_url, go, say
from .show import ProgressLine
from .telling import interruptible, paused_text, say_kept, worker_command


@app.command()
def collect(
    run_id: RunArgument,
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
            say_kept(written)
            await run.write_manifest(bus, record.id, output, tally, {})
            done = await registry.progress(bus, await registry.require(bus, run_id))
            of = f" of {done.total}" if done.total is not None else ", not sealed yet"
            say(f"{tally.rows}{of} outcomes of run {run_id} in {output}")

    with interruptible(output):
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


def _flow_of(record: RunRecord) -> Workflow[Any] | None:
    """The run's workflow for its metrics, where it is installed here."""
    try:
        return load_workflow(record.workflow)
    except WorkflowError:
        return None


async def _print_status(bus: Bus, record: RunRecord) -> None:
    progress = await registry.progress(bus, record)
    total = "not sealed yet" if progress.total is None else f"of {progress.total}"
    state = "complete" if progress.done else record.state
    print(f"{record.id}  {state}  {record.workflow}")
    print(f"  outcomes {progress.outcomes} {total} · in flight {progress.in_flight} · waiting {progress.waiting}")
    if record.state == "paused":
        print(f"  {paused_text(record)}")
    elif progress.idle_roles and not progress.done:
        command = worker_command(record, progress.idle_roles)
        print(f"  no worker serves {', '.join(progress.idle_roles)}: {command}")
