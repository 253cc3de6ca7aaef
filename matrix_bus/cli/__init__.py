"""The command line: what a user types, turned into calls; no logic of its own."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from ..errors import BusError, MatrixBusError, ModelError, UsageError, WorkflowError, user_frames
from ..telemetry import configure_logs
from .menu import Menu


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"matrix-bus {version('matrix-bus')}")
        raise typer.Exit


app = typer.Typer(
    name="matrix-bus",
    help="Multi-agent synthetic data generation as rows that travel over NATS JetStream.\n\n"
    "Start with `matrix-bus run FILE`: broker, model, workers and output in one command. To spread the work, run "
    "`matrix-bus worker` in as many terminals and machines as you like, and `matrix-bus submit FILE` in another.",
    cls=Menu,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _everywhere(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of `matrix-bus`. A user's mistake is one message and exit code 2, never a traceback of ours."""
    configure_logs()
    try:
        app()
    except MatrixBusError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, WorkflowError) and error.__cause__ is not None:
            cause = error.__cause__
            print("\n".join([user_frames(cause), *traceback.format_exception_only(cause)]), end="", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError | BusError | ModelError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
