"""A row by itself: what the author of a workflow tests with."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest

import matrix_bus as mb
from matrix_bus.errors import ConfigError, RowError, WorkflowError


class Draft(mb.State):
    topic: str
    text: str = ""
    page: mb.Large[str] = mb.Large("")
    draws: list[float] = []  # noqa: RUF012 - msgspec copies it


class Params(msgspec.Struct):
    tries: int = 3


def drafting() -> mb.Workflow[Draft]:
    flow = mb.Workflow("draft", state=Draft, start="writer", config=Params)

    @flow.role(sampling=mb.Sampling(temperature=0.5))
    async def writer(row: mb.Row[Draft], llm: mb.LLM) -> mb.Next:
        reply = await llm.chat([mb.system("Be brief."), mb.user(f"Describe {row.state.topic}")], max_tokens=7)
        row.state.text = reply.text
        row.state.draws.append(row.rng.random())
        row.state.draws.append(row.rng.random())
        return mb.to("judge")

    @flow.role(model="big")
    async def judge(row: mb.Row[Draft], llm: mb.LLM, params: Params) -> mb.Next | mb.Outcome:
        reply = await llm.chat([mb.user(row.state.text)])
        if "Yes" in reply.text:
            row.state.page = mb.Large(await row.state.page.get() + "x")
            return mb.success("good")
        return mb.filtered("rejected") if row.turn == params.tries else mb.to("writer")

    @flow.metrics
    def numbers(state: Draft, given: dict[str, Any]) -> dict[str, float]:
        return {"length": len(state.text), "given": len(given)}

    return flow


ROW = {"id": "a", "topic": "the sea"}


async def test_answers_in_order() -> None:
    result = await drafting().run_row(ROW, llm=["wide", "No", "wet", "Yes"])
    assert (result.kind, result.reason, result.state.text) == ("success", "good", "wet")
    assert result.path == ["writer", "judge", "writer", "judge"]
    assert [call["role"] for call in result.history] == result.path
    assert [call["text"] for call in result.history] == ["wide", "No", "wet", "Yes"]
    assert [call["model"] for call in result.history] == ["default", "big"] * 2
    assert result.history[0]["sampling"].keys() == {"temperature", "max_tokens", "seed"}
    assert (result.usage.calls, result.metrics, result.record.hops) == (4, {"length": 3, "given": 2}, 4)
    assert (result.record.id, result.record.outcome) == ("a", "success")
    assert await result.state.page.get() == "x"
    assert len(set(result.state.draws)) == 4, "one generator per call"


async def test_a_function_of_the_request() -> None:
    seen: list[mb.ChatRequest] = []

    async def answer(request: mb.ChatRequest) -> str:
        seen.append(request)
        return "No" if request.model == "big" else f"T{request.sampling.temperature}"

    result = await drafting().run_row(ROW, llm=answer, config={"tries": 2})
    assert (result.kind, result.reason, result.state.text) == ("filtered", "rejected", "T0.5")
    assert [request.messages[-1].content for request in seen] == ["Describe the sea", "T0.5"] * 2
    again = await drafting().run_row(ROW, llm=lambda request: "No", config=Params(tries=2))
    assert again.state.draws == result.state.draws
    other = await drafting().run_row(ROW, llm=lambda request: "No", config=Params(tries=2), seed=1)
    assert other.state.draws != result.state.draws


async def test_a_transient_error_is_retried_from_the_message() -> None:
    result = await drafting().run_row(ROW, llm=[mb.RateLimited("busy"), "wide", TimeoutError("slow"), "Yes"])
    assert (result.kind, result.path) == ("success", ["writer", "judge"])
    assert [(e.type, e.role, e.attempt) for e in result.record.errors] == [
        ("RateLimited", "writer", 1),
        ("TimeoutError", "judge", 1),
    ]
    assert len(result.state.draws) == 2
    assert (result.record.attempts, result.usage.calls) == (4, 4)
    with pytest.raises(mb.RateLimited):
        await drafting().run_row(ROW, llm=[mb.RateLimited("busy")] * 2, max_attempts=2)


@pytest.mark.parametrize(
    ("row", "given", "error", "what"),
    [
        ({}, {}, RowError, "missing required field `topic`"),
        (b"[]", {}, RowError, "does not fit"),
        ({"topic": {1, 2}}, {"llm": ["x"]}, RowError, "got `array`"),
        ({"topic": object()}, {}, RowError, "no form in JSON"),
        (ROW, {}, mb.HandlerError, "model call 1 has no answer left"),
        (ROW, {"llm": ["a"]}, mb.HandlerError, "model call 2 has no answer left"),
        (ROW, {"llm": "a"}, mb.HandlerError, "must be a list of answers or a function"),
        (ROW, {"llm": lambda request: 3}, mb.HandlerError, "llm answered 3"),
        (ROW, {"llm": [ValueError("mine")]}, ValueError, "mine"),
        (ROW, {"llm": lambda request: "No", "config": {"tries": 99}, "max_hops": 3}, mb.HandlerError, "after 3 hops"),
        (ROW, {"config": {"tires": 3}}, ConfigError, "did you mean 'tries'"),
        (ROW, {"resources": {int: 3}}, mb.HandlerError, "no resource of type"),
    ],
)
async def test_what_is_wrong_is_said(row: Any, given: dict[str, Any], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        await drafting().run_row(row, **given)


async def test_a_group_of_errors_is_retried_if_all_of_them_may_pass() -> None:
    flow = mb.Workflow("draft", state=Draft, start="end")

    @flow.role
    async def end(row: mb.Row[Draft]) -> mb.Outcome:
        errors: list[Exception] = [mb.RateLimited("busy"), ExceptionGroup("inner", [TimeoutError()])]
        if row.attempt == 2:
            errors.append(ValueError("mine"))
        raise ExceptionGroup("outer", errors)

    with pytest.raises(ExceptionGroup) as caught:
        await flow.run_row(ROW)
    assert caught.group_contains(ValueError), "it comes out as it is, from the second attempt"


async def test_an_outcome_that_a_worker_would_refuse_is_refused() -> None:
    flow = mb.Workflow("draft", state=Draft, start="end")

    @flow.role
    async def end(row: mb.Row[Draft]) -> mb.Outcome:
        return mb.failed(ValueError("no"))  # type: ignore[arg-type]

    with pytest.raises(mb.HandlerError, match=r"role 'end' .* reason ValueError\('no'\)"):
        await flow.run_row(ROW)


# --- resources --------------------------------------------------------------------------------------------------


class Pool:
    def __init__(self, size: int) -> None:
        self.size = size
        self.said: list[str] = []


class Judge:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool


LIFE: list[str] = []


def sharing() -> mb.Workflow[Draft]:
    LIFE.clear()
    flow = mb.Workflow("draft", state=Draft, start="think", config=Params)

    @flow.resource
    async def pool(params: Params) -> AsyncIterator[Pool]:
        LIFE.append("pool opens")
        yield Pool(params.tries)
        LIFE.append("pool closes")

    @flow.resource
    def judge(pool: Pool) -> Iterator[Judge]:
        LIFE.append(f"judge opens in {threading.current_thread() is not threading.main_thread()}")
        yield Judge(pool)
        LIFE.append("judge closes")

    @flow.resource
    async def plain() -> dict[str, int]:
        return {"a": 1}

    @flow.resource
    def never() -> bytes:
        raise AssertionError("nobody asks for it")

    @flow.role
    def think(row: mb.Row[Draft], judge: Judge) -> mb.Next:
        row.state.text = f"{judge.pool.size}"
        return mb.to("end")

    @flow.role
    async def end(row: mb.Row[Draft], pool: Pool, numbers: dict[str, int]) -> mb.Outcome:
        return mb.success(f"{pool.size} {numbers}")

    flow.check()
    return flow


async def test_resources_are_opened_in_order_and_closed_in_reverse() -> None:
    result = await sharing().run_row(ROW, config={"tries": 5})
    assert (result.reason, result.state.text) == ("5 {'a': 1}", "5")
    assert LIFE == ["pool opens", "judge opens in True", "judge closes", "pool closes"]


async def test_a_resource_that_is_replaced_is_not_opened() -> None:
    result = await sharing().run_row(ROW, resources={Judge: Judge(Pool(8))})
    assert (result.reason, result.state.text) == ("3 {'a': 1}", "8")
    assert LIFE == ["pool opens", "pool closes"]


async def test_a_resource_that_does_not_open() -> None:
    flow = mb.Workflow("draft", state=Draft, start="think")

    @flow.resource
    def pool() -> Pool:
        raise ConnectionError("nobody there")

    @flow.role
    async def think(row: mb.Row[Draft], pool: Pool) -> mb.Outcome:
        return mb.success()

    with pytest.raises(mb.MatrixBusError, match="resource 'pool' cannot be opened: ConnectionError: nobody there"):
        await flow.run_row(ROW)


def declared(*resources: Any, process: bool = False) -> str:
    """Why a workflow with these resources is refused; the last one's type is asked for."""
    flow = mb.Workflow("draft", state=Draft, start="think", config=Params)

    def think(row: mb.Row[Draft], pool: Pool) -> mb.Outcome:
        return mb.success()

    flow.role(process=process)(think)
    with pytest.raises(WorkflowError) as caught:
        for resource in resources:
            flow.resource(resource)
        flow.check()
    return str(caught.value)


def test_what_cannot_be_a_resource() -> None:
    def untyped():  # type: ignore[no-untyped-def]
        return Pool(1)

    def bare() -> Iterator:  # type: ignore[type-arg]
        yield Pool(1)

    def pool() -> Pool:
        return Pool(1)

    def another() -> Pool:
        return Pool(2)

    def of_row(row: Draft) -> Pool:
        return Pool(2)

    def model() -> mb.LLM:
        raise NotImplementedError

    async def elsewhere() -> Pool:
        return Pool(1)

    assert "must say the type that handlers ask for, such as -> Pool" in declared(untyped)
    assert "such as -> Iterator[Pool]" in declared(bare)
    assert "has two resources of type" in declared(pool, another)
    assert "asks for 'row' of type" in declared(of_row)
    assert "which handlers have already" in declared(model)
    assert "must be a function, not Pool" in declared(Pool(1))
    assert "has no event loop for the resource 'elsewhere': make that a plain def" in declared(elsewhere, process=True)
    assert "which nothing provides: @flow.resource declares what does" in declared()

    def number() -> int:
        return 3

    assert "which nothing provides; the resources are number" in declared(number)


def test_it_runs_in_a_program_without_a_loop() -> None:
    result = asyncio.run(
        drafting().run_row(
            ROW,
            llm=lambda request: mb.Reply(
                text="Yes", finish_reason="stop", model="m", endpoint="e", usage=mb.Usage(prompt_tokens=2, calls=1)
            ),
        )
    )
    assert (result.usage.prompt_tokens, result.usage.calls) == (4, 2)
