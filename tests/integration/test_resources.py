"""Resources in real workers: opened once for all runs that share them, closed with the last, waited for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import matrix_bus as mb
from matrix_bus.agent import load_workflow
from matrix_bus.bus import Bus
from tests.helpers import all_outcomes, done, submitted, unique, until, working


class Note(mb.State):
    x: int = 0


class Params(msgspec.Struct):
    size: int = 1


class Pool:
    def __init__(self, size: int) -> None:
        self.size = size


class Life:
    """What happened to the resources of a test's workflow."""

    def __init__(self) -> None:
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.fails = False
        self.gate = asyncio.Event()
        self.gate.set()


def lively(life: Life) -> mb.Workflow[Note]:
    flow = mb.Workflow(unique("note"), state=Note, start="think", config=Params)
    flow.code_hash = "of-this-test"

    @flow.resource
    async def pool(params: Params) -> AsyncIterator[Pool]:
        await life.gate.wait()
        if life.fails:
            raise ConnectionError("the database is down")
        life.opened.append(params.size)
        async with asyncio.timeout(3600):  # its end must be in the task of its beginning
            yield Pool(params.size)
        life.closed.append(params.size)

    @flow.role
    async def think(row: mb.Row[Note], pool: Pool) -> mb.Next:
        return mb.to("end")

    @flow.role
    def end(row: mb.Row[Note], pool: Pool) -> mb.Outcome:
        return mb.success(str(pool.size))

    return flow


def sized(size: int) -> mb.RunConfig:
    return mb.RunConfig(workflow={"size": size})


async def test_one_for_all_runs_with_the_same_parameters(bus: Bus) -> None:
    life = Life()
    flow = lively(life)
    async with working(bus.url, flow):
        records = [await submitted(bus, flow, [b"{}"] * 20, sized(size)) for size in (1, 1, 2)]
        found = [{o.reason for o in await all_outcomes(bus, record)} for record in records]
        assert found == [{"1"}, {"1"}, {"2"}]
        assert sorted(life.opened) == [1, 2]
        assert life.closed == []
    assert sorted(life.closed) == [1, 2]


async def test_a_run_waits_for_what_does_not_open_and_others_go_on(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    life, other = Life(), Life()
    life.fails = True
    flow, beside = lively(life), lively(other)
    async with working(bus.url, flow), working(bus.url, beside):
        record = await submitted(bus, flow, [b"{}"] * 5)
        await until(lambda: "ConnectionError: the database is down" in caplog.text, "the worker to say why")
        assert "test_resources.py" in caplog.text, "where it was raised"
        assert not await done(bus, record)
        life.fails = False
        assert {o.reason for o in await all_outcomes(bus, record, 30)} == {"1"}
    assert life.closed == [1]


async def test_a_resource_that_takes_long_holds_back_only_its_own_run(bus: Bus) -> None:
    life = Life()
    flow = lively(life)
    async with working(bus.url, flow) as worker:
        first = await submitted(bus, flow, [b"{}"] * 5, sized(1))
        await all_outcomes(bus, first)
        life.gate.clear()
        slow = await submitted(bus, flow, [b"{}"] * 5, sized(2))
        await until(lambda: slow.id in worker._opening, "the worker to open the run")
        same = await submitted(bus, flow, [b"{}"] * 5, sized(1))
        await all_outcomes(bus, same)
        assert not await done(bus, slow)
        life.gate.set()
        assert {o.reason for o in await all_outcomes(bus, slow)} == {"2"}


async def test_a_worker_stops_while_a_resource_opens(bus: Bus) -> None:
    life = Life()
    life.gate.clear()
    flow = lively(life)
    async with working(bus.url, flow) as worker:
        record = await submitted(bus, flow, [b"{}"])
        await until(lambda: record.id in worker._opening, "the worker to open the run")
    assert (life.opened, life.closed) == ([], [])


IN_A_PROCESS = """
import os
from collections.abc import Iterator
import msgspec
import matrix_bus as mb

class Note(mb.State):
    x: int = 0

class Params(msgspec.Struct):
    folder: str = ""

class Pool:
    def __init__(self) -> None:
        self.uses = 0

flow = mb.Workflow("NAME", state=Note, start="burn", config=Params)

@flow.resource
def pool(params: Params) -> Iterator[Pool]:
    made = Pool()
    open(f"{params.folder}/opened-{os.getpid()}", "x").close()
    yield made
    open(f"{params.folder}/closed-{os.getpid()}", "x").close()

@flow.role(process=True)
def burn(row: mb.Row[Note], pool: Pool, params: Params) -> mb.Outcome:
    pool.uses += 1
    return mb.success(f"{os.getpid()} {params.folder != ''}")
"""


async def test_each_process_has_its_own(bus: Bus, tmp_path: Path) -> None:
    path = tmp_path / "burning.py"
    path.write_text(IN_A_PROCESS.replace("NAME", unique("burn")))
    flow: Any = load_workflow(str(path))
    notes = tmp_path / "notes"
    notes.mkdir()
    async with working(bus.url, flow):
        record = await submitted(bus, flow, [b"{}"] * 30, mb.RunConfig(workflow={"folder": str(notes)}))
        outcomes = await all_outcomes(bus, record, 40)
    pids = {o.reason.split()[0] for o in outcomes}
    assert {o.reason.split()[1] for o in outcomes} == {"True"}
    opened = {path.name.removeprefix("opened-") for path in notes.glob("opened-*")}
    assert pids <= opened and str(os.getpid()) not in opened
    await until(lambda: len(list(notes.glob("closed-*"))) == len(opened), "each process to close its own")
