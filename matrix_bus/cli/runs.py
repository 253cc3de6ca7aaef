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
from .common import (
    Fields,
    LogLevel,
    Messages,
    MessagesOf,
    Ordered,
    OutputPath,
    PartMb,
    RunArgument,
    Server,
    SuccessOnly,
    broker_url,
    go,
    say,
    shape_of,
)
from .show import ProgressLine
from .telling import interruptible, paused_text, say_kept, worker_command, written_text


@app.command()
def collect(
    run_id: RunArgument,
    output: OutputPath = Path("out.jsonl"),
    follow: Annotated[bool, typer.Option("--follow", help="Wait until the run is complete.")] = False,
    success_only: SuccessOnly = False,
    fields: Fields = "",
    messages: Messages = False,
    messages_of: MessagesOf = "",
    ordered: Ordered = False,
    part_mb: PartMb = 0,
    shard: Annotated[
        str,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Only this part of the rows, as in 2/4: N collectors share the folder of one output.",
        ),
    ] = "",
    server: Server = "",
    log_level: LogLevel = "warning",
) -> None:
    """Write a run's outcomes to a file; continues a file that was begun, and can be repeated at any time."""
    configure_logs(level=log_level)
    shape = shape_of(
        output,
        success_only=success_only,
        fields=fields,
        messages=messages,
        messages_of=messages_of,
        ordered=ordered,
        part_mb=part_mb,
        shard=shard,
    )

    async def work() -> None:
        async with await Bus.connect(broker_url(server), name="matrix-bus collect") as bus:
            record = await registry.require(bus, run_id)
            flow = _flow_of(record)
            tally = run.Tally(flow)
            line = ProgressLine()
            written = await run.collect(
                bus,
                record,
                output,
                follow=follow,
                tally=tally,
                on_progress=lambda n: line.show(f"{n} outcomes"),
                shape=shape,
                flow=flow,
            )
            line.clear()
            say_kept(output, written)
            part = shape.shard
            label = f"{part.index}of{part.count}" if part.count > 1 else ""
            await run.write_manifest(bus, record.id, output, tally, {}, label)
            done = await registry.progress(bus, await registry.require(bus, run_id))
            of = f" of {done.total}" if done.total is not None else ", not sealed yet"
            if part.count > 1:
                of += f", this is shard {part}"
            say(f"{tally.rows}{of} outcomes of run {run_id}{written_text(output, written, tally.rows)}")

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
