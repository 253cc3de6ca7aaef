"""Large values: in the object store once, readable by anybody, back in the output, and never in the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import string
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest
from aiohttp import web

from matrix_bus import (
    LLM,
    Large,
    Next,
    Outcome,
    OutcomeRecord,
    Row,
    RunConfig,
    State,
    Workflow,
    load_workflow,
    run,
    success,
    to,
    user,
)
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.config import IoConfig, LlmConfig
from matrix_bus.errors import RowError
from matrix_bus.llm.history import full_messages
from matrix_bus.orchestrator import Ref, bucket, work_stream
from matrix_bus.payload import CHUNK_BYTES, Payloads, references
from matrix_bus.registry import RunRecord
from tests.helpers import all_outcomes, connected, messages, submitted, unique, until, working
from tests.trip import rows, trip

WEB_PAGES = Path(__file__).parents[3] / "shared" / "data" / "web_pages.jsonl.zst"


def text(size: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(string.ascii_letters, k=size))


@pytest.fixture
async def store(bus: Bus) -> Payloads:
    record = await submitted(bus, trip(), rows(0))
    return Payloads(bus, record.id)


@contextlib.asynccontextmanager
async def stock_client(url: str, run_id: str) -> AsyncIterator[Any]:
    """The object store as any NATS client sees it."""
    connection = await nats.connect(url)
    try:
        yield await connection.jetstream().object_store(bucket(run_id))
    finally:
        await connection.close()


# --- the store ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, CHUNK_BYTES + 1, 3_000_000])
async def test_a_value_comes_back(store: Payloads, size: int) -> None:
    body = text(size).encode()
    ref = await store.put(body)
    assert (ref, ref.bytes) == (Ref.of(body), size)
    assert await store.get(ref) == body


async def test_a_stock_client_reads_what_we_write(bus: Bus) -> None:
    record = await submitted(bus, trip(), rows(0))
    body = text(CHUNK_BYTES * 2 + 5).encode()
    ref = await Payloads(bus, record.id).put(body)
    async with stock_client(bus.url, record.id) as objects:
        found = await objects.get(ref.sha256)  # checks the digest itself
        assert found.data == body
        assert [info.name for info in await objects.list()] == [ref.sha256]
        assert (found.info.size, found.info.chunks) == (len(body), 3)


async def test_we_read_what_a_stock_client_writes(bus: Bus) -> None:
    record = await submitted(bus, trip(), rows(0))
    body = text(CHUNK_BYTES + 5).encode()
    ref = Ref.of(body)
    async with stock_client(bus.url, record.id) as objects:
        await objects.put(ref.sha256, body)
    assert await Payloads(bus, record.id).get(ref) == body


async def test_a_value_is_written_once(bus: Bus, store: Payloads) -> None:
    body = text(CHUNK_BYTES * 3).encode()
    await store.put(body)
    before = await messages(bus, store._stream)
    await store.put(body)
    assert await messages(bus, store._stream) == before == 4


async def test_two_that_write_the_same_value_at_once_leave_one(bus: Bus, store: Payloads) -> None:
    body = text(CHUNK_BYTES * 3).encode()
    await asyncio.gather(*(store.put(body) for _ in range(5)))
    assert await messages(bus, store._stream) == 4
    assert await store.get(Ref.of(body)) == body


async def test_a_value_that_is_not_there_is_a_clear_error(store: Payloads) -> None:
    with pytest.raises(RowError, match="is not in the object store"):
        await store.get(Ref.of(b"never stored"))


async def test_a_value_can_be_freed(bus: Bus, store: Payloads) -> None:
    ref, other = await store.put(b"1" * 9000), await store.put(b"2" * 9000)
    assert await store.names() == {ref.sha256, other.sha256}
    await store.free(ref.sha256)
    assert await store.names() == {other.sha256}
    assert await messages(bus, store._stream) == 2
    with pytest.raises(RowError):
        await store.get(ref)


async def test_a_broker_that_dies_in_the_middle_costs_nothing(broker: Broker) -> None:
    async with connected(broker.url) as bus:
        record = await submitted(bus, trip(), rows(0))
        payloads = Payloads(bus, record.id)
        bodies = [text(CHUNK_BYTES * 20, seed).encode() for seed in range(4)]
        writing = asyncio.gather(*(payloads.put(body) for body in bodies))
        await until(lambda: _some(bus, payloads), "the first chunks")
        broker.kill()
        broker.start()
        refs = await asyncio.wait_for(writing, 30)
        assert [await payloads.get(ref) for ref in refs] == bodies
        assert await messages(bus, payloads._stream) == 4 * 21, "no chunk twice"


async def _some(bus: Bus, payloads: Payloads) -> bool:
    return await messages(bus, payloads._stream) > 3


# --- large values in a state ----------------------------------------------------------------------------------------


class Page(State):
    url: str
    page: Large[str]
    words: Large[list[int]] | None = None
    seen: list[int] = []  # noqa: RUF012 - msgspec copies it


def reading(first: Any, second: Any = None) -> Workflow[Page]:
    flow = Workflow(unique("reading"), state=Page, start="first")
    flow.code_hash = "of-this-test"
    flow.role(name="first")(first)

    async def end(row: Row[Page]) -> Outcome:
        return success()

    flow.role(name="second")(second or end)
    return flow


async def finished(
    bus: Bus, flow: Workflow[Any], bodies: list[bytes], config: RunConfig | None = None
) -> tuple[RunRecord, list[OutcomeRecord], list[OutcomeRecord]]:
    """The run, its outcomes as the stream has them, and as collected."""
    record = await submitted(bus, flow, bodies, config)
    async with working(bus.url, flow):
        raw = await all_outcomes(bus, record)
    payloads = Payloads(bus, record.id)
    from matrix_bus.orchestrator import decode_outcome, encode
    from matrix_bus.payload import whole

    return record, raw, [decode_outcome(await whole(encode(outcome), payloads)) for outcome in raw]


async def test_a_large_value_travels_as_a_reference(bus: Bus) -> None:
    big = text(500_000)
    sizes: list[int] = []

    async def first(row: Row[Page]) -> Next:
        sizes.append(len(row._message.state) + len(row._message.input))
        assert await row.state.page.get() == big
        assert row.state.page.value == big
        assert (await row.input())["page"] == big
        row.state.words = Large(list(range(20_000)))
        return to("second")

    async def second(row: Row[Page]) -> Outcome:
        sizes.append(len(row._message.state) + len(row._message.input))
        assert row.state.words is not None
        row.state.seen.append(sum(await row.state.words.get()))
        return success()

    flow = reading(first, second)
    line = msgspec.json.encode({"url": "u", "page": big})
    record, (raw,), (outcome,) = await finished(bus, flow, [line])
    assert outcome.outcome == "success", outcome.errors
    assert max(sizes) < 1000, "neither the line nor the page hops along"
    assert bytes(outcome.input) == line
    state = json.loads(bytes(outcome.state))
    assert (state["page"], state["words"], state["seen"]) == (big, list(range(20_000)), [sum(range(20_000))])
    assert len(bytes(raw.state)) < 1000
    names = await Payloads(bus, record.id).names()
    assert len(names) == 3, "line, page and words, each once"
    assert references(msgspec.json.encode(raw)) == names


async def test_a_small_row_has_nothing_in_the_store(bus: Bus) -> None:
    async def first(row: Row[Page]) -> Next:
        assert await row.state.page.get() == row.state.page.value == "small"
        return to("second")

    record, (raw,), (outcome,) = await finished(bus, reading(first), [b'{"url": "u", "page": "small"}'])
    assert json.loads(bytes(raw.state)) == json.loads(bytes(outcome.state))
    assert await Payloads(bus, record.id).names() == set()


async def test_rows_and_trials_share_a_value(bus: Bus) -> None:
    async def first(row: Row[Page]) -> Next:
        return to("second")

    line = msgspec.json.encode({"url": "u", "page": text(100_000)})
    record, _, outcomes = await finished(bus, reading(first), [line, line], RunConfig(trials=3))
    assert [o.outcome for o in outcomes] == ["success"] * 6
    assert len(await Payloads(bus, record.id).names()) == 2


def in_a_thread(row: Row[Page]) -> Next:
    row.state.seen.append(len(row.state.page.value))
    row.state.page = Large(row.state.page.value + "!")
    return to("second")


async def test_a_plain_def_handler_has_its_values_at_hand(bus: Bus) -> None:
    line = msgspec.json.encode({"url": "u", "page": text(100_000)})
    _, _, (outcome,) = await finished(bus, reading(in_a_thread), [line])
    assert outcome.outcome == "success", outcome.errors
    state = json.loads(bytes(outcome.state))
    assert (state["seen"], len(state["page"])) == ([100_000], 100_001)


async def test_a_value_that_is_lost_ends_the_row_as_failed(bus: Bus) -> None:
    freed = asyncio.Event()

    async def first(row: Row[Page]) -> Next:
        await freed.wait()
        return to("second")

    async def second(row: Row[Page]) -> Outcome:
        await row.state.page.get()
        return success()

    flow = reading(first, second)
    record = await submitted(bus, flow, [msgspec.json.encode({"url": "u", "page": text(100_000)})])
    payloads = Payloads(bus, record.id)
    async with working(bus.url, flow):
        await until(lambda: _hops(bus, record), "the first hop")
        for name in await payloads.names():
            await payloads.free(name)
        freed.set()
        (outcome,) = await all_outcomes(bus, record)
    assert (outcome.outcome, outcome.reason) == ("failed", "bad_row")
    assert "is not in the object store" in outcome.errors[0].message


async def _hops(bus: Bus, record: RunRecord) -> bool:
    return await messages(bus, work_stream(record.id)) == 2


async def test_a_wrong_type_inside_is_a_bad_row(bus: Bus) -> None:
    async def first(row: Row[Page]) -> Next:
        return to("second")

    _, _, (outcome,) = await finished(bus, reading(first), [b'{"url": "u", "page": 5}'])
    assert (outcome.outcome, outcome.reason) == ("failed", "bad_row")
    assert "Expected `str`, got `int`" in outcome.errors[0].message


# --- the limit of a message -----------------------------------------------------------------------------------------


@pytest.fixture
async def small_messages(tmp_path: Path) -> AsyncIterator[Bus]:
    """A broker that takes messages of 1 MB, as a stock server does."""
    with Broker(tmp_path / "broker", max_payload="1MB") as broker:
        async with connected(broker.url) as connection:
            yield connection


async def test_a_state_above_the_limit_travels_whole_in_the_store(small_messages: Bus) -> None:
    bus = small_messages

    async def grow(row: Row[Any]) -> Next:
        row.state.text = text(3_000_000)
        return to("b")

    async def check(row: Row[Any]) -> Outcome:
        row.state.draw = len(row.state.text)
        return success()

    _, (raw,), (outcome,) = await finished(bus, trip(grow, check), rows(1))
    assert outcome.outcome == "success", outcome.errors
    state = json.loads(bytes(outcome.state))
    assert (state["draw"], state["text"]) == (3_000_000, text(3_000_000))
    assert len(msgspec.json.encode(raw)) < 2000


async def test_an_input_line_above_the_limit(small_messages: Bus) -> None:
    async def step(row: Row[Any]) -> Outcome:
        row.state.draw = len(row.state.text)
        return success()

    line = msgspec.json.encode({"text": text(5_000_000)})
    _, _, (outcome,) = await finished(small_messages, trip(step), [line])
    assert (outcome.outcome, bytes(outcome.input)) == ("success", line)
    assert json.loads(bytes(outcome.state))["draw"] == 5_000_000


async def test_what_does_not_fit_leaves_the_message_whatever_the_setting_says(small_messages: Bus) -> None:
    async def step(row: Row[Any]) -> Outcome:
        row.state.draw = len(row.state.text)
        return success()

    sizes = [900_000, small_messages.max_body - 15, small_messages.max_payload, 2_000_000]
    lines = [msgspec.json.encode({"text": text(size)}) for size in sizes]
    config = RunConfig(io=IoConfig(offload_above_bytes=100 << 20))
    _, _, outcomes = await finished(small_messages, trip(step), lines, config)
    assert [(o.outcome, bytes(o.input)) for o in outcomes] == [("success", line) for line in lines]
    assert [json.loads(bytes(o.state))["draw"] for o in outcomes] == sizes


async def test_a_row_that_fails_with_a_lot_to_say_still_ends(small_messages: Bus) -> None:
    async def fail(row: Row[Any]) -> Outcome:
        row._message.history[:] = [msgspec.json.encode({"role": "a", "text": text(400_000, n)}) for n in range(12)]
        raise ValueError("x" * 3_000_000)

    line = msgspec.json.encode({"text": text(2_000_000)})
    _, (raw,), (outcome,) = await finished(small_messages, trip(fail), [line])
    assert (outcome.outcome, outcome.reason) == ("failed", "error: ValueError")
    assert len(outcome.history) == 12 and outcome.history_cut == 0
    assert [len(json.loads(bytes(call))["text"]) for call in outcome.history] == [400_000] * 12
    assert len(msgspec.json.encode(raw)) < 20_000


@pytest.mark.skipif(not WEB_PAGES.exists(), reason="needs the web pages of the shared data")
async def test_a_page_of_several_megabytes_goes_through(small_messages: Bus) -> None:
    from matrix_bus.dataset import Line, read

    async def step(row: Row[Any]) -> Outcome:
        row.state.draw = len(row.state.text)
        return success()

    lines = (line.body for line in read(str(WEB_PAGES)) if isinstance(line, Line))
    largest = max(lines, key=len)
    assert len(largest) > 2_000_000
    _, _, (outcome,) = await finished(small_messages, trip(step), [largest])
    assert (outcome.outcome, bytes(outcome.input)) == ("success", largest)
    assert json.loads(bytes(outcome.state))["draw"] == len(json.loads(largest)["text"])


# --- a long history -------------------------------------------------------------------------------------------------


class Talk(State):
    said: int = 0


TURNS = 30


def talk() -> Workflow[Talk]:
    """Two agents, each of which sees the whole conversation, of which the history is the only copy."""
    flow = Workflow(unique("talk"), state=Talk, start="ann")
    flow.code_hash = "of-this-test"

    def agent(name: str, other: str) -> None:
        async def speak(row: Row[Talk], llm: LLM) -> Next | Outcome:
            calls = [call["text"] for call in await row.history()]
            assert len(calls) == row.state.said
            reply = await llm.chat([user("Begin."), *(user(said) for said in calls)])
            assert reply.text
            row.state.said += 1
            return success() if row.state.said == TURNS else to(other)

        flow.role(name=name)(speak)

    agent("ann", "bob")
    agent("bob", "ann")
    return flow


@contextlib.asynccontextmanager
async def talkative_model() -> AsyncIterator[str]:
    """Answers each call with 3 000 characters of its own."""
    count = 0

    async def chat(_: web.Request) -> web.Response:
        nonlocal count
        count += 1
        message = {"role": "assistant", "content": text(3000, count)}
        return web.json_response({"model": "m", "choices": [{"message": message, "finish_reason": "stop"}]})

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def test_a_long_history_is_closed_into_segments_and_comes_back_whole(bus: Bus) -> None:
    async with talkative_model() as url:
        config = RunConfig(llm=LlmConfig(urls=[url]), io=IoConfig(offload_above_bytes=16 << 10))
        record, (raw,), (outcome,) = await finished(bus, talk(), [b"{}"], config)
    assert outcome.outcome == "success", outcome.errors
    history = [bytes(call) for call in outcome.history]
    assert len(history) == TURNS
    assert len(await Payloads(bus, record.id).names()) >= 4, "several segments, each written once"
    texts = [json.loads(call)["text"] for call in history]
    for index in range(TURNS):
        assert [m.content for m in full_messages(history, index)] == ["Begin.", *texts[:index]]
    grown = sum(map(len, history))
    assert grown < TURNS * 3000 * 4, "no call repeats the conversation, although it lies in the store"
    assert len(msgspec.json.encode(raw)) < grown


async def test_collecting_writes_whole_lines(bus: Bus, tmp_path: Path) -> None:
    async def first(row: Row[Page]) -> Next:
        return to("second")

    flow = reading(first)
    line = msgspec.json.encode({"url": "u", "page": text(300_000)})
    record, _, _ = await finished(bus, flow, [line, b'{"url": "v", "page": "small"}'])
    await run.collect(bus, record, tmp_path / "out.jsonl", follow=True)
    found = sorted(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()), key=lambda o: o["row"])
    assert [len(o["state"]["page"]) for o in found] == [300_000, 5]
    assert found[0]["input"] == json.loads(line)


async def test_a_process_handler_has_its_values_at_hand(bus: Bus, tmp_path: Path) -> None:
    path = tmp_path / "apart.py"
    name = unique("apart")
    path.write_text(f'''
import os
from matrix_bus import Large, Outcome, Row, State, Workflow, success


class Page(State):
    page: Large[str]
    pid: int = 0


flow = Workflow("{name}", state=Page, start="turn")


@flow.role(process=True)
def turn(row: Row[Page]) -> Outcome:
    row.state.page = Large(row.state.page.value[::-1])
    row.state.pid = os.getpid()
    return success()
''')
    page = text(200_000)
    _, _, (outcome,) = await finished(bus, load_workflow(str(path)), [msgspec.json.encode({"page": page})])
    assert outcome.outcome == "success", outcome.errors
    state = json.loads(bytes(outcome.state))
    assert state["page"] == page[::-1]
    assert state["pid"] not in (0, os.getpid())
