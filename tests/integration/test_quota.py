"""Requests and tokens per minute, kept to by several processes together."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import pytest

from matrix_bus import quota
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.config import ModelConfig
from matrix_bus.quota import Quota
from tests.helpers import connected, unique


async def started(quotas: list[Quota], seconds: float, tokens: float) -> list[float]:
    """When calls were let through, by callers that want as many as they can get."""
    times: list[float] = []

    async def call(one: Quota) -> None:
        while True:
            reserved = await one.start(tokens)
            times.append(time.monotonic())
            one.ended(reserved, tokens)

    tasks = [asyncio.create_task(call(one)) for one in quotas for _ in range(3)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return times


@pytest.mark.parametrize(
    ("limits", "tokens", "per_s"),
    [
        ({"requests_per_minute": 1200}, 10.0, 20),
        ({"tokens_per_minute": 60_000}, 100.0, 10),
        ({"requests_per_minute": 600, "tokens_per_minute": 600_000}, 10.0, 10),
        ({"requests_per_minute": 120}, 10.0, 2),
    ],
    ids=["requests", "tokens", "both", "few"],
)
async def test_three_processes_keep_to_one_limit(
    shared_broker: Broker, limits: dict[str, int], tokens: float, per_s: float
) -> None:
    config = ModelConfig(model=unique("m"), urls=["http://a/v1"], **limits)  # type: ignore[arg-type]
    async with AsyncExitStack() as stack:
        buses = [await stack.enter_async_context(connected(shared_broker.url)) for _ in range(3)]
        await quota.prepare(buses[0])
        times = await started([Quota(bus, config) for bus in buses], 3.0, tokens)
    # A bound that holds however slow the machine is: never more than the rate, and what was taken ahead.
    assert len(times) <= 3.0 * per_s + 3 * per_s + 3
    spans = [(times[at + int(2 * per_s) + 3] - times[at]) for at in range(len(times) - int(2 * per_s) - 3)]
    assert all(span > 0.5 for span in spans), "nor many at once"
    assert len(times) >= 3, "and calls go on"


async def test_what_was_used_counts_not_what_was_guessed(bus: Bus) -> None:
    await quota.prepare(bus)
    one = Quota(bus, ModelConfig(model=unique("m"), urls=["http://a/v1"], tokens_per_minute=6_000))
    reserved = await one.start(10.0)
    one.ended(reserved, 110.0)
    began = time.monotonic()
    for _ in range(12):  # what is left of a second's worth of small calls, then one that pays the debt
        one.ended(await one.start(10.0), 10.0)
    assert time.monotonic() - began > 0.9


async def test_another_account_has_limits_of_its_own(bus: Bus) -> None:
    await quota.prepare(bus)
    urls = ["http://a/v1"]
    model = unique("m")
    first = Quota(bus, ModelConfig(model=model, urls=urls, requests_per_minute=1))
    other = Quota(bus, ModelConfig(model=model, urls=urls, requests_per_minute=1, api_key_env="OTHER"))
    await first.start(1.0)
    await asyncio.wait_for(other.start(1.0), 5)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(first.start(1.0), 0.5)
