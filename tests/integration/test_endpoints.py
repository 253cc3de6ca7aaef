"""Model servers that announce themselves: found, followed, and missed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from matrix_bus import LLM, Outcome, Row, State, Workflow, endpoints, success, user
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.config import parse_run
from matrix_bus.endpoints import Beacon, Change, Replica
from tests.helpers import all_outcomes, connected, submitted, unique, until, working


class Server:
    """A model server that answers when it may, and can be killed."""

    def __init__(self) -> None:
        self.calls = 0
        self.gate = asyncio.Event()
        self.gate.set()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.url = ""

    async def start(self) -> Server:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _chat(self, _: web.Request) -> web.StreamResponse:
        self.calls += 1
        await self.gate.wait()
        return web.json_response({"choices": [{"message": {"content": self.url}}]})


@pytest.fixture
async def servers() -> AsyncIterator[list[Server]]:
    made = [await Server().start() for _ in range(2)]
    yield made
    for server in made:
        server.gate.set()
        await server.stop()


class Said(State):
    text: str = ""


def asking() -> Workflow[Said]:
    flow = Workflow(unique("asking"), state=Said, start="ask")
    flow.code_hash = "of-this-test"

    @flow.role
    async def ask(row: Row[Said], llm: LLM) -> Outcome:
        row.state.text = (await llm.chat([user("who?")])).text
        return success()

    return flow


async def beaming(bus: Bus, beacon: Beacon) -> asyncio.Task[None]:
    await endpoints.prepare(bus)
    return asyncio.create_task(beacon.run())


async def test_what_is_announced_is_listed_and_what_falls_silent_is_not(bus: Bus) -> None:
    model = unique("m/with.dots")
    beacon = Beacon(bus)
    task = await beaming(bus, beacon)
    changes: list[Change] = []

    async def follow() -> None:
        async for change in endpoints.watch(bus, model):
            changes.append(change)  # noqa: PERF401 - as they come

    following = asyncio.create_task(follow())
    beacon.show(Replica(id="a", model=model, url="http://a/v1", capacity=2.0))
    beacon.show(Replica(id="b", model=model, url="http://b/v1"))
    both = {"http://a/v1": 2.0, "http://b/v1": 1.0}
    await until(lambda: changes and _capacities(changes[-1]) == both, "both replicas")
    assert [r.url for r in await endpoints.listing(bus) if r.model == model] == ["http://a/v1", "http://b/v1"]
    beacon.show(Replica(id="b", model=model, url="http://b/v1", state="draining"))
    await until(lambda: _capacities(changes[-1]) == {"http://a/v1": 2.0}, "one that drains to be left out")
    assert changes[-1].lost == frozenset(), "its calls go on"
    await beacon.hide("b")
    task.cancel()  # kill -9
    await until(lambda: changes[-1].up == {}, "silence to be noticed")
    assert changes[-1].lost == {"http://a/v1"}
    await until(lambda: _listed(bus, model, 0), "its key to expire")
    following.cancel()


async def test_whoever_begins_to_watch_is_told_of_all_replicas_at_once(bus: Bus) -> None:
    model = unique("m")
    beacon = Beacon(bus)
    task = await beaming(bus, beacon)
    for name in "abc":
        beacon.show(Replica(id=name, model=model, url=f"http://{name}/v1"))
    await until(lambda: _listed(bus, model, 3), "their keys")
    for _ in range(5):  # at any moment between two heartbeats
        async with contextlib.aclosing(endpoints.watch(bus, model)) as changes:
            first = await anext(changes)
        assert set(first.up) == {"http://a/v1", "http://b/v1", "http://c/v1"}
        await asyncio.sleep(0.13)
    task.cancel()


def _capacities(change: Change) -> dict[str, float]:
    return {url: replica.capacity for url, replica in change.up.items()}


async def _listed(bus: Bus, model: str, count: int) -> bool:
    return len([replica for replica in await endpoints.listing(bus) if replica.model == model]) == count


async def test_a_broker_that_is_away_does_not_make_servers_vanish(broker: Broker) -> None:
    async with connected(broker.url) as ours, connected(broker.url) as theirs:
        beacon = Beacon(theirs)
        task = await beaming(theirs, beacon)
        beacon.show(Replica(id="a", model="m", url="http://a/v1"))
        changes: list[Change] = []

        async def follow() -> None:
            async for change in endpoints.watch(ours, "m"):
                changes.append(change)  # noqa: PERF401 - as they come

        following = asyncio.create_task(follow())
        await until(lambda: changes and changes[-1].up, "the replica")
        broker.kill()
        await asyncio.sleep(2 * endpoints.EXPIRES_S)
        broker.start()
        await until(lambda: ours.epoch == 1 and theirs.epoch == 1, "both to be back")
        await asyncio.sleep(1.5 * endpoints.EXPIRES_S)
        assert [_capacities(change) for change in changes if change.up] == [{"http://a/v1": 1.0}]
        assert changes[-1].up
        following.cancel()
        task.cancel()


async def test_replicas_take_load_when_they_come_and_give_it_up_when_they_die(bus: Bus, servers: list[Server]) -> None:
    first, second = servers
    model = unique("m")
    flow = asking()
    config = parse_run({"llm": {"model": model, "concurrency": 4, "sticky": False, "timeout_s": 600}})
    beacons = [Beacon(bus), Beacon(bus)]
    tasks = [await beaming(bus, beacon) for beacon in beacons]
    record = await submitted(bus, flow, [b"{}"] * 40, config)
    async with working(bus.url, flow):
        await asyncio.sleep(0.3)
        assert first.calls == second.calls == 0, "they wait for a server"
        first.gate.clear()
        beacons[0].show(Replica(id="first", model=model, url=first.url))
        await until(lambda: first.calls == 4, "the first to be given calls")
        beacons[1].show(Replica(id="second", model=model, url=second.url))
        await until(lambda: second.calls >= 20, "the second to take load in the middle of the run")
        tasks[0].cancel()  # the first hangs with four calls in it, and is not heard of any more
        outcomes = await all_outcomes(bus, record)
    assert {o.outcome for o in outcomes} == {"success"}
    assert {(o.attempts, len(o.errors)) for o in outcomes} == {(1, 0)}, "no hop was retried"
    assert {server.calls for server in servers} == {4, 40}
    tasks[1].cancel()


async def test_a_server_that_cannot_be_called_keeps_no_other_away(
    bus: Bus, servers: list[Server], caplog: pytest.LogCaptureFixture
) -> None:
    model = unique("m")
    beacon = Beacon(bus)
    task = await beaming(bus, beacon)
    beacon.show(Replica(id="odd", model=model, url="http://gpu:port/v1", transport="sdk"))
    beacon.show(Replica(id="secret", model=model, url="http://b/v1", api_key_env="NOBODY_SETS_IT"))
    flow = asking()
    record = await submitted(bus, flow, [b"{}"], parse_run({"llm": {"model": model}}))
    async with working(bus.url, flow):
        await until(lambda: caplog.text.count("server_unusable") >= 2, "the worker to say that it cannot call them")
        beacon.show(Replica(id="good", model=model, url=servers[0].url))
        assert [o.outcome for o in await all_outcomes(bus, record)] == ["success"]
    assert "'http://gpu:port/v1' is not the URL of a server" in caplog.text
    assert "NOBODY_SETS_IT" in caplog.text
    task.cancel()


async def test_a_server_says_how_it_is_called(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure: another path, another header, and a key that the workers have."""
    asked: list[str] = []

    async def azure(request: web.Request) -> web.StreamResponse:
        asked.append(f"{request.path_qs} {request.headers.get('api-key')}")
        return web.json_response({"choices": [{"message": {"content": "from Azure"}}]})

    app = web.Application()
    app.router.add_post("/openai/deployments/{name}/chat/completions", azure)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    monkeypatch.setenv("THEIR_KEY", "secret")
    model = unique("deployment")
    beacon = Beacon(bus)
    task = await beaming(bus, beacon)
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    how = {"transport": "azure", "api_version": "2024-10-21", "api_key_env": "THEIR_KEY"}
    beacon.show(Replica(id="a", model=model, url=url, **how))  # type: ignore[arg-type]
    flow = asking()
    record = await submitted(bus, flow, [b"{}"], parse_run({"llm": {"model": model}}))
    async with working(bus.url, flow):
        (outcome,) = await all_outcomes(bus, record)
    assert b"from Azure" in bytes(outcome.state)
    assert asked == [f"/openai/deployments/{model}/chat/completions?api-version=2024-10-21 secret"]
    task.cancel()
    await runner.cleanup()
