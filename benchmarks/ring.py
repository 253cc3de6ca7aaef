"""The workflow of the scale benchmark: rows that go round a ring of roles, waiting at each as long as they are told.

A row makes the same number of hops however many roles there are, and goes to all of them evenly. It carries a text
of its own, which its last hop reads; so whatever the row weighs is written, carried and read.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from matrix_bus import Large, Next, Outcome, Row, State, Workflow, success, to

ROLES = (4, 16, 64)
"""There is a ring of each of these sizes: `ring_4` and so on."""
_FILLER = "So the step holds, and the next one follows from what was said here and from nothing else. "
_LOOK_S = 0.1


class Trip(msgspec.Struct, frozen=True):
    """What all rows of a run do."""

    hops: int = 8
    wait_s: float = 0.0
    """In the handler, at each hop."""
    gate: str = ""
    """Rows wait at their first hop until this file is there, and then for a random part of `wait_s`."""


class Traveller(State):
    """A row's text, and what its handlers leave for the check."""

    text: Large[str]
    passed: int = 0
    crc32: int = 0


class Gate:
    """What rows wait at."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()


def line(n: int, size: int) -> bytes:
    """A line of the dataset, of `size` bytes and a little more; no two are alike."""
    return msgspec.json.encode({"id": f"r{n}", "text": _text(n, size)})


def crc32(n: int, size: int) -> int:
    """What the last hop of row `n` finds."""
    return zlib.crc32(_text(n, size).encode())


def _text(n: int, size: int) -> str:
    return (f"{n}: " + _FILLER * (size // len(_FILLER) + 1))[:size]


def ring(roles: int) -> Workflow[Traveller]:
    """A workflow of so many roles that are all alike."""
    flow = Workflow(f"ring_{roles}", state=Traveller, start="r0", config=Trip)
    names = [f"r{number}" for number in range(roles)]

    @flow.resource
    async def gate(trip: Trip) -> AsyncIterator[Gate]:
        made = Gate()
        watching = asyncio.create_task(_open_with(made, trip.gate))
        yield made
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    async def step(row: Row[Traveller], trip: Trip, gate: Gate) -> Next | Outcome:
        wait_s = trip.wait_s
        if trip.gate and row.hop == 1:
            await gate.opened.wait()
            wait_s *= row.rng.random()
        if wait_s:
            await asyncio.sleep(wait_s)
        row.state.passed += 1
        if row.hop < trip.hops:
            return to(names[(row.number + row.hop) % roles])
        row.state.crc32 = zlib.crc32((await row.state.text.get()).encode())
        return success()

    for name in names:
        flow.role(name=name, routes=names)(step)
    return flow


async def _open_with(gate: Gate, path: str) -> None:
    while path and not Path(path).exists():  # noqa: ASYNC110, ASYNC240 - ten looks a second
        await asyncio.sleep(_LOOK_S)
    gate.opened.set()


ring_4, ring_16, ring_64 = map(ring, ROLES)
