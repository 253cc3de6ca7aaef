"""A workflow of two roles that do what a test says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from matrix_bus import Next, Outcome, Row, State, Workflow, success
from tests.helpers import unique


class Trip(State):
    x: int = 0
    path: list[str] = []  # noqa: RUF012 - msgspec copies it
    draw: float = 0.0
    text: str = ""


Step = Callable[[Row[Trip]], Awaitable[Any]]


async def go_on(row: Row[Trip]) -> Next:
    return Next("b")


async def end(row: Row[Trip]) -> Outcome:
    return success("done")


def trip(a: Step = go_on, b: Step = end, name: str = "") -> Workflow[Trip]:
    """Two roles; each notes its call in the state, then does what the test says.

    Of a name of its own, so that its worker leaves the runs of other tests alone.
    """
    flow = Workflow(name or unique("trip"), state=Trip, start="a")
    flow.code_hash = "of-this-test"

    async def call_a(row: Row[Trip]) -> Any:
        row.state.path.append("a")
        return await a(row)

    async def call_b(row: Row[Trip]) -> Any:
        row.state.path.append("b")
        return await b(row)

    flow.role(name="a")(call_a)
    flow.role(name="b")(call_b)
    return flow


def rows(count: int) -> list[bytes]:
    return [b'{"x": %d}' % n for n in range(count)]
