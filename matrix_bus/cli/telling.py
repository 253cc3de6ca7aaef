"""What commands say about a run: how to go on without this terminal, who is missing."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from ..agent import installed_workflows
from ..dataset import Written
from ..errors import DatasetError
from ..registry import RunRecord
from .common import say

submitting: list[str] = []
"""The run that a Ctrl-C leaves alone, for the message that says so."""


def worker_command(record: RunRecord, roles: list[str], spec: str = "FILE") -> str:
    """What serves these roles; `spec` is what the workflow was loaded from, where that is known."""
    words = ["matrix-bus worker"]
    if record.workflow not in installed_workflows():
        words.append(f"--workflow {spec}")
    if set(roles) != set(record.roles):
        words += [f"--role {role}" for role in roles]
    return " ".join(words) + _server_option()


def paused_text(record: RunRecord) -> str:
    """Why a run is held up, and what to do about it."""
    server = _server_option()
    return (
        f"run {record.id} is paused: {record.why}\n"
        f"  to let it go on: matrix-bus resume {record.id}{server} · to end it: matrix-bus cancel {record.id}{server}"
    )


def _server_option() -> str:
    """What a command in another terminal must be told to reach the same broker."""
    server = next((word for flag, word in itertools.pairwise(sys.argv) if flag == "--server"), "")
    return f" --server {server}" if server else ""


def say_kept(output: Path, written: Written) -> None:
    """Says where an earlier output went."""
    if written.kept is not None:
        say(f"{output} was there from another run: kept as {written.kept}")


def written_text(output: Path, written: Written, outcomes: int) -> str:
    """` in out.jsonl`, or ` as 40 rows in 3 files of pages.parquet` where it is not simply all of them."""
    files = f"{len(written.files)} files of {output}" if len(written.files) > 1 else str(written.files[0])
    return f" in {files}" if written.rows == outcomes else f": {written.rows} rows in {files}"


@contextlib.contextmanager
def interruptible(output: Path) -> Iterator[None]:
    """Ctrl-C ends the waiting, not the run, and says so; so does an output that cannot be written."""
    try:
        yield
    except (KeyboardInterrupt, DatasetError):
        for run_id in submitting:
            server = _server_option()
            say(f"\nrun {run_id} goes on without this terminal: matrix-bus status {run_id}{server}")
            say(f"  its outcomes: matrix-bus collect {run_id} -o {output} --follow{server}")
            say(f"  if not all rows were submitted yet: the same command again, with --run {run_id}")
            say(f"  to end it: matrix-bus cancel {run_id}{server}")
        raise
