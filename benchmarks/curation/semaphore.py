"""The pages by plain asyncio: so many at a time, all in memory. What is under way when it dies is lost.

python -m benchmarks.curation.semaphore '{"pages": FILE, "urls": […], "in_flight": 256}'
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvloop

from .client import Client
from .stages import STAGES


async def curate(pages: list[dict[str, str]], urls: list[str], in_flight: int) -> dict[str, Any]:
    """When it began and ended, as Unix time, and how the pages ended."""
    client = Client(urls)
    ends: Counter[str] = Counter()
    kept: list[dict[str, str]] = []
    places = asyncio.Semaphore(in_flight)

    async def one(row: dict[str, str]) -> None:
        try:
            end = ""
            for stage in STAGES:
                row[stage], end = await client.ask(stage, row["page"])
                if end:
                    break
            ends[end] += 1
            if end == "success":
                kept.append(row)
        finally:
            places.release()

    began = time.time()
    async with asyncio.TaskGroup() as tasks:
        for row in pages:
            await places.acquire()
            tasks.create_task(one(dict(row)))
    ended = time.time()
    await client.close()
    return {"began": began, "ended": ended, "ends": dict(ends)}


def main() -> None:
    given = json.loads(sys.argv[1])
    pages = [json.loads(line) for line in Path(given["pages"]).read_text().splitlines()]
    print(json.dumps(uvloop.run(curate(pages, given["urls"], given["in_flight"]))), flush=True)


if __name__ == "__main__":
    main()
