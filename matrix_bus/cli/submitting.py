"""Commands that make a run: run, submit; and config, which shows with what."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import dataset, run
from ..agent import Workflow
from ..bus import Bus
from ..config import RunConfig
from ..errors import ConfigError, RunError
from ..registry import RunRecord
from ..telemetry import configure_logs
from . import app
from .common import (
    Fields,
    LogJson,
    LogLevel,
    Messages,
    MessagesOf,
    Ordered,
    OutputPath,
    PartMb,
    Server,
    SuccessOnly,
    WorkflowSpec,
    broker_url,
    embedded_model,
    go,
    say,
    shape_of,
)
from .feeding import Job, open_feed
from .settings import ConfigDir, Words, load
from .show import ProgressLine, summary
from .telling import interruptible, say_kept, written_text
from .watching import watched

RunId = Annotated[str, typer.Option("--run", help="Id of the run; the same id and data again continue it.")]
Strict = Annotated[bool, typer.Option("--strict", help="Submit nothing if a line cannot become a row.")]


@app.command("run")
def run_all(
    words: Words,
    workflow: WorkflowSpec = "coral",
    output: OutputPath = Path("out.jsonl"),
    success_only: SuccessOnly = False,
    fields: Fields = "",
    messages: Messages = False,
    messages_of: MessagesOf = "",
    ordered: Ordered = False,
    part_mb: PartMb = 0,
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
    shape = shape_of(
        output,
        success_only=success_only,
        fields=fields,
        messages=messages,
        messages_of=messages_of,
        ordered=ordered,
        part_mb=part_mb,
    )
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
            tally = go(_submit_and_wait(Job(url, flow, config, data, output, shape, run_id, strict), worker))
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
    success_only: SuccessOnly = False,
    fields: Fields = "",
    messages: Messages = False,
    messages_of: MessagesOf = "",
    ordered: Ordered = False,
    part_mb: PartMb = 0,
    run_id: RunId = "",
    strict: Strict = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once everything is submitted; collect later.")
    ] = False,
    shard: Annotated[
        str,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Submit only this part, as in 2/4: N submitters feed one --run, each reads the whole dataset.",
        ),
    ] = "",
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
    shape = shape_of(
        output,
        success_only=success_only,
        fields=fields,
        messages=messages,
        messages_of=messages_of,
        ordered=ordered,
        part_mb=part_mb,
    )
    data, flow, config = load(workflow, words, config_dir)
    run.new_record(flow, config)  # a mistake shows before a broker is started
    _say_missing_models(flow, config)
    part = dataset.Shard.parse(shard)
    if part.count > 1 and not run_id:
        raise ConfigError("--shard needs --run ID: all shards go into one run")
    job = Job(broker_url(server or config.broker.url), flow, config, data, output, shape, run_id, strict, part)
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


async def _detach(job: Job) -> RunRecord:
    async with await Bus.connect(job.url, name="matrix-bus submit") as bus:
        with dataset.repeatable(job.data, twice=job.strict) as path:
            feed = await open_feed(bus, path, job)
            line = ProgressLine()
            await feed.submit(bus, lambda rows: line.show(f"{rows} rows submitted") if rows >= 0 else line.clear())
    return feed.record


async def _submit_and_wait(job: Job, worker: subprocess.Popen[bytes] | None = None) -> run.Tally:
    async with await Bus.connect(job.url, name="matrix-bus submit") as bus:
        tally = run.Tally(job.flow)
        with dataset.repeatable(job.data, twice=job.strict) as path:
            feed = await open_feed(bus, path, job)
            async with watched(bus, feed, tally, worker, job.flow.spec) as line:
                collecting = asyncio.create_task(
                    run.collect(bus, feed.record, job.output, follow=True, tally=tally, shape=job.shape, flow=job.flow)
                )
                try:
                    # Outcomes are written while rows are still read; an output that fails holds up no row.
                    await feed.submit(bus, lambda rows: line.clear() if rows < 0 else None)
                    written = await collecting
                finally:
                    collecting.cancel()
                    await asyncio.gather(collecting, return_exceptions=True)
        say_kept(job.output, written)
        facts = {"model": _model_facts(job.flow, job.config)}
        manifest = await run.write_manifest(bus, feed.record.id, job.output, tally, facts)
        say(f"run {feed.record.id} is complete")
        say(summary(tally) if tally.rows else "  no rows")
        say(f"  output:{written_text(job.output, written, tally.rows).removeprefix(' in')} · manifest: {manifest}")
    return tally


def _model_facts(flow: Workflow[Any], config: RunConfig) -> dict[str, str]:
    if not _uses_embedded(flow, config):
        return {}
    from matrix_serving import model_facts

    return model_facts()
