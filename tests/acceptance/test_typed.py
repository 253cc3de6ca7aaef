"""A user's own typed program, checked strictly against the package as it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
from collections.abc import AsyncIterator
from typing import assert_type

import msgspec

import matrix_bus as mb


class Draft(mb.State):
    topic: str
    page: mb.Large[list[int]] = mb.Large([])


class Params(msgspec.Struct):
    most: int = 3


class Pool: ...


flow = mb.Workflow("draft", state=Draft, start="writer", config=Params)
assert_type(flow, mb.Workflow[Draft])


@flow.resource
async def pool(params: Params) -> AsyncIterator[Pool]:
    yield Pool()


@flow.role
async def writer(row: mb.Row[Draft], llm: mb.LLM, pool: Pool) -> mb.Next:
    assert_type(row.state, Draft)
    assert_type(await row.state.page.get(), list[int])
    reply = await llm.chat([mb.system("x"), mb.user("y")], model="judge", temperature=0.5)
    assert_type(reply, mb.Reply)
    assert_type(reply.text, str)
    return mb.to("judge")


@flow.role(model="judge", sampling=mb.Sampling(temperature=0.1), routes=["writer"])
def judge(row: mb.Row[Draft], params: Params) -> mb.Next | mb.Outcome:
    assert_type(row.turn, int)
    return mb.success() if row.turn > params.most else mb.to("writer")


@flow.metrics
def numbers(state: Draft, line: dict[str, str]) -> dict[str, float]:
    return {"topics": len(state.topic)}


async def trying() -> None:
    result = await flow.run_row({"topic": "x"}, llm=["a", mb.RateLimited("busy")])
    assert_type(result, mb.RowResult[Draft])
    assert_type(result.state, Draft)
    await flow.run_row({"topic": "x"}, llm=lambda request: request.model)


async def serving() -> None:
    async with mb.connect("nats://h:4222") as bus:
        assert_type(bus, mb.Client)
        run = await bus.submit("draft", [{"topic": "x"}], config={"most": 2})
        assert_type(run, mb.Run)
        async for outcome in run.outcomes():
            assert_type(outcome, mb.OutcomeRecord)
            assert_type(outcome.id, str)
        assert_type(await run.status(), mb.Status)
        assert_type((await run.status()).total, int | None)
        assert_type(await bus.runs(), list[mb.Run])


def notebook() -> None:
    with mb.connect_blocking() as bus:
        for outcome in bus.submit("draft", ["{}"]).outcomes():
            assert_type(outcome, mb.OutcomeRecord)
"""


def test_a_program_of_a_users_own_passes_mypy_strict(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout
