"""The pages by Ray Data: an actor class per stage, `map_batches` with `asyncio.gather` over each batch.

    python -m benchmarks.curation.ray_data '{"pages": FILE, "urls": […], "temp": FOLDER, "batch": [64, 16, 16],
                                             "batches": [4, 4, 4], "actors": [1, 1, 1]}'

It runs in Ray's own environment: with ray, pyarrow, aiohttp and the standard library. `batch` is rows of a batch,
`batches` how many of them an actor has under way at a time, `actors` how many there are, each by stage. The stages
are one streaming dataset and overlap. An actor hands on only the rows that go on, so that batches of the next stage
are full of live ones; a separate `filter` would be one more operator with tasks of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from .client import Client
from .stages import STAGES, SUCCESS


class Tally:
    """An actor that counts how pages ended: Ray Data keeps no account of the rows that are dropped."""

    def __init__(self) -> None:
        self._ends: Counter[str] = Counter()
        self._began = float("inf")
        self._ended = 0.0

    def add(self, ends: dict[str, int], began: float, ended: float) -> None:
        self._ends.update(ends)
        self._began = min(self._began, began)
        self._ended = max(self._ended, ended)

    def found(self) -> dict[str, Any]:
        return {"began": self._began, "ended": self._ended, "ends": dict(self._ends)}


class Stage:
    """The actor of one stage; its batches share one HTTP session."""

    def __init__(self, stage: str, urls: list[str], tally: Any) -> None:
        self._stage = stage
        self._urls = urls
        self._tally = tally
        self._client: Client | None = None

    async def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.time()
        if self._client is None:
            self._client = Client(self._urls)
        client = self._client
        pages = batch.column("page").to_pylist()
        answers = await asyncio.gather(*(client.ask(self._stage, page) for page in pages))
        ends = Counter(end for _, end in answers if end)
        self._tally.add.remote(dict(ends), began, time.time())
        batch = batch.append_column(self._stage, pa.array([answer for answer, _ in answers], pa.string()))
        return batch.filter(pa.array([end in {"", SUCCESS} for _, end in answers], pa.bool_()))


def curate(given: dict[str, Any]) -> dict[str, Any]:
    """When the first batch began and the last row came out, as Unix time, and how the pages ended."""
    rows = [json.loads(line) for line in Path(given["pages"]).read_text().splitlines()]
    first = given["batch"][0]
    blocks = [pa.Table.from_pylist(rows[at : at + first]) for at in range(0, len(rows), first)]
    context = DataContext.get_current()
    context.wait_for_min_actors_s = 120  # the start of the actors is not what is measured
    context.enable_progress_bars = False
    # With the default of 128 MiB, Ray expects so much of each small task that it holds back the first stage.
    context.target_max_block_size = 1 << 20
    tally = ray.remote(Tally).options(num_cpus=0).remote()
    dataset = ray.data.from_arrow(blocks)
    for stage, batch, batches, actors in zip(STAGES, given["batch"], given["batches"], given["actors"], strict=True):
        dataset = dataset.map_batches(
            Stage,
            fn_constructor_args=(stage, given["urls"], tally),
            batch_format="pyarrow",
            batch_size=batch,
            compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2 * batches),
            num_cpus=0.01,
            max_concurrency=batches,
        )
    kept, ended = 0, 0.0
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        kept += table.num_rows
        ended = time.time()
    deadline = time.time() + 30
    while True:
        found: dict[str, Any] = ray.get(tally.found.remote())
        if sum(found["ends"].values()) >= len(rows) or time.time() > deadline:
            break
        time.sleep(0.1)
    if kept != found["ends"].get(SUCCESS, 0):
        raise SystemExit(f"{kept} rows came out, {found['ends']} were counted")
    return {**found, "ended": max(ended, found["ended"])}


def main() -> None:
    given = json.loads(sys.argv[1])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=4,  # of the scheduler's account; actors ask for next to none
        object_store_memory=1_000_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        _node_ip_address="127.0.0.1",
        _temp_dir=given["temp"],
    )
    try:
        found = curate(given)
        print(json.dumps(found), flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
