"""Answers that are kept: a hop that is executed again, and a run that is repeated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from matrix_bus import LLM, Outcome, Row, RunConfig, Workflow, answers, control, success, user
from matrix_bus.bus import Bus
from matrix_bus.config import parse_run
from tests.helpers import all_outcomes, messages, submitted, unique, until, working
from tests.integration.test_endpoints import Said, Server


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = await Server().start()
    yield made
    made.gate.set()
    await made.stop()


def config(server: Server, cache: str) -> RunConfig:
    return parse_run({"llm": {"model": "m", "urls": [server.url], "cache": cache}, "ack_wait_s": 1})


def talking(calls: int, *, last: str = "", stop_after: int = 99) -> tuple[Workflow[Said], asyncio.Event]:
    """One hop of so many calls; it stands still after some of them, until it is told to go on."""
    flow = Workflow(unique("talking"), state=Said, start="talk")
    flow.code_hash = "of-this-test"
    go_on = asyncio.Event()

    @flow.role
    async def talk(row: Row[Said], llm: LLM) -> Outcome:
        for number in range(calls):
            if number == stop_after:
                row.state.text = "waits"
                await go_on.wait()
            text = last if last and number == calls - 1 else f"call {number}"
            row.state.text = (await llm.chat([user(text)])).text
        return success()

    return flow, go_on


async def test_a_hop_that_is_executed_again_repeats_only_what_was_not_answered(bus: Bus, server: Server) -> None:
    flow, go_on = talking(5, stop_after=3)
    record = await submitted(bus, flow, [b"{}"], config(server, "run"))
    async with working(bus.url, flow):
        await until(lambda: server.calls == 3, "three answers")
    go_on.set()
    async with working(bus.url, flow):
        (outcome,) = await all_outcomes(bus, record)
    assert server.calls == 5
    assert [call.get("cached", False) for call in map(msgspec.json.decode, outcome.history)] == [True] * 3 + [False] * 2
    assert outcome.usage.calls == 2
    await control.purge(bus, record.id)
    assert await answers_of(bus, record.id) == 0


async def answers_of(bus: Bus, run: str) -> int:
    return len([m async for m in bus.read("KV_mb_answers", subject=f"$KV.mb_answers.{run}.*")])


async def test_a_run_that_is_repeated_pays_for_what_changed(bus: Bus, server: Server) -> None:
    said = unique("q")
    for last, cache, expected in (
        ("first", "shared", 20),
        ("second", "shared", 25),
        ("second", "shared", 25),
        ("second", "run", 45),
        ("second", "off", 65),
    ):
        flow, _ = talking(4, last=f"{said} {last}")
        record = await submitted(bus, flow, [b'{"text": "%d"}' % n for n in range(5)], config(server, cache))
        async with working(bus.url, flow):
            outcomes = await all_outcomes(bus, record)
        assert {o.outcome for o in outcomes} == {"success"}
        assert server.calls == expected, (last, cache)


async def test_a_bucket_that_is_gone_costs_only_the_calls(bus: Bus, server: Server) -> None:
    flow, _ = talking(2)
    record = await submitted(bus, flow, [b"{}"], config(server, "run"))
    await bus.api("STREAM.DELETE.KV_mb_answers")
    try:
        async with working(bus.url, flow):
            (outcome,) = await all_outcomes(bus, record)
        assert (outcome.outcome, server.calls) == ("success", 2)
    finally:
        await answers.prepare(bus)
        assert await messages(bus, "KV_mb_answers") == 0
