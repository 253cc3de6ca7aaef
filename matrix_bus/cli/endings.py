"""Commands that end runs: cancel, purge."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import control
from ..bus import Bus
from ..errors import UsageError
from . import app
from .common import RunArgument, Server, broker_url, go, say


@app.command()
def cancel(run_id: RunArgument, server: Server = "") -> None:
    """End a run now. Rows without an outcome end as `filtered: cancelled`; all outcomes can still be collected."""

    async def work() -> int:
        async with await Bus.connect(broker_url(server), name="matrix-bus cancel") as bus:
            return await control.cancel(bus, run_id)

    ended = go(work())
    say(f"run {run_id} is cancelled: {ended} rows ended as filtered: cancelled")
    say(f"  its outcomes: matrix-bus collect {run_id} · to free its space: matrix-bus purge {run_id}")


@app.command()
def purge(
    run_id: RunArgument,
    unreferenced: Annotated[
        bool, typer.Option("--unreferenced", help="Only the large values that no outcome refers to.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: Server = "",
) -> None:
    """Delete what a run has on the broker: its queue, its outcomes and its large values. Files are not touched."""
    if not (unreferenced or yes):
        if not sys.stdin.isatty():
            raise UsageError(f"purge deletes the outcomes of run {run_id} for good: say --yes if that is meant")
        typer.confirm(f"Delete run {run_id} with its outcomes from the broker?", abort=True)

    async def work() -> int:
        async with await Bus.connect(broker_url(server), name="matrix-bus purge") as bus:
            if unreferenced:
                return await control.free_unreferenced(bus, run_id)
            await control.purge(bus, run_id)
            return 0

    freed = go(work())
    say(f"{freed} large values of run {run_id} freed" if unreferenced else f"run {run_id} is deleted")
