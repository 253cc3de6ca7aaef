"""What the commands share: options, the broker to talk to, the event loop."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..dataset import Shard
from ..run import Shape, parse_fields

T = TypeVar("T")

Server = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="MATRIX_BUS_SERVER",
        help="Broker, as nats://host:4222, or several of a cluster with commas. Without it: a local one, shared by "
        "your terminals, started when needed.",
    ),
]
LogLevel = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Logs as one JSON object a line.")]
WorkflowSpec = Annotated[
    str,
    typer.Option("--workflow", "-w", help="An installed workflow's name, my_flow.py, or module:attribute."),
]
OutputPath = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="Where outcomes go: .jsonl, .jsonl.gz, .jsonl.zst (a JSON object a line), or .parquet."
    ),
]
SuccessOnly = Annotated[bool, typer.Option("--success-only", help="Leave out all others.")]
Fields = Annotated[
    str,
    typer.Option(
        "--fields",
        metavar="NAME,…",
        help="Keep these alone: id,state.answer,text=state.page.text (docs/output.md has the keys of a line).",
    ),
]
Messages = Annotated[
    bool,
    typer.Option(
        "--messages",
        help="Rows as chats for training, {id, messages}: as the workflow says, else the last call with its answer.",
    ),
]
MessagesOf = Annotated[
    str,
    typer.Option("--messages-of", metavar="ROLE", help="The same, of this role's last call."),
]
Ordered = Annotated[bool, typer.Option("--ordered", help="By row, not in the order in which they finished.")]
PartMb = Annotated[
    int,
    typer.Option("--part-mb", min=0, help="Make the output a folder, with files of about so many MB."),
]


def shape_of(
    output: Path,
    *,
    success_only: bool,
    fields: str,
    messages: bool,
    messages_of: str,
    ordered: bool,
    part_mb: int,
    shard: str = "",
) -> Shape:
    """The form of an output. Raises `UsageError` if there is none such."""
    shape = Shape(
        success_only=success_only,
        fields=parse_fields(fields),
        messages=messages or bool(messages_of),
        messages_of=messages_of,
        ordered=ordered,
        part_bytes=part_mb * 1_000_000 or None,
        shard=Shard.parse(shard),
    )
    shape.check(output)
    return shape


RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="As `matrix-bus runs` lists it.")]


def go(work: Coroutine[Any, Any, T]) -> T:
    """Runs a command's coroutine on uvloop; only our own processes do, a host application keeps its loop."""
    relax_collector()
    try:
        import uvloop
    except ImportError:  # no build for this platform
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def relax_collector() -> None:
    """Has garbage be looked for seldom, and not among what is there now.

    A hop or a submitted row makes hundreds of objects that outlive a young collection and no cycles: with the default
    thresholds a quarter of a busy worker's time goes into looking for cycles among them.
    """
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def say(text: str) -> None:
    """To the person at the terminal; stdout stays free for results."""
    print(text, file=sys.stderr, flush=True)


def broker_url(server: str) -> str:
    """The broker to talk to; starts the user's local one if none is named."""
    if server:
        return server
    from ..broker import local_broker

    info = local_broker().ensure()
    if info.started_by_us:
        say(f"started a local broker at {info.url} (matrix-bus broker stop ends it)")
    return info.url


def embedded_model() -> str:
    """URL of the user's local model server, started if it does not run."""
    from matrix_serving import local_model

    info = local_model().ensure()
    if info.started_by_us:
        say(f"started the embedded model at {info.url} (matrix-bus serve stop ends it)")
    return info.url
