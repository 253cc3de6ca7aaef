"""Where a handler sends its rows, read from its source."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import matrix_bus as mb
from matrix_bus import Next, Outcome, Row, State, Workflow, failed, filtered, success, to
from matrix_bus.agent.routes import Routes, read_routes
from matrix_bus.errors import HandlerError, WorkflowError

JUDGE = "judge"
NUMBER = 3


class Names:
    JUDGE = "judge"


class Draft(State):
    text: str = ""


async def one(row: Row[Draft]) -> Next:
    return to("judge")


async def dotted(row: Row[Draft]) -> Next:
    return mb.to(JUDGE)


async def of_a_class(row: Row[Draft]) -> Next:
    return mb.Next(role=Names.JUDGE)


async def either(row: Row[Draft]) -> Next | Outcome:
    if row.turn > 3:
        return filtered("rejected" if row.trial else "tired")
    return to("judge" if row.state.text else "writer")


async def by_variable(row: Row[Draft]) -> Next | Outcome:
    name = "judge"
    if row.turn > 1:
        name = "writer"
    decision = to(name) if row.trial else success()
    return decision


async def by_helper(row: Row[Draft]) -> Next | Outcome:
    return await helper(row) if row.trial else again()


async def helper(row: Row[Draft]) -> Next | Outcome:
    return failed("odd") if row.turn else await by_helper(row)


def again() -> Next:
    return to("writer")


async def with_inner_function(row: Row[Draft]) -> Next:
    def inner() -> Next:
        return to("nobody")

    inner()
    return to("judge")


async def with_constants(row: Row[Draft]) -> Outcome:
    return Outcome("filtered", f"at {row.turn}")


async def of_state(row: Row[Draft]) -> Next:
    return to(row.state.text)


async def of_parameter(row: Row[Draft], name: str = "judge") -> Next:
    return to(name)


async def of_loop(row: Row[Draft]) -> Next | Outcome:
    for name in ("a", "b"):
        if name in row.state.text:
            return to(name)
    return success()


async def of_number(row: Row[Draft]) -> Next:
    return to(NUMBER)  # type: ignore[arg-type]


async def itself_assigned(row: Row[Draft]) -> Next:
    name = "judge"
    name = name + "" if row.trial else name
    return to(name)


JUDGED = ("judge",)


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (one, Routes(JUDGED)),
        (dotted, Routes(JUDGED)),
        (of_a_class, Routes(JUDGED)),
        (either, Routes(("judge", "writer"), (("filtered", "rejected"), ("filtered", "tired")))),
        (by_variable, Routes(("judge", "writer"), (("success", ""),))),
        (by_helper, Routes(("writer",), (("failed", "odd"),))),
        (with_inner_function, Routes(JUDGED)),
        (with_constants, Routes((), (("filtered", None),))),
        (of_state, Routes(complete=False)),
        (of_parameter, Routes(complete=False)),
        (of_loop, Routes((), (("success", ""),), complete=False)),
        (of_number, Routes(complete=False)),
        (itself_assigned, Routes(complete=False)),
    ],
)
def test_what_the_source_says(handler: Callable[..., Any], expected: Routes) -> None:
    assert read_routes(handler) == expected


def test_a_name_of_an_enclosing_function() -> None:
    there = "judge"

    async def writer(row: Row[Draft]) -> Next:
        return to(there)

    assert read_routes(writer) == Routes(JUDGED)


def made(**settings: Any) -> Workflow[Draft]:
    flow = Workflow("w", state=Draft, start="a")

    @flow.role(**settings)
    async def a(row: Row[Draft]) -> Next:
        return to(row.state.text)

    @flow.role
    async def b(row: Row[Draft]) -> Outcome:
        return success()

    return flow


def test_declared_routes_are_checked_and_kept() -> None:
    made(routes=["b"]).check()
    with pytest.raises(WorkflowError, match="sends rows to 'bb', the roles are a, b; did you mean 'b'"):
        made(routes=["bb"]).check()
    assert asyncio.run(made(routes=["b"]).run_row({"text": "b"})).path == ["a", "b"]
    with pytest.raises(HandlerError, match="sent the row to 'a', which is not among the routes that it declares: b"):
        asyncio.run(made(routes=["b"]).run_row({"text": "a"}))
    with pytest.raises(HandlerError, match="sent the row to 'c'; the roles are a, b"):
        asyncio.run(made().run_row({"text": "c"}))
