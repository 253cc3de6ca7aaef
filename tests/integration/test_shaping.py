"""Outputs of every form, from the outcomes of real runs."""

from __future__ import annotations

import asyncio
import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import zstandard
from msgspec import Raw

import matrix_bus as mb
from matrix_bus import Outcome, Row, control, run
from matrix_bus.bus import Bus
from matrix_bus.config import parse_run
from matrix_bus.dataset import Shard
from matrix_bus.errors import DatasetError, RunError, UsageError
from matrix_bus.orchestrator import OutcomeRecord, Timings, decode_outcome, encode
from matrix_bus.registry import RunRecord
from matrix_bus.run import Shape, parse_fields
from matrix_bus.run.shaping import claim, conversation, journal_of
from tests.helpers import all_outcomes, done, submitted, until, working
from tests.trip import Trip, rows, trip

NO_PAUSE = parse_run({"limits": {"failed_window": 0}})
COUNT = 60


async def step(row: Row[Trip]) -> Outcome:
    """A third each of successes, filtered and failed rows, which finish in no order."""
    await asyncio.sleep(row.rng.random() / 100)
    row.state.text = f"text {row.number}" * (row.number % 7)
    if row.number % 3 == 2:
        raise ValueError("no luck")
    return mb.success("fine") if row.number % 3 == 0 else mb.filtered("dull")


async def finished(bus: Bus) -> tuple[RunRecord, mb.Workflow[Trip]]:
    flow = trip(step)

    @flow.messages
    def chat(state: Trip, line: Any) -> list[mb.Message]:
        return [mb.user(f"x is {line['x']}"), mb.assistant(state.text)] if state.text else []

    record = await submitted(bus, flow, rows(COUNT), NO_PAUSE)
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
    return record, flow


def lines(path: Path) -> list[dict[str, Any]]:
    body = path.read_bytes()
    if path.name.endswith(".gz"):
        body = gzip.decompress(body)
    elif path.name.endswith(".zst"):
        body = zstandard.ZstdDecompressor().stream_reader(body).read()
    return [json.loads(line) for line in body.splitlines()]


async def test_every_form_holds_the_same_outcomes(bus: Bus, tmp_path: Path) -> None:
    record, flow = await finished(bus)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        await run.collect(bus, record, tmp_path / name, follow=True, flow=flow)
    plain = lines(tmp_path / "a.jsonl")
    assert sorted(line["row"] for line in plain) == list(range(COUNT))
    assert lines(tmp_path / "a.jsonl.gz") == lines(tmp_path / "a.jsonl.zst") == plain
    written = await run.collect(bus, record, tmp_path / "a.parquet", follow=True, flow=flow)
    assert (written.files, written.rows) == ([tmp_path / "a.parquet"], COUNT)
    table = pq.read_table(tmp_path / "a.parquet")
    assert [field.name for field in table.schema] == list(plain[0])
    assert str(table.schema.field("row").type) == "int64"
    assert str(table.schema.field("state").type) == "struct<x: int64, path: string, draw: double, text: string>"
    for row, line in zip(table.to_pylist(), plain, strict=True):
        assert json.loads(row["input"]) == line["input"]
        assert row["state"]["text"] == line["state"]["text"]
        assert json.loads(row["state"]["path"]) == line["state"]["path"]
        for same in ("run", "id", "row", "outcome", "reason", "hops", "seed", "timings"):
            assert row[same] == line[same]
        assert [error["type"] for error in row["errors"]] == [error["type"] for error in line["errors"]]
        assert row["usage"]["calls"] == 0
    assert not list(tmp_path.glob("*.outcomes.jsonl*"))
    assert not list(tmp_path.glob(".*"))


async def test_rows_and_fields_are_chosen(bus: Bus, tmp_path: Path) -> None:
    record, _flow = await finished(bus)
    shape = Shape(
        success_only=True, fields=parse_fields("id, x=input.x, state.text, none=state.nothing.at.all"), ordered=True
    )
    for name in ("a.jsonl", "a.parquet"):
        assert (await run.collect(bus, record, tmp_path / name, follow=True, shape=shape)).rows == COUNT // 3
    expected = [{"id": str(n), "x": n, "text": f"text {n}" * (n % 7), "none": None} for n in range(0, COUNT, 3)]
    assert lines(tmp_path / "a.jsonl") == expected
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == expected


async def test_rows_as_chats(bus: Bus, tmp_path: Path) -> None:
    record, flow = await finished(bus)
    shape = Shape(success_only=True, messages=True, ordered=True)
    for name in ("a.jsonl", "a.parquet"):
        await run.collect(bus, record, tmp_path / name, follow=True, shape=shape, flow=flow)
    expected = [
        {
            "id": str(n),
            "messages": [
                {"role": "user", "content": f"x is {n}"},
                {"role": "assistant", "content": f"text {n}" * (n % 7)},
            ],
        }
        for n in range(0, COUNT, 3)
        if n % 7
    ]
    assert lines(tmp_path / "a.jsonl") == expected
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == expected


@pytest.mark.parametrize("name", ["pages.jsonl", "pages.jsonl.zst", "pages.parquet"])
async def test_parts_are_bounded_and_make_up_the_whole(bus: Bus, tmp_path: Path, name: str) -> None:
    record, _flow = await finished(bus)
    shape = Shape(part_bytes=4000, ordered=True)
    target = tmp_path / name
    written = await run.collect(bus, record, target, follow=True, shape=shape)
    assert sorted(target.iterdir()) == written.files
    if name == "pages.jsonl":
        assert len(written.files) > 3
        assert all(file.stat().st_size < 4000 + 3000 for file in written.files)
    from matrix_bus.dataset import Line, read

    again = [json.loads(line.body) for line in read(str(target)) if isinstance(line, Line)]
    assert [row["row"] for row in again] == list(range(COUNT))
    # a second time with larger parts: what was there is kept aside, and none of its parts is left in the new one
    again_written = await run.collect(bus, record, target, follow=True, shape=Shape(part_bytes=1 << 30))
    assert again_written.kept == tmp_path / f"{name}.1"
    assert sorted(target.iterdir()) == again_written.files
    assert len(again_written.files) == 1


@pytest.mark.parametrize("name", ["pages.jsonl", "pages.parquet"])
async def test_collectors_share_an_output(bus: Bus, tmp_path: Path, name: str) -> None:
    record, flow = await finished(bus)
    target = tmp_path / name
    shapes = [Shape(part_bytes=4000, shard=Shard(index, 3)) for index in (1, 2, 3)]
    for _ in range(2):  # repeated, it is the same
        parts = await asyncio.gather(*(run.collect(bus, record, target, follow=True, shape=shape) for shape in shapes))
        assert sum(part.rows for part in parts) == COUNT
        files = {file for part in parts for file in part.files}
        assert {file for file in target.iterdir() if file.name != "_run"} == files
    from matrix_bus.dataset import Line, read

    found = [json.loads(line.body)["row"] for line in read(str(target)) if isinstance(line, Line)]
    assert sorted(found) == list(range(COUNT))
    other = await submitted(bus, flow, rows(1))
    with pytest.raises(DatasetError, match=f"has outcomes of run '{record.id}'"):
        await run.collect(bus, other, target, follow=False, shape=shapes[0])


async def test_what_was_sent_again_stands_once_in_any_form(bus: Bus, tmp_path: Path) -> None:
    unlucky = {1, 4}

    async def luck(row: Row[Trip]) -> Outcome:
        if row.number in unlucky:
            raise ValueError("no luck")
        return mb.success()

    flow = trip(luck)
    record = await submitted(bus, flow, rows(6), NO_PAUSE)
    async with working(bus.url, flow):
        await all_outcomes(bus, record)
        unlucky.clear()
        assert await control.retry_failed(bus, record.id) == 2
        await until(lambda: done(bus, record), "the rows to end again")
    for ordered in (True, False):
        tally = run.Tally(flow)
        path = tmp_path / f"{ordered}.parquet"
        await run.collect(bus, record, path, follow=True, shape=Shape(ordered=ordered), tally=tally)
        found = pq.read_table(path).to_pylist()
        assert sorted((row["row"], row["generation"]) for row in found) == [(n, int(n in (1, 4))) for n in range(6)]
        assert [row["row"] for row in found] == ([*range(6)] if ordered else [0, 2, 3, 5, 1, 4]) or not ordered
        assert {row["outcome"] for row in found} == {"success"}
        assert tally.kinds == {"success": 6}


async def test_an_interrupted_collector_goes_on_from_its_journal(bus: Bus, tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def wait(row: Row[Trip]) -> Outcome:
        if row.number >= 5:
            await gate.wait()
        return mb.success()

    flow = trip(wait)
    record = await submitted(bus, flow, rows(10))
    path = tmp_path / "a.parquet"
    async with working(bus.url, flow):
        first = asyncio.create_task(run.collect(bus, record, path, follow=True))
        journal = journal_of(path, Shape())

        def half() -> bool:
            return journal.exists() and len(journal.read_bytes().splitlines()) == 5

        await until(half, "half of the outcomes to be in the journal")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert not path.exists(), "there is no half output"
        now = await run.collect(bus, record, path, follow=False)
        assert now.rows == pq.read_table(path).num_rows == 5
        gate.set()
        written = await run.collect(bus, record, path, follow=True)
    assert (written.rows, written.kept) == (10, None)
    assert sorted(pq.read_table(path)["row"].to_pylist()) == list(range(10))
    assert not journal.exists()


async def test_an_output_without_rows_is_there(bus: Bus, tmp_path: Path) -> None:
    record, flow = await finished(bus)
    shape = Shape(messages=True, messages_of="nobody")
    for name in ("a.jsonl", "a.parquet"):
        written = await run.collect(bus, record, tmp_path / name, follow=True, shape=shape, flow=flow)
        assert written.rows == 0
    assert (tmp_path / "a.jsonl").read_bytes() == b""
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 0


async def test_a_place_where_nothing_can_be_written(bus: Bus, tmp_path: Path) -> None:
    record, _ = await finished(bus)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder.parquet").mkdir()
    for path in (tmp_path / "file" / "a.parquet", tmp_path / "folder.parquet"):
        with pytest.raises(DatasetError, match=str(path)):
            await run.collect(bus, record, path, follow=True)
    (tmp_path / "mine.jsonl").mkdir()
    (tmp_path / "mine.jsonl" / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="has files already"):
        shape = Shape(part_bytes=1000, shard=Shard(1, 2))
        await run.collect(bus, record, tmp_path / "mine.jsonl", follow=True, shape=shape)
    assert (tmp_path / "mine.jsonl" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("a.txt", Shape(success_only=True), "names no form of output"),
        ("a", Shape(ordered=True), "names no form of output"),
        ("a.csv", Shape(ordered=True), "names no form of output"),
        ("a.jsonl", Shape(shard=Shard(1, 2)), "--part-mb"),
    ],
)
def test_a_form_that_there_is_not(name: str, shape: Shape, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        shape.check(Path(name))
    Shape().check(Path("out.txt"))  # lines as they come may have any name


@pytest.mark.parametrize("text", ["=state.x", "x=", "id,id", "a.x,b.x"])
def test_fields_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_fields(text)


def recorded(history: list[dict[str, Any]]) -> OutcomeRecord:
    line = json.loads(OUTCOME)
    return decode_outcome(json.dumps({**line, "history": history}).encode())


OUTCOME = encode(
    mb.OutcomeRecord(
        run="r",
        workflow="w",
        id="0",
        row=0,
        line=0,
        trial=0,
        generation=0,
        seed=1,
        input=Raw(b"{}"),
        outcome="success",
        reason="",
        state=Raw(b"null"),
        history=[],
        usage=mb.Usage(),
        usage_by_role={},
        errors=[],
        hops=1,
        attempts=1,
        timings=Timings(0, 0, 0, 0),
    )
).decode()


def call(role: str, said: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "model": "m", "messages": [{"role": "user", "content": said}], "text": answer, **more}


def test_without_a_declaration_a_chat_is_the_last_call_with_its_answer() -> None:
    history = [
        call("a", "one", "1"),
        call("b", "two", "2", reasoning="so"),
        call("a", "three", "3", prefix=[0, 1]),
        call("b", "four", "", error={"type": "ModelTimeout", "message": "late"}),
    ]
    assert conversation(recorded(history), None) == [
        {"role": "user", "content": "one"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "3"},
    ]
    assert conversation(recorded(history), None, "b") == [
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2", "reasoning_content": "so"},
    ]
    assert conversation(recorded(history), None, "c") is None
    assert conversation(recorded([]), None) is None


async def test_a_run_that_was_deleted(bus: Bus, tmp_path: Path) -> None:
    record, _ = await finished(bus)
    await control.purge(bus, record.id)
    with pytest.raises(RunError):
        await run.collect(bus, record, tmp_path / "a.parquet", follow=True)
    assert not (tmp_path / "a.parquet").exists()


def test_collectors_that_begin_a_shared_output_at_once(tmp_path: Path) -> None:
    shape = Shape(part_bytes=4000, shard=Shard(1, 8))
    with ThreadPoolExecutor(8) as pool:
        for n in range(300):
            list(pool.map(lambda path: claim(path, "r", shape), [tmp_path / f"{n}.jsonl"] * 8))
