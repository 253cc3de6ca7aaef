"""The pages by matrix-bus: a private broker on file storage, worker processes, and one submitter for each shard.

    python -m benchmarks.curation.ours '{"pages": FILE, "urls": […], "in_flight": 256, "slots": 256, "procs": 1,
                                         "shards": 1, "temp": FOLDER}'

`in_flight` is of all shards together; each shard is a run of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import uvloop

from matrix_bus import RunConfig, load_workflow, registry, run
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.config import LlmConfig
from matrix_bus.dataset import Line
from matrix_bus.orchestrator import decode_outcome, outcome_stream
from matrix_bus.registry import RunRecord

from .stages import MODEL

_ROOT = Path(__file__).resolve().parents[2]
_WORKFLOW = "benchmarks.curation.workflow:flow"
_LOOK_S = 0.1


async def curate(given: dict[str, Any], lines: list[bytes]) -> dict[str, Any]:
    """When the first row was submitted and the last outcome stored, as Unix time, and how the pages ended."""
    shards = given["shards"]
    config = RunConfig(
        # Sticky calls would keep a row's prefix cached; here no two prompts have a prefix in common.
        llm=LlmConfig(model=MODEL, urls=given["urls"], concurrency=given["in_flight"], sticky=False),
        max_in_flight=max(1, given["in_flight"] // shards),
    )
    async with AsyncExitStack() as stack:
        broker = stack.enter_context(Broker(Path(given["temp"])))
        bus = await stack.enter_async_context(await Bus.connect(broker.url))
        flow = load_workflow(_WORKFLOW)
        records = [await run.open_run(bus, run.new_record(flow, config)) for _ in range(shards)]
        words = ["matrix_bus", "worker", "--server", broker.url, "--workflow", _WORKFLOW]
        words += ["--slots", str(given["slots"]), "--procs", str(given["procs"])]
        worker = stack.enter_context(_working(words))
        for record in records:
            while (await registry.progress(bus, record)).idle_roles:
                _check(worker)
                await asyncio.sleep(_LOOK_S)
        await asyncio.sleep(2)  # so that all of several worker processes have come
        began = time.time()
        async with asyncio.TaskGroup() as group:
            for at, record in enumerate(records):
                part = [Line(n, body, str(n)) for n, body in enumerate(lines[at::shards])]
                group.create_task(run.submit(bus, record, part))
            ended = max([await _last_outcome(bus, r, worker, len(lines[a::shards])) for a, r in enumerate(records)])
        ends: Counter[str] = Counter()
        for record in records:
            async for message in bus.read(outcome_stream(record.id)):
                outcome = decode_outcome(message.data)
                ends["success" if outcome.outcome == "success" else outcome.reason] += 1
    return {"began": began, "ended": ended, "ends": dict(ends)}


async def _last_outcome(bus: Bus, record: RunRecord, worker: subprocess.Popen[bytes], rows: int) -> float:
    """When the broker stored the last of `rows` outcomes, as Unix time."""
    while True:
        state = (await bus.api(f"STREAM.INFO.{outcome_stream(record.id)}"))["state"]
        if state["messages"] >= rows:
            return datetime.fromisoformat(state["last_ts"]).timestamp()
        _check(worker)
        await asyncio.sleep(_LOOK_S)


def _check(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is not None:
        raise SystemExit("the worker ended early")


@contextlib.contextmanager
def _working(words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    worker = subprocess.Popen([sys.executable, "-m", *words], cwd=_ROOT, stdout=sys.stderr)
    try:
        yield worker
    finally:
        worker.terminate()
        try:
            worker.wait(15)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def main() -> None:
    given = json.loads(sys.argv[1])
    lines = Path(given["pages"]).read_bytes().splitlines()
    print(json.dumps(uvloop.run(curate(given, lines))), flush=True)


if __name__ == "__main__":
    main()
