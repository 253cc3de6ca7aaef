"""The command line: what a user types, turned into calls; no logic of its own."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType

import typer

from ..errors import BusError, MatrixBusError, UsageError, WorkflowError
from ..telemetry import configure_logs

app = typer.Typer(
    name="matrix-bus",
    help="Multi-agent synthetic data generation as rows that travel over NATS JetStream.\n\n"
    "Start with `matrix-bus run FILE`: broker, model, workers and output in one command. To spread the work, run "
    "`matrix-bus worker` in as many terminals and machines as you like, and `matrix-bus submit FILE` in another.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `matrix-bus`. A user's mistake is one message and exit code 2, never a traceback of ours."""
    from . import endings, processes, runs, settings, submitting  # noqa: F401 - they register their commands

    configure_logs()
    try:
        app()
    except MatrixBusError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, WorkflowError) and error.__cause__ is not None:
            _print_user_frames(error.__cause__)
        sys.exit(2 if isinstance(error, UsageError | BusError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_user_frames(error: BaseException) -> None:
    """The traceback without our own frames and the import machinery's: what is left is the user's code."""
    frames = [
        f for f in traceback.extract_tb(_tb(error)) if "matrix_bus" not in f.filename and "<frozen" not in f.filename
    ]
    for line in traceback.format_list(frames) + traceback.format_exception_only(error):
        print(line, end="", file=sys.stderr)


def _tb(error: BaseException) -> TracebackType | None:
    return error.__traceback__
