"""Rows that go on for too long, and runs whose rows mostly fail."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from matrix_bus import Next, Retry, RoleConfig, Row, RunConfig, control, registry, to
from matrix_bus.agent import load_workflow
from matrix_bus.bus import Bus
from matrix_bus.config import parse_run
from matrix_bus.orchestrator import OutcomeRecord, outcome_stream
from tests.helpers import all_outcomes, done, messages, submitted, unique, until, working
from tests.trip import Step, Trip, rows, trip


async def _turn(row: Row[Trip]) -> Next:
    return to("a")


async def _limited(bus: Bus, config: RunConfig, step: Step = _turn) -> OutcomeRecord:
    flow = trip(step)
    record = await submitted(bus, flow, rows(1), config)
    async with working(bus.url, flow):
        (outcome,) = await all_outcomes(bus, record)
    assert (outcome.outcome, outcome.reason) == ("failed", "limit")
    return outcome


async def test_a_row_ends_with_what_it_has_when_its_hops_are_used_up(bus: Bus) -> None:
    outcome = await _limited(bus, parse_run({"limits": {"hops": 5}}))
    assert json.loads(bytes(outcome.state))["path"] == ["a"] * 5
    assert [error.type for error in outcome.errors] == ["LimitReached"]
    assert "limits.hops=5" in outcome.errors[0].message


async def test_a_row_ends_when_its_time_is_up_while_it_travels(bus: Bus) -> None:
    async def slow(row: Row[Trip]) -> Next:
        await asyncio.sleep(0.05)
        return to("a")

    outcome = await _limited(bus, parse_run({"limits": {"row_s": 0.4}}), slow)
    assert outcome.hops >= 2
    assert "limits.row_s=0.4" in outcome.errors[-1].message


async def test_a_row_ends_when_its_time_is_up_inside_a_handler(bus: Bus) -> None:
    async def stay(row: Row[Trip]) -> Next:
        await asyncio.sleep(60)
        return to("b")

    outcome = await _limited(bus, parse_run({"limits": {"row_s": 0.5}}), stay)
    assert "limits.row_s=0.5" in outcome.errors[-1].message
    assert [error.type for error in outcome.errors] == ["TimeoutError", "LimitReached"]


HANGING = """
import time
import matrix_bus as mb

class Note(mb.State):
    hangs: bool = False

flow = mb.Workflow("NAME", state=Note, start="burn")

@flow.role(process=True)
def burn(row: mb.Row[Note]) -> mb.Outcome:
    while row.state.hangs:
        time.sleep(0.01)
    return mb.success()
"""


async def test_a_process_handler_that_hangs_holds_up_no_other(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    path = tmp_path / "hanging.py"
    path.write_text(HANGING.replace("NAME", unique("hanging")))
    flow: Any = load_workflow(str(path))
    async with working(bus.url, flow):
        config = RunConfig(roles={"burn": RoleConfig(timeout_s=0.1, max_attempts=2)})
        (hung,) = await all_outcomes(bus, await submitted(bus, flow, [b'{"hangs": true}'], config))
        (good,) = await all_outcomes(bus, await submitted(bus, flow, [b"{}"]))
    assert (hung.outcome, hung.reason, hung.attempts) == ("failed", "timeout", 2)
    assert (good.outcome, good.errors) == ("success", [])


async def test_a_retry_that_would_come_after_the_time_is_not_waited_for(bus: Bus) -> None:
    async def later(row: Row[Trip]) -> Next:
        raise Retry("not yet", after_s=3000)

    outcome = await _limited(bus, parse_run({"limits": {"row_s": 60}}), later)
    assert [error.type for error in outcome.errors] == ["Retry", "LimitReached"]


# --- runs that fail -------------------------------------------------------------------------------------------


async def _paused(bus: Bus, run: str) -> bool:
    return (await registry.require(bus, run)).state == "paused"


async def test_a_run_whose_rows_mostly_fail_pauses_itself_and_says_why(bus: Bus) -> None:
    broken = True

    async def fails(row: Row[Trip]) -> Next:
        await asyncio.sleep(0.01)
        if broken and row.number % 3:
            raise ValueError(f"no luck with {row.number}")
        return to("b")

    flow = trip(fails)
    config = parse_run({"limits": {"failed_window": 20}, "max_in_flight": 5})
    record = await submitted(bus, flow, rows(400), config)
    async with working(bus.url, flow):
        await until(partial(_paused, bus, record.id), "the run to pause itself")
        why = (await registry.require(bus, record.id)).why
        assert "of the last 20 outcomes failed" in why
        assert "error: ValueError" in why
        assert "no luck with" in why
        await asyncio.sleep(0.5)
        ended = await messages(bus, outcome_stream(record.id))
        assert ended < 400
        await asyncio.sleep(0.5)
        assert await messages(bus, outcome_stream(record.id)) == ended, "nothing goes on while it is paused"
        broken = False
        await control.resume(bus, record.id)
        outcomes = await all_outcomes(bus, record)
        assert await done(bus, record)
    failed = [o for o in outcomes if o.outcome == "failed"]
    assert 10 <= len(failed) < 200
    assert len(outcomes) == 400


async def test_a_run_that_should_not_be_paused_goes_on(bus: Bus) -> None:
    async def fails(row: Row[Trip]) -> Next:
        raise ValueError("always")

    flow = trip(fails)
    record = await submitted(bus, flow, rows(300), parse_run({"limits": {"failed_window": 0}}))
    async with working(bus.url, flow):
        outcomes = await all_outcomes(bus, record)
    assert {o.reason for o in outcomes} == {"error: ValueError"}
