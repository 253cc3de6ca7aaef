"""Dead letters: messages that no worker could read, kept with the reason until a person decides."""

from __future__ import annotations

from collections.abc import AsyncIterator

from msgspec import Struct

from ..bus import Bus, Stored
from ..errors import RunError
from ..registry import DEAD
from .retrying import retry_failed


class DeadLetter(Struct, frozen=True, kw_only=True):
    """One message that could not be read; its row has ended as failed."""

    number: int
    """What it is called by: its sequence in the stream of dead letters."""
    run: str
    row: int
    subject: str
    """Where it came from."""
    reason: str
    data: bytes


async def dead_letters(bus: Bus, run: str = "") -> AsyncIterator[DeadLetter]:
    """All dead letters, oldest first, or those of one run. Raises `BusError`."""
    async for message in bus.read_if_there(DEAD, subject=f"dead.{run}.*" if run else "dead.>"):
        yield _letter(message)


def _letter(message: Stored) -> DeadLetter:
    _, run, row = message.subject.split(".")
    return DeadLetter(
        number=message.seq,
        run=run,
        row=int(row),
        subject=message.headers.get("Mb-Subject", ""),
        reason=message.headers.get("Mb-Reason", ""),
        data=message.data,
    )


async def find(bus: Bus, number: int) -> DeadLetter:
    """The dead letter of that number. Raises `RunError`, naming those there are."""
    known = []
    async for letter in dead_letters(bus):
        if letter.number == number:
            return letter
        known.append(str(letter.number))
    raise RunError(f"no dead letter {number}; there are: {', '.join(known[:20]) or 'none'}")


async def requeue(bus: Bus, number: int) -> None:
    """Sends the letter's row again from its beginning, as its next generation, and drops the letter.

    Raises `RunError`, and keeps the letter, if the row is not failed any more or travels already.
    """
    letter = await find(bus, number)
    if not await retry_failed(bus, letter.run, rows=frozenset({letter.row})):
        raise RunError(
            f"row {letter.row} of run {letter.run!r} is not failed any more, or travels already: "
            f"letter {number} is kept"
        )
    await drop(bus, number)


async def drop(bus: Bus, number: int) -> None:
    """Deletes a dead letter; the row's outcome stays. Raises `RunError` if there is none of that number."""
    await find(bus, number)
    await bus.api(f"STREAM.MSG.DELETE.{DEAD}", {"seq": number})
