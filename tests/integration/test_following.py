"""Following a run and collecting it, while the broker has troubles of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matrix_bus import registry, run
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus, Stored
from matrix_bus.errors import PublishRefused
from tests.helpers import all_outcomes, connected, submitted, working
from tests.trip import rows, trip


async def test_a_registry_without_a_leader_is_waited_for(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a cluster says it between two leaders of that bucket, while outcomes can be read."""
    flow = trip()
    record = await submitted(bus, flow, rows(4))
    last, refused = Bus.last, asyncio.Event()

    async def leaderless(self: Bus, stream: str, subject: str) -> Stored | None:
        if refused.is_set():
            return await last(self, stream, subject)
        refused.set()
        raise PublishRefused(stream, 10008, "JetStream system temporarily unavailable")

    monkeypatch.setattr(Bus, "last", leaderless)
    following = asyncio.create_task(all_outcomes(bus, record))
    await refused.wait()
    async with working(bus.url, flow):
        assert len(await following) == 4


@pytest.mark.parametrize(("place", "name"), [(Bus, "read"), (registry, "get"), (registry, "require")])
async def test_collecting_goes_on_over_a_broker_that_dies_at_any_look(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> None:
    flow, path = trip(), tmp_path / "out.jsonl"
    async with connected(broker.url) as bus:
        record = await submitted(bus, flow, rows(4))
        async with working(bus.url, flow):
            await all_outcomes(bus, record)
        await registry.update(bus, record.id, total=None)
        await run.collect(bus, record, path, follow=False)
        await registry.update(bus, record.id, total=4)
        starting = _dies_before(broker, monkeypatch, place, name)
        tally = run.Tally(flow)
        await run.collect(bus, record, path, follow=True, tally=tally)  # which counts first what is in the file
        await starting.get_nowait()
    assert tally.rows == 4


def _dies_before(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> asyncio.Queue[asyncio.Task[Broker]]:
    """Has the broker killed before the next such call, and started again beside it; returns where that task is put."""
    call: Callable[..., Any] = getattr(place, name)
    starting: asyncio.Queue[asyncio.Task[Broker]] = asyncio.Queue()

    def dying(*arguments: Any, **more: Any) -> Any:
        if starting.empty():
            broker.kill()
            starting.put_nowait(asyncio.create_task(asyncio.to_thread(broker.start)))
        return call(*arguments, **more)

    monkeypatch.setattr(place, name, dying)
    return starting
