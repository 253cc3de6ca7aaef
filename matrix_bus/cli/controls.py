"""Commands that act on a run: pause, resume, set, retry, cancel, purge; and dead, for what nobody could read."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from .. import control, registry
from ..bus import Bus
from ..errors import ConfigError, UsageError
from . import app
from .common import RunArgument, Server, broker_url, go, say

T = TypeVar("T")

dead = typer.Typer(name="dead", help="Messages that no worker could read, kept until a person decides.")
app.add_typer(dead)

LetterArgument = Annotated[int, typer.Argument(metavar="NUMBER", help="As `matrix-bus dead list` shows it.")]


def _with_bus(server: str, work: Callable[[Bus], Awaitable[T]]) -> T:
    async def connected() -> T:
        async with await Bus.connect(broker_url(server), name="matrix-bus control") as bus:
            return await work(bus)

    return go(connected())


@app.command()
def pause(run_id: RunArgument, server: Server = "") -> None:
    """Hold a run up: workers start nothing more of it. Handlers at work finish, and what they did is kept."""
    _with_bus(server, lambda bus: control.pause(bus, run_id))
    say(f"run {run_id} is paused: matrix-bus resume {run_id} lets it go on")


@app.command()
def resume(run_id: RunArgument, server: Server = "") -> None:
    """Let a paused run go on, also one that paused itself because too many rows failed."""
    _with_bus(server, lambda bus: control.resume(bus, run_id))
    say(f"run {run_id} goes on")


@app.command("set")
def change(
    run_id: RunArgument,
    words: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE...", help="max_in_flight=500 roles.solver.slots=8 weight=2"),
    ],
    server: Server = "",
) -> None:
    """Change the limits of a run that goes on: max_in_flight, roles.ROLE.slots (per worker process), weight.

    Of two runs that share workers, the one of weight 2 gets twice as much as the one of weight 1.
    """
    max_in_flight: int | None = None
    weight: float | None = None
    slots: dict[str, int] = {}
    for word in words:
        key, equals, value = word.partition("=")
        try:
            if key == "max_in_flight":
                max_in_flight = int(value)
            elif key == "weight":
                weight = float(value)
            elif key.startswith("roles.") and key.endswith(".slots"):
                slots[key.removeprefix("roles.").removesuffix(".slots")] = int(value)
            else:
                raise ConfigError(
                    f"{word!r}: max_in_flight=N, roles.ROLE.slots=N and weight=X can be set while a run goes on"
                    + ("" if equals else ", and each needs a value")
                )
        except ValueError:
            raise ConfigError(f"{word!r}: {value!r} is not a number") from None
    _with_bus(server, lambda bus: control.change(bus, run_id, max_in_flight=max_in_flight, slots=slots, weight=weight))
    say(f"run {run_id}: {' '.join(words)}; workers follow within seconds")


@app.command()
def retry(
    run_id: RunArgument,
    failed: Annotated[bool, typer.Option("--failed", help="The rows whose last outcome is failed.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Only those that failed for this reason.")] = "",
    server: Server = "",
) -> None:
    """Send the failed rows of a run again, each as a new generation of the same row.

    Their new outcomes take the place of the old ones in what `collect` writes; the old ones are beside it.
    """
    if not failed:
        raise UsageError("say which rows: --failed, and --reason for some of them")
    sent = _with_bus(server, lambda bus: control.retry_failed(bus, run_id, reason=reason))
    of = f" with reason {reason!r}" if reason else ""
    if not sent:
        say(f"run {run_id} has no failed rows{of} that do not travel already")
        return
    say(f"{sent} failed rows of run {run_id}{of} are sent again: matrix-bus collect {run_id} --follow")


@app.command()
def cancel(run_id: RunArgument, server: Server = "") -> None:
    """End a run now. Rows without an outcome end as `filtered: cancelled`; all outcomes can still be collected."""
    ended = _with_bus(server, lambda bus: control.cancel(bus, run_id))
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

    async def work(bus: Bus) -> int:
        await registry.require(bus, run_id)
        if unreferenced:
            return await control.free_unreferenced(bus, run_id)
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError(f"purge deletes the outcomes of run {run_id} for good: say --yes if that is meant")
            typer.confirm(f"Delete run {run_id} with its outcomes from the broker?", abort=True)
        await control.purge(bus, run_id)
        return 0

    freed = _with_bus(server, work)
    say(f"{freed} large values of run {run_id} freed" if unreferenced else f"run {run_id} is deleted")


@dead.command("list")
def list_dead(
    run_id: Annotated[str, typer.Argument(metavar="[RUN]", help="Only those of this run.")] = "", server: Server = ""
) -> None:
    """List the dead letters: number, run, row, where from, size and reason."""

    async def work(bus: Bus) -> None:
        async for letter in control.dead_letters(bus, run_id):
            print(
                f"{letter.number}\t{letter.run}\trow {letter.row}\t{letter.subject}\t{len(letter.data)} bytes\t"
                f"{letter.reason}"
            )

    _with_bus(server, work)


@dead.command()
def show(number: LetterArgument, server: Server = "") -> None:
    """Write a dead letter's bytes to stdout, as they were."""
    letter = _with_bus(server, lambda bus: control.find(bus, number))
    say(f"{letter.subject}: {letter.reason}")
    sys.stdout.buffer.write(letter.data)


@dead.command()
def requeue(number: LetterArgument, server: Server = "") -> None:
    """Send the letter's row again from its beginning, and drop the letter."""
    _with_bus(server, lambda bus: control.requeue(bus, number))
    say("the row is sent again, and the letter is gone")


@dead.command()
def drop(number: LetterArgument, server: Server = "") -> None:
    """Delete a dead letter. Its row has its outcome, failed, all the same."""
    _with_bus(server, lambda bus: control.drop(bus, number))
    say(f"dead letter {number} is deleted")
