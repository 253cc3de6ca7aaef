"""Whether heartbeats keep their hops through a busy event loop: thousands of handlers in flight, and a short AckWait.

    python -m benchmarks.heartbeat [--handlers 5000] [--seconds 600] [--busy 0.8] [--ack-wait-s 5]

One worker process holds all handlers, each for the whole time, while its event loop is blocked for so large a share
of it. Every delivery beyond one for each hop is a heartbeat that came too late; the broker counts them. The last
line is JSON; `false_redeliveries` must be 0, else the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import uvloop

from matrix_bus import Outcome, Row, RunConfig, State, Workflow, registry, run, success
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.dataset import Line
from matrix_bus.orchestrator import outcome_stream, work_stream
from matrix_bus.worker import Worker

_BLOCK_S = 0.05


class Nothing(State):
    """A row without content."""


async def measure(handlers: int, seconds: float, busy: float, ack_wait_s: float) -> dict[str, object]:
    """Holds `handlers` hops for `seconds` while the loop is blocked for a share of `busy`."""
    started = 0
    gate = asyncio.Event()
    flow = Workflow("heartbeat", state=Nothing, start="hold")
    flow.code_hash = "of-this-benchmark"

    @flow.role
    async def hold(row: Row[Nothing]) -> Outcome:
        nonlocal started
        started += 1
        await gate.wait()
        return success()

    with tempfile.TemporaryDirectory(prefix="matrix-bus-heartbeat-") as folder, Broker(Path(folder)) as broker:
        async with await Bus.connect(broker.url) as ours, await Bus.connect(broker.url) as theirs:
            config = RunConfig(max_in_flight=handlers, ack_wait_s=ack_wait_s)
            record = await run.open_run(ours, run.new_record(flow, config))
            await run.submit(ours, record, [Line(n, b"{}", str(n)) for n in range(handlers)])
            worker = Worker(theirs, [flow], slots=handlers, grace_s=0)
            working = asyncio.create_task(worker.run())
            while started < handlers:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            blocked_s, lags = await _keep_busy(seconds, busy)
            deliveries = (await ours.api(f"CONSUMER.INFO.{work_stream(record.id)}.hold"))["delivered"]["consumer_seq"]
            called = started
            gate.set()
            while not (await registry.progress(ours, await registry.require(ours, record.id))).done:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            ended = (await ours.api(f"STREAM.INFO.{outcome_stream(record.id)}"))["state"]["messages"]
            worker.stop()
            await working
    return {
        "benchmark": "heartbeat",
        "handlers": handlers,
        "seconds": round(seconds, 1),
        "ack_wait_s": ack_wait_s,
        "busy_share": round(blocked_s / seconds, 3),
        "loop_lag_s_p50": round(sorted(lags)[len(lags) // 2], 3),
        "loop_lag_s_max": round(max(lags), 3),
        "deliveries": deliveries,
        "false_redeliveries": deliveries - handlers,
        "handler_calls": called,
        "outcomes": ended,
        "machine": {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)},
    }


async def _keep_busy(seconds: float, busy: float) -> tuple[float, list[float]]:
    """(seconds blocked, how late each wake-up was): work that never yields, in pieces, with pauses between them."""
    blocked_s = 0.0
    lags = []
    chance = random.Random(0)
    first = time.monotonic()
    while (began := time.monotonic()) < first + seconds:
        piece_s = _BLOCK_S * chance.uniform(0.2, 1.8)
        while time.monotonic() - began < piece_s:
            pass
        blocked_s += time.monotonic() - began
        slept = time.monotonic()
        pause_s = max(0.001, blocked_s / busy - (slept - first))  # what the loop does meanwhile is in it
        await asyncio.sleep(pause_s)
        lags.append(time.monotonic() - slept - pause_s)
    return blocked_s, lags


def main() -> int:
    parser = argparse.ArgumentParser(prog="heartbeat", description="Heartbeats through a busy event loop.")
    parser.add_argument("--handlers", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--busy", type=float, default=0.8, help="share of the time that the event loop is blocked")
    parser.add_argument("--ack-wait-s", type=float, default=5.0)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure(given.handlers, given.seconds, given.busy, given.ack_wait_s))
    print(msgspec.json.encode(found).decode(), flush=True)
    return 1 if found["false_redeliveries"] or found["outcomes"] != given.handlers else 0


if __name__ == "__main__":
    sys.exit(main())
