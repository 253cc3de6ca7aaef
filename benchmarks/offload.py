"""What large rows cost on the wire, with and without the object store, by length of the conversation and threshold.

    python -m benchmarks.offload [--turns 2,10,40] [--document-kib 16,64,256] [--above 4,16,64,256,never] [--rows 100]

Two shapes, as in figures 8 and 9 of the Matrix paper (arXiv 2511.21686): a conversation that grows by a model call of
some 2 KB at each hop, and a document that comes with the row and is read by one of two roles that take turns. Each
point has a fresh broker on file storage, one worker, and for the conversation a model server that answers at once.

Bytes are what the broker counts on its connections in both directions, from the first row submitted until the queue
is empty, over the rows; so a hop that is published and delivered counts twice. That is all there is on the wire but
the outcomes' way to a collector, which is the same for all thresholds. `writes_per_value` is 1 if nothing was written
twice. Outcomes are checked; the last line is JSON, the exit code 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from msgspec import Struct

from benchmarks.llm import ANSWER, null_server
from benchmarks.stage import Stage, cpu_s, empty, last_outcome, stage
from matrix_bus import LLM, Large, Next, Outcome, Row, RunConfig, State, Workflow, run, success, to, user
from matrix_bus.config import IoConfig, LlmConfig
from matrix_bus.dataset import Line
from matrix_bus.orchestrator import decode_outcome, outcome_stream
from matrix_bus.payload import Payloads, stream_of
from matrix_bus.service import free_port

_HERE = Path(__file__)
_NEVER = 1 << 30
_DOCUMENT_HOPS = 8
_IN_FLIGHT = 64
_TEXT = "What follows from the premises, and what does not, is said here once and for all in plain words. "


class Trip(Struct, frozen=True):
    """How many hops a row makes."""

    hops: int


class Talk(State):
    """What was said last; the conversation is in the row's history of model calls."""

    question: str
    last: str = ""


talk = Workflow("offload_talk", state=Talk, start="first", config=Trip)


async def _speak(row: Row[Talk], llm: LLM, trip: Trip, following: str) -> Next | Outcome:
    reply = await llm.chat([user(row.state.question + row.state.last)])
    row.state.last = reply.text
    return success() if row.hop >= trip.hops else to(following)


@talk.role
async def first(row: Row[Talk], llm: LLM, trip: Trip) -> Next | Outcome:
    return await _speak(row, llm, trip, "second")


@talk.role
async def second(row: Row[Talk], llm: LLM, trip: Trip) -> Next | Outcome:
    return await _speak(row, llm, trip, "first")


class Study(State):
    """A document, and how much of it the reader has seen."""

    document: Large[str]
    seen: int = 0


study = Workflow("offload_study", state=Study, start="reader", config=Trip)


@study.role
async def reader(row: Row[Study]) -> Next:
    row.state.seen += len(await row.state.document.get())
    return to("writer")


@study.role
async def writer(row: Row[Study], trip: Trip) -> Next | Outcome:
    return success() if row.hop >= trip.hops else to("reader")


class Shape(Struct):
    """What the rows of a point are like."""

    name: str
    size: int
    """Turns of the conversation, or bytes of the document."""


class Point(Struct):
    """What one shape cost with one threshold."""

    shape: str
    size: int
    above: int
    wire_bytes_per_row: int
    stored_values: int
    writes_per_value: float
    hops_per_s: int
    cpu_us_per_hop: int
    """Of worker and broker together."""
    wrong_rows: int


async def measure(shape: Shape, above: int, rows: int, model_url: str) -> Point:
    """One point."""
    talks = shape.name == "conversation"
    hops = shape.size if talks else _DOCUMENT_HOPS
    port = free_port()
    config = RunConfig(
        workflow={"hops": hops},
        max_in_flight=_IN_FLIGHT,
        io=IoConfig(offload_above_bytes=above),
        llm=LlmConfig(urls=[model_url] if talks else [], model="null", concurrency=_IN_FLIGHT),
    )
    bodies = [_line(shape, n) for n in range(rows)]
    spec = f"{_HERE}:{'talk' if talks else 'study'}"
    async with stage(spec, config, monitor_port=port) as here, asyncio.timeout(300):
        (record,), (worker,) = here.records, here.workers
        before = await _wire_bytes(port), worker.cpu_s, cpu_s(here.broker)
        started = time.time()
        async with asyncio.TaskGroup() as group:
            lines = [Line(n, body, f"r{n}") for n, body in enumerate(bodies)]
            group.create_task(run.submit(here.bus, record, lines))
            ended = await last_outcome(here, [rows])
        await empty(here)
        wire = await _wire_bytes(port) - before[0]
        spent = worker.cpu_s - before[1] + cpu_s(here.broker) - before[2]
        wrong = await _wrong(here, shape, hops)
        values, written = await _values(here, record.id)
    return Point(
        shape=shape.name,
        size=shape.size,
        above=above,
        wire_bytes_per_row=round(wire / rows),
        stored_values=values,
        writes_per_value=round(written / values, 3) if values else 0.0,
        hops_per_s=round(rows * hops / (ended - started)),
        cpu_us_per_hop=round(spent / rows / hops * 1e6),
        wrong_rows=rows - wrong,
    )


def _line(shape: Shape, n: int) -> bytes:
    if shape.name == "conversation":
        return msgspec.json.encode({"question": f"{n}: {_TEXT * 8}"})
    return msgspec.json.encode({"document": (f"{n}: " + _TEXT * (shape.size // len(_TEXT) + 1))[: shape.size]})


async def _wrong(here: Stage, shape: Shape, hops: int) -> int:
    """How many outcomes are right."""
    (record,) = here.records
    fine = 0
    async for message in here.bus.read(outcome_stream(record.id)):
        outcome = decode_outcome(message.data)
        if outcome.outcome != "success" or outcome.hops != hops:
            continue
        if shape.name == "conversation":
            state = msgspec.json.decode(outcome.state, type=Talk)
            fine += state.last == ANSWER and outcome.usage.calls == hops
        else:
            fine += msgspec.json.decode(outcome.state)["seen"] == shape.size * hops // 2
    return fine


async def _values(here: Stage, run_id: str) -> tuple[int, float]:
    """(values in the object store, values written): chunks that were written again would show in the sequence."""
    state = (await here.bus.api(f"STREAM.INFO.{stream_of(run_id)}"))["state"]
    values = len(await Payloads(here.bus, run_id).names())
    return values, values * state["last_seq"] / max(1, state["messages"])


async def _wire_bytes(port: int) -> int:
    def look() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/varz", timeout=10) as answer:
            found = json.load(answer)
        return int(found["in_bytes"]) + int(found["out_bytes"])

    return await asyncio.to_thread(look)


def best(points: Sequence[Point]) -> dict[str, dict[str, int]]:
    """For each shape and size the threshold with least CPU and the one with the fewest bytes."""
    found: dict[str, dict[str, int]] = {}
    for shape, size in dict.fromkeys((point.shape, point.size) for point in points):
        some = [point for point in points if (point.shape, point.size) == (shape, size)]
        found[f"{shape} {size}"] = {
            "least_cpu_above": min(some, key=lambda point: point.cpu_us_per_hop).above,
            "fewest_bytes_above": min(some, key=lambda point: point.wire_bytes_per_row).above,
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="offload", description="What large rows cost, by threshold.")
    parser.add_argument("--turns", default="2,10,40", help="of the conversation, with commas")
    parser.add_argument("--document-kib", default="16,64,256", help="sizes of the document, with commas")
    parser.add_argument("--above", default="4,16,64,256,never", help="thresholds in KiB, with commas")
    parser.add_argument("--rows", type=int, default=100, help="of each point")
    given = parser.parse_args()
    try:
        shapes = [Shape("conversation", int(word)) for word in given.turns.split(",") if word]
        shapes += [Shape("document", int(word) << 10) for word in given.document_kib.split(",") if word]
        thresholds = [_NEVER if word == "never" else int(word) << 10 for word in given.above.split(",")]
    except ValueError:
        parser.error("--turns, --document-kib and --above must be whole numbers with commas between them")
    points: list[Point] = []
    with null_server() as url, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for shape in shapes:
            for above in thresholds:
                found = runner.run(measure(shape, above, given.rows, url))
                points.append(found)
                limit = "never" if above == _NEVER else f"{above >> 10} KiB"
                print(
                    f"{shape.name:12} {shape.size:7} above {limit:8} {found.wire_bytes_per_row:9} B/row "
                    f"{found.hops_per_s:6} hops/s {found.cpu_us_per_hop:6} us/hop {found.stored_values:6} stored",
                    flush=True,
                )
    made: dict[str, Any] = {
        "benchmark": "offload",
        "ok": not any(point.wrong_rows for point in points),
        "rows": given.rows,
        "written_once": all(point.writes_per_value in (0.0, 1.0) for point in points),
        "best": best(points),
        "points": msgspec.to_builtins(points),
        "machine": {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)},
    }
    print(msgspec.json.encode(made).decode(), flush=True)
    return 0 if made["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
