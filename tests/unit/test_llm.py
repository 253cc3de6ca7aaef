"""Model calls: the two transports against one real HTTP peer, the pool's line, and the record of calls."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from email.utils import formatdate
from typing import Any

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

import matrix_bus.llm
from matrix_bus.config import ModelConfig, Sampling
from matrix_bus.errors import (
    ConfigError,
    ContextLengthExceeded,
    EndpointGone,
    HandlerError,
    ModelAccessDenied,
    ModelError,
    ModelNotFound,
    ModelRefused,
    ModelTimeout,
    RateLimited,
    ReplyInvalid,
    RowError,
    StructureInvalid,
    is_transient,
)
from matrix_bus.llm import (
    LLM,
    Call,
    Endpoint,
    Message,
    ModelPool,
    Reply,
    Usage,
    assistant,
    system,
    tool,
    user,
)
from matrix_bus.llm.client import derived_seed
from matrix_bus.llm.direct import DirectTransport
from matrix_bus.llm.endpoint import Limit
from matrix_bus.llm.history import (
    Recorder,
    full_messages,
    read_call,
    read_segment,
    segment_body,
    with_segment,
)
from matrix_bus.llm.messages import ChatRequest, OnText, Transport
from matrix_bus.llm.sdk import SdkTransport
from matrix_bus.orchestrator import Ref

KEY = "sk-very-secret"
LONG_S = 30.0
REQUEST = ChatRequest("m", [system("be brief"), user("hi")], Sampling(temperature=0.5, extra={"top_k": 3}))

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def completion(*texts: str, **fields: Any) -> dict[str, Any]:
    choices = [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} for text in texts]
    return {"id": "1", "object": "chat.completion", "model": "m-1", "choices": choices, **fields}


class Server:
    """A model server on a free loopback port; `handler` answers the chat calls, whose bodies it keeps."""

    def __init__(self) -> None:
        self.handler: Handler = self.say
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.arrived = asyncio.Event()
        self.release = asyncio.Event()
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.url = ""

    async def start(self) -> Server:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def stop(self) -> None:
        self.release.set()
        await self._runner.cleanup()

    def answers(self, status: int, body: Any, **headers: str) -> None:
        async def handler(_: web.Request) -> web.StreamResponse:
            text = body if isinstance(body, str) else json.dumps(body)
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return web.Response(status=status, text=text, headers=named, content_type="application/json")

        self.handler = handler

    async def say(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(completion("hello"))

    async def hang(self, _: web.Request) -> web.StreamResponse:
        self.arrived.set()
        await self.release.wait()
        return web.json_response(completion("late"))

    async def drop(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"choices": [')
        assert request.transport is not None
        request.transport.abort()
        return response

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        return await self.handler(request)

    async def _models(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [{"id": "alpha"}, {"id": "beta"}]})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    started = await Server().start()
    yield started
    await started.stop()


def no_aiohttp(**_: Any) -> None:
    raise RuntimeError("as the SDK does without its aiohttp extra")


@pytest.fixture(params=["direct", "sdk", "sdk-without-aiohttp"])
async def transport(
    request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Transport]:
    if request.param == "sdk-without-aiohttp":
        monkeypatch.setattr("openai.DefaultAioHttpClient", no_aiohttp)
    made: Transport = (DirectTransport if request.param == "direct" else SdkTransport)(server.url, KEY)
    yield made
    await made.close()


# --- one suite for both transports -------------------------------------------------------------------------


async def test_azure_has_deployments_and_headers_of_its_own(server: Server) -> None:
    paths: list[str] = []

    async def azure(request: web.Request) -> web.StreamResponse:
        paths.append(f"{request.path_qs} {request.headers.get('api-key')}")
        return await server.say(request)

    app = web.Application()
    app.router.add_post("/openai/deployments/{name}/chat/completions", azure)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    pool = ModelPool(ModelConfig(model="my-gpt", transport="azure", api_version="2024-10-21"), [url], KEY)
    reply, _ = await pool.complete(ChatRequest("my-gpt", [user("hi")]))
    assert reply.text == "hello"
    assert paths == [f"/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21 {KEY}"]
    await pool.close()
    await runner.cleanup()


async def test_a_reply(transport: Transport, server: Server) -> None:
    reply = await transport.complete(REQUEST, LONG_S)
    assert (reply.text, reply.finish_reason, reply.model) == ("hello", "stop", "m-1")
    assert (reply.endpoint, reply.choices) == (server.url, ["hello"])
    assert reply.usage == Usage(calls=1)
    assert reply.latency_s > 0
    assert server.bodies == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
            "temperature": 0.5,
            "top_k": 3,
        }
    ]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


async def test_everything_that_a_reply_can_hold(transport: Transport, server: Server) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    first = {
        "message": {"content": None, "tool_calls": calls, "reasoning_content": "hm"},
        "finish_reason": "tool_calls",
        "logprobs": {"content": [{"token": "a", "logprob": -0.5}]},
    }
    second = {"message": {"content": "two"}, "finish_reason": None}
    tokens = {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    server.answers(200, completion(choices=[first, second], usage=tokens))
    reply = await transport.complete(REQUEST, LONG_S)
    assert reply.usage == Usage(10, 3, 8, 1)
    assert (reply.text, reply.tool_calls, reply.reasoning) == ("", calls, "hm")
    assert reply.choices == ["", "two"]
    assert reply.logprobs == first["logprobs"]
    assert msgspec.json.decode(msgspec.json.encode(reply), type=Reply) == reply


async def test_tool_messages_are_passed_through(transport: Transport, server: Server) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    chat = [user([{"type": "text", "text": "go"}]), assistant(None, calls), tool("42", "c1")]
    await transport.complete(ChatRequest("m", chat, Sampling(extra={"tools": tools})), LONG_S)
    assert server.bodies[0]["tools"] == tools
    assert server.bodies[0]["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "go"}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]


async def test_a_large_prompt(transport: Transport, server: Server) -> None:
    text = "x" * (1 << 21)
    with warnings.catch_warnings(record=True, action="always") as caught:
        await transport.complete(ChatRequest("m", [user(text)]), LONG_S)
    assert server.bodies[0]["messages"][0]["content"] == text
    # aiohttp calls it a sin to send so many bytes in one piece; inside the SDK we cannot help it.
    assert not caught or isinstance(transport, SdkTransport)


async def test_models(transport: Transport) -> None:
    assert await transport.models() == ["alpha", "beta"]


@pytest.mark.parametrize("kind", [DirectTransport, SdkTransport])
async def test_without_a_key_none_is_sent(
    kind: Callable[[str], Transport], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-elses")
    transport = kind(server.url)
    await transport.complete(REQUEST, LONG_S)
    await transport.close()
    assert "Authorization" not in server.headers[0]


TOO_LONG = (
    {"object": "error", "message": "This model's maximum context length is 10 tokens.", "code": 400},
    {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error", "n_ctx": 10}},
    {"error": {"message": "the request exceeds the available context size, try increasing it"}},
    {"error": {"message": "too long", "code": "context_length_exceeded"}},
    {"message": "The input (20 tokens) is longer than the model's context length (10 tokens)."},
)

REFUSALS: list[tuple[int, Any, type[ModelError], str]] = [
    (500, {"error": {"message": "cuda"}}, EndpointGone, "answered 500: cuda"),
    (503, "<html>busy</html>", RateLimited, "answered 503: <html>busy</html>"),
    (429, {"detail": "slow down"}, RateLimited, "answered 429: slow down"),
    (401, {"error": {"message": f"bad key {KEY}"}}, ModelAccessDenied, "api_key_env"),
    (403, {"error": {"message": f"bad key {KEY[:6]}***"}}, ModelAccessDenied, "api_key_env"),
    (404, {"error": {"message": "The model `m` does not exist."}}, ModelNotFound, "it has 'alpha', 'beta'"),
    (400, {"error": {"message": "The model `m` does not exist."}}, ModelNotFound, "it has 'alpha', 'beta'"),
    (400, {"error": {"message": f"temperature {KEY}"}}, ModelRefused, "temperature [key]"),
    (422, {"detail": [{"loc": ["body"]}]}, ModelRefused, '[{"loc":["body"]}]'),
    (400, "x" * 2000, ModelRefused, "x" * 500 + ";"),
    (200, '{"choices": [', ReplyInvalid, "not a chat completion"),
    (200, "<html>", ReplyInvalid, "ends in /v1"),
    (200, completion(), ReplyInvalid, "no choices"),
    (200, {"error": {"message": "overloaded"}}, ReplyInvalid, "overloaded"),
    *[(400, body, ContextLengthExceeded, "shorten the prompt") for body in TOO_LONG],
]


@pytest.mark.parametrize(("status", "body", "error", "said"), REFUSALS)
async def test_refusals(
    transport: Transport, server: Server, status: int, body: Any, error: type[ModelError], said: str
) -> None:
    server.answers(status, body)
    with pytest.raises(ModelError) as caught:
        await transport.complete(REQUEST, LONG_S)
    message = str(caught.value)
    assert type(caught.value) is error
    assert said in message
    assert server.url in message
    assert "'m'" in message
    assert KEY not in message
    assert KEY[:6] not in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("header", "low_s", "high_s"),
    [
        ("7", 7.0, 7.0),
        ("-1", 0.0, 0.0),
        (formatdate(time.time() + 36_000, usegmt=True), 30_000.0, 36_000.0),
        (formatdate(0, usegmt=True), 0.0, 0.0),
    ],
)
async def test_retry_after(transport: Transport, server: Server, header: str, low_s: float, high_s: float) -> None:
    server.answers(429, {}, Retry_After=header)
    with pytest.raises(RateLimited) as caught:
        await transport.complete(REQUEST, LONG_S)
    assert caught.value.retry_after_s is not None
    assert low_s <= caught.value.retry_after_s <= high_s


async def test_no_or_odd_retry_after(transport: Transport, server: Server) -> None:
    for headers in ({}, {"Retry_After": "soon"}):
        server.answers(429, {}, **headers)
        with pytest.raises(RateLimited) as caught:
            await transport.complete(REQUEST, LONG_S)
        assert caught.value.retry_after_s is None


async def test_a_hanging_server(transport: Transport, server: Server) -> None:
    server.handler = server.hang
    with pytest.raises(ModelTimeout, match=r"within 0\.2 s.*timeout_s"):
        await transport.complete(REQUEST, 0.2)


async def test_a_connection_dropped_in_the_middle(transport: Transport, server: Server) -> None:
    server.handler = server.drop
    with pytest.raises(EndpointGone, match="is gone"):
        await transport.complete(REQUEST, LONG_S)


async def test_a_refused_connection(transport: Transport, server: Server) -> None:
    await server.stop()
    with pytest.raises(EndpointGone, match="is gone"):
        await transport.complete(REQUEST, LONG_S)


async def test_a_connection_that_the_server_was_closing_is_not_its_end(server: Server) -> None:
    """Each answer is the last on its connection, and does not say so."""

    async def closes(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        asyncio.get_running_loop().call_soon(request.transport.close)
        return await server.say(request)

    server.handler = closes
    direct = DirectTransport(server.url)
    for _ in range(20):
        assert (await direct.complete(REQUEST, LONG_S)).text == "hello"
    await direct.close()


async def test_closing_ends_calls_in_flight(transport: Transport, server: Server) -> None:
    server.handler = server.hang
    call = asyncio.create_task(transport.complete(REQUEST, LONG_S))
    await server.arrived.wait()
    await transport.close()
    await transport.close()
    server.release.set()  # an SDK that lets the call finish may do so
    result = (await asyncio.gather(call, return_exceptions=True))[0]
    assert isinstance(result, EndpointGone | Reply)
    with pytest.raises(EndpointGone):
        await transport.complete(REQUEST, LONG_S)


# --- streaming ----------------------------------------------------------------------------------------------


def streams(server: Server, *pieces: Any, end: str = "data: [DONE]\n\n", cut: int = 7) -> None:
    """The server answers with these chunks as events, in blocks that are cut anywhere."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        body = "".join(f"data: {json.dumps(piece)}\r\n\r\n" for piece in pieces) + end
        for at in range(0, len(body), cut):
            await response.write(body[at : at + cut].encode())
        return response

    server.handler = handler


def piece(delta: dict[str, Any], index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"id": "1", "model": "m-1", "choices": [{"index": index, "delta": delta, **fields}]}


TOOL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a"'}}


async def test_a_streamed_reply_is_what_would_have_come_in_one_piece(transport: Transport, server: Server) -> None:
    streams(
        server,
        piece({"role": "assistant", "content": ""}),
        piece({"reasoning_content": "hm"}),
        piece({"content": "Grüß"}),
        piece({"content": "other"}, index=1),
        piece({"content": " dich"}),
        piece({"tool_calls": [TOOL]}),
        piece({"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}),
        piece({}, finish_reason="tool_calls"),
        piece({}, index=1, finish_reason="stop"),
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}},
    )
    heard: list[str] = []
    reply = await transport.complete(REQUEST, LONG_S, heard.append)
    assert heard == ["Grüß", " dich"]
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("Grüß dich", "hm", "tool_calls")
    assert reply.tool_calls == [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    assert reply.choices == ["Grüß dich", "other"]
    assert reply.usage == Usage(7, 3, 0, 1)
    assert 0 < reply.first_s <= reply.latency_s
    assert server.bodies[0]["stream"] is True
    assert server.bodies[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("pieces", "end", "said"),
    [
        ([piece({"content": "half"})], "", "ended before it was finished"),
        ([], "data: {nonsense\n\n", "malformed"),
        ([{"error": {"message": "out of memory"}}], "", "out of memory"),
        ([], "data: [DONE]\n\n", "no choices"),
    ],
)
async def test_a_stream_that_breaks_off(
    transport: Transport, server: Server, pieces: list[Any], end: str, said: str
) -> None:
    streams(server, *pieces, end=end)
    with pytest.raises((ReplyInvalid, EndpointGone), match=said):
        await transport.complete(REQUEST, LONG_S, lambda _: None)


async def test_a_session_is_told_to_routers(transport: Transport, server: Server) -> None:
    await transport.complete(ChatRequest("m", [user("hi")], session="run:7"), LONG_S)
    await transport.complete(ChatRequest("m", [user("hi")]), LONG_S)
    told = [{name.lower(): value for name, value in headers.items()} for headers in server.headers]
    assert [headers.get("x-session-id") for headers in told] == ["run:7", None]


async def test_a_refusal_of_a_streamed_call(transport: Transport, server: Server) -> None:
    server.answers(429, {"detail": "slow down"})
    with pytest.raises(RateLimited, match="slow down"):
        await transport.complete(REQUEST, LONG_S, lambda _: None)


async def test_a_reply_that_never_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matrix_bus.llm.direct.MOST_BYTES", 1 << 16)

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" " * 4096)
        return response

    server.handler = endless
    direct = DirectTransport(server.url)
    with pytest.raises(ReplyInvalid, match="longer than"):
        await direct.complete(REQUEST, LONG_S)
    await direct.close()


# --- the pool ----------------------------------------------------------------------------------------------


class FakeTransport:
    """Answers when told to: each call waits for its own `finish`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.calls: list[tuple[str, asyncio.Future[Reply]]] = []
        self.closed = False

    async def complete(self, request: ChatRequest, timeout_s: float, on_text: OnText | None = None) -> Reply:
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.calls.append((str(request.messages[0].content), answer))
        return await answer

    async def models(self) -> list[str]:
        return []

    async def close(self) -> None:
        self.closed = True

    def finish(self, index: int = -1) -> None:
        text, answer = self.calls[index]
        answer.set_result(Reply(text=text, finish_reason="stop", model="m", endpoint=self.url))

    def fail(self, error: Exception, index: int = -1) -> None:
        self.calls[index][1].set_exception(error)


class Fakes(dict[str, FakeTransport]):
    """A pool's transports by host, made as it asks for them."""

    def __call__(self, url: str) -> Transport:
        made = self[url.removeprefix("http://")] = FakeTransport(url)
        return made

    def asked(self) -> list[str]:
        return [text for fake in self.values() for text, _ in fake.calls]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    monkeypatch.setattr("matrix_bus.llm.pool._factory", lambda *_: made)
    return made


def pool_of(*hosts: str, cap: int = 1, patience_s: float = 0.0, **capacities: float) -> ModelPool:
    config = ModelConfig(model="m", concurrency=cap, patience_s=patience_s)
    return ModelPool(config, {f"http://{host}/": capacities.get(host, 1.0) for host in hosts})


def ask(pool: ModelPool, text: str, session: str = "") -> asyncio.Task[tuple[Reply, float]]:
    return asyncio.create_task(pool.complete(ChatRequest("m", [user(text)], session=session)))


async def its_time_is_up(endpoint: Endpoint) -> None:
    """As if the pause of an endpoint that was down were over."""
    assert endpoint.timer is not None
    endpoint.down_until = 0.0
    endpoint.timer._run()
    await settle()


async def settle() -> None:
    """Let everything that can run without further events run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_first_come_first_served(fakes: Fakes) -> None:
    pool = pool_of("a")
    tasks = [ask(pool, str(i)) for i in range(5)]
    for i in range(5):
        await settle()
        assert fakes.asked() == [str(k) for k in range(i + 1)]
        assert pool.waiting == 4 - i
        fakes["a"].finish()
    replies = [reply.text for reply, _ in await asyncio.gather(*tasks)]
    assert replies == ["0", "1", "2", "3", "4"]
    assert pool.endpoints[0].outstanding == 0
    await pool.close()


async def test_a_newcomer_does_not_overtake(fakes: Fakes) -> None:
    pool = pool_of("a")
    first, second = ask(pool, "first"), ask(pool, "second")
    await settle()
    fakes["a"].finish()  # the place is free as soon as `first` runs, and `late` asks in the same instant
    late = ask(pool, "late")
    await settle()
    assert fakes.asked() == ["first", "second"]
    fakes["a"].finish()
    await settle()
    fakes["a"].finish()
    await asyncio.gather(first, second, late)
    await pool.close()


async def test_the_least_busy_endpoint_is_chosen(fakes: Fakes) -> None:
    pool = pool_of("a", "b", "c", cap=3)
    tasks = [ask(pool, str(i)) for i in range(6)]
    await settle()
    assert {host: len(fake.calls) for host, fake in fakes.items()} == {"a": 2, "b": 2, "c": 2}
    fakes["b"].finish()
    await settle()
    tasks.append(ask(pool, "6"))
    await settle()
    assert len(fakes["b"].calls) == 3
    for fake in fakes.values():
        for _, answer in fake.calls:
            if not answer.done():
                fake.finish(fake.calls.index((_, answer)))
    await asyncio.gather(*tasks)
    await pool.close()


async def test_cancelled_callers_give_their_place_back(fakes: Fakes) -> None:
    pool = pool_of("a")
    running, in_line, last = ask(pool, "running"), ask(pool, "in line"), ask(pool, "last")
    await settle()
    in_line.cancel()
    await settle()
    running.cancel()
    await settle()
    assert fakes.asked() == ["running", "last"]
    fakes["a"].finish()
    assert (await last)[0].text == "last"
    assert pool.endpoints[0].outstanding == 0
    await pool.close()


async def test_a_place_given_in_the_instant_of_cancelling_is_not_lost(fakes: Fakes) -> None:
    pool = pool_of("a")
    running, unlucky, last = ask(pool, "running"), ask(pool, "unlucky"), ask(pool, "last")
    await settle()
    # Cancelled when the place is already its own, but before it could run.
    fakes["a"].calls[0][1].add_done_callback(lambda _: asyncio.get_running_loop().call_soon(unlucky.cancel))
    fakes["a"].finish()
    await settle()
    assert unlucky.cancelled()
    assert fakes.asked()[-1] == "last"
    fakes["a"].finish()
    await asyncio.gather(running, last)
    assert pool.endpoints[0].outstanding == 0
    await pool.close()


async def test_waiting_in_line_does_not_use_up_the_timeout(server: Server) -> None:
    async def slowly(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.005)  # the model at work
        return web.json_response(completion("ok"))

    server.handler = slowly
    # 2000 calls of 5 ms, 4 at a time, cannot take less than 2.5 s.
    pool = ModelPool(ModelConfig(model="m", concurrency=4, timeout_s=2.0), [server.url])
    results = await asyncio.gather(*[pool.complete(REQUEST) for _ in range(2000)])
    assert {reply.text for reply, _ in results} == {"ok"}
    assert max(wait_s for _, wait_s in results) > 2.0
    await pool.close()


async def test_a_call_moves_to_another_endpoint(fakes: Fakes) -> None:
    pool = pool_of("a", "b")
    task = ask(pool, "x")
    await settle()
    gone, other = sorted(fakes.values(), key=lambda fake: -len(fake.calls))
    gone.fail(EndpointGone("gone"))
    await settle()
    down = next(endpoint for endpoint in pool.endpoints if endpoint.url == gone.url)
    assert not down.has_room(asyncio.get_running_loop().time())
    other.finish()
    assert (await task)[0].endpoint == other.url

    # While it is down, callers rather wait for the other one.
    tasks = [ask(pool, "y"), ask(pool, "z")]
    await settle()
    assert (len(gone.calls), len(other.calls), pool.waiting) == (1, 2, 1)

    # When its time is up, it gets what is waiting, without any other event.
    await its_time_is_up(down)
    assert (len(gone.calls), pool.waiting) == (2, 0)
    gone.finish()
    other.finish()
    await asyncio.gather(*tasks)
    assert down.failures == 0
    assert down.has_room(asyncio.get_running_loop().time())
    await pool.close()


async def test_one_that_comes_back_gets_one_call_first(fakes: Fakes) -> None:
    pool = pool_of("a", cap=4, patience_s=60)
    tasks = [ask(pool, str(i)) for i in range(4)]
    await settle()
    for index in range(4):
        fakes["a"].fail(EndpointGone("gone"), index)
    await settle()
    (endpoint,) = pool.endpoints
    assert (pool.waiting, endpoint.failures) == (4, 1), "they wait, and no row fails"
    await its_time_is_up(endpoint)
    assert (len(fakes["a"].calls), pool.waiting) == (5, 3), "one finds out"
    fakes["a"].fail(EndpointGone("still gone"))
    await settle()
    assert (len(fakes["a"].calls), pool.waiting, endpoint.failures) == (5, 4, 2)
    await its_time_is_up(endpoint)
    fakes["a"].finish()
    await settle()
    assert (len(fakes["a"].calls), pool.waiting) == (9, 0), "then all"
    for index in range(6, 9):
        fakes["a"].finish(index)
    await asyncio.gather(*tasks)
    await pool.close()


async def test_a_busy_endpoint_is_given_less_and_the_call_goes_elsewhere(fakes: Fakes) -> None:
    pool = pool_of("a", "b", cap=10, patience_s=60)
    tasks = [ask(pool, str(i)) for i in range(8)]
    await settle()
    a, b = fakes["a"], fakes["b"]
    busy = next(endpoint for endpoint in pool.endpoints if endpoint.url == "http://a")
    a.fail(RateLimited("later", 30.0), 0)
    await settle()
    assert (len(a.calls), len(b.calls)) == (4, 5)
    assert int(busy.limit) == 2, "four were too many: seven tenths of them"
    a.fail(RateLimited("later", 30.0), 1)
    await settle()
    assert int(busy.limit) <= 2
    for fake in (a, b):
        for _, answer in fake.calls:
            if not answer.done():
                fake.finish(fake.calls.index((_, answer)))
    await asyncio.gather(*tasks)
    await pool.close()


async def test_a_busy_only_endpoint_is_asked_again_when_it_said(fakes: Fakes) -> None:
    pool = pool_of("a", patience_s=60)
    task = ask(pool, "x")
    await settle()
    fakes["a"].fail(RateLimited("later", 30.0))
    await settle()
    now = asyncio.get_running_loop().time()
    assert 29.0 < pool.endpoints[0].down_until - now < 40.0
    assert pool.waiting == 1
    await its_time_is_up(pool.endpoints[0])
    fakes["a"].finish()
    assert (await task)[0].text == "x"
    await pool.close()


async def test_a_request_that_breaks_servers_does_not_go_round_all_of_them(fakes: Fakes) -> None:
    pool = pool_of("a", "b", "c", "d", "e", patience_s=60)
    task = ask(pool, "poison")
    for _ in range(3):
        await settle()
        for fake in fakes.values():
            if fake.calls and not fake.calls[-1][1].done():
                fake.fail(EndpointGone("answered 500", answered=True))
    with pytest.raises(EndpointGone):
        await task
    assert len(fakes.asked()) == 3
    now = asyncio.get_running_loop().time()
    assert all(endpoint.has_room(now) for endpoint in pool.endpoints), "one error may be the request's fault"
    await pool.close()


async def test_one_that_answers_with_errors_only_is_down(fakes: Fakes) -> None:
    pool = pool_of("a")
    for _ in range(5):
        task = ask(pool, "x")
        await settle()
        fakes["a"].fail(EndpointGone("answered 500", answered=True))
        with pytest.raises(EndpointGone):
            await task
    assert not pool.endpoints[0].has_room(asyncio.get_running_loop().time())
    await pool.close()


async def test_capacity_weighs(fakes: Fakes) -> None:
    pool = pool_of("a", "b", cap=20, b=3.0)
    tasks = [ask(pool, str(i)) for i in range(16)]
    await settle()
    assert (len(fakes["a"].calls), len(fakes["b"].calls)) == (4, 12)
    for fake in fakes.values():
        for index in range(len(fake.calls)):
            fake.finish(index)
    await asyncio.gather(*tasks)
    await pool.close()


async def test_a_row_finds_the_replica_that_had_it_before(fakes: Fakes) -> None:
    pool = pool_of("a", "b", "c", cap=100)
    placed: dict[str, set[str]] = {f"row {n}": set() for n in range(30)}
    for _ in range(3):
        for session, hosts in placed.items():
            task = ask(pool, "x", session)
            await settle()
            (fake,) = [fake for fake in fakes.values() if fake.calls and not fake.calls[-1][1].done()]
            fake.finish()
            await task
            hosts.add(fake.url)
    assert {len(hosts) for hosts in placed.values()} == {1}
    assert len({host for hosts in placed.values() for host in hosts}) == 3, "and rows are spread"
    await pool.close()


async def test_stickiness_does_not_overload(fakes: Fakes) -> None:
    pool = pool_of("a", "b", cap=100)
    tasks = [ask(pool, "x", "the same row") for _ in range(20)]
    await settle()
    assert sorted(len(fake.calls) for fake in fakes.values()) in ([7, 13], [8, 12], [9, 11])
    for fake in fakes.values():
        for index in range(len(fake.calls)):
            fake.finish(index)
    await asyncio.gather(*tasks)
    await pool.close()


def test_a_limit_grows_call_by_call_and_shrinks_by_a_share() -> None:
    limit = Limit(64)
    limit.push_back(40, now=0.0)
    assert int(limit) == 28
    limit.push_back(28, now=0.0)
    assert int(limit) == 19, "no round trip is known yet"
    for _ in range(19 * 2):
        limit.went_well(1.0, 100, now=1.0)
    assert 20 <= int(limit) <= 21
    limit.push_back(20, now=2.0)
    limit.push_back(20, now=2.1)
    assert int(limit) == 14, "once per round trip"


def test_waiting_far_longer_for_a_token_lowers_the_limit() -> None:
    limit = Limit(64)
    for call in range(50):
        limit.went_well(1.0, 100, now=float(call))
    assert int(limit) == 64
    for call in range(50, 200):
        limit.went_well(4.0, 100, now=float(call))
    assert int(limit) == 64, "a larger batch is slower, and worth it"
    for call in range(200, 1000):
        limit.went_well(30.0, 100, now=float(call))
    assert int(limit) < 20


async def test_failures_at_once_count_as_one(fakes: Fakes) -> None:
    pool = pool_of("a", "b", cap=4)
    tasks = [ask(pool, str(i)) for i in range(4)]
    await settle()
    for index in range(2):
        fakes["a"].fail(EndpointGone("gone"), index)
    await settle()
    down = next(endpoint for endpoint in pool.endpoints if endpoint.url == "http://a")
    assert down.failures == 1
    for index in range(4):
        fakes["b"].finish(index)
    await asyncio.gather(*tasks)
    await pool.close()


async def test_every_endpoint_is_tried_once(fakes: Fakes) -> None:
    pool = pool_of("a", "b", "c")
    task = ask(pool, "x")
    for _ in range(3):
        await settle()
        for fake in fakes.values():
            if fake.calls and not fake.calls[-1][1].done():
                fake.fail(EndpointGone("gone"))
    with pytest.raises(EndpointGone):
        await task
    assert [len(fake.calls) for fake in fakes.values()] == [1, 1, 1]
    await pool.close()


async def test_endpoints_come_and_go(fakes: Fakes) -> None:
    pool = pool_of()
    tasks = [ask(pool, str(i)) for i in range(3)]
    await settle()
    assert pool.waiting == 3
    pool.set_urls(["http://a", "http://b"])
    await settle()
    assert pool.waiting == 1
    leaving = fakes["a"]
    pool.set_urls(["http://b", "http://c"])
    await settle()
    assert pool.waiting == 0
    assert not leaving.closed  # its call goes on
    for fake in fakes.values():
        fake.finish()
    await asyncio.gather(*tasks)
    await settle()
    assert (leaving.closed, fakes["b"].closed) == (True, False)
    await pool.close()
    assert all(fake.closed for fake in fakes.values())


async def test_closing_sends_callers_away(fakes: Fakes) -> None:
    pool = pool_of("a")
    running, in_line = ask(pool, "running"), ask(pool, "in line")
    await settle()
    await pool.close()
    with pytest.raises(EndpointGone, match="closed"):
        await in_line
    fakes["a"].fail(EndpointGone("closed under it"))
    with pytest.raises(EndpointGone):
        await running
    with pytest.raises(EndpointGone):
        await pool.complete(REQUEST)


@pytest.mark.parametrize("transport", ["direct", "sdk"])
async def test_a_pool_over_real_servers(server: Server, transport: Any) -> None:
    other = await Server().start()
    config = ModelConfig(model="m", transport=transport)
    pool = ModelPool(config, [server.url, other.url], f"{KEY}\n")
    await asyncio.gather(*[pool.complete(REQUEST) for _ in range(4)])
    assert (len(server.bodies), len(other.bodies)) == (2, 2)
    await other.stop()
    replies = await asyncio.gather(*[pool.complete(REQUEST) for _ in range(4)])
    assert {reply.endpoint for reply, _ in replies} == {server.url}
    await pool.close()


def test_a_url_must_be_one() -> None:
    with pytest.raises(ConfigError, match=r"'localhost:8000' is not the URL"):
        ModelPool(ModelConfig(), ["localhost:8000"])


# --- what a handler sees -----------------------------------------------------------------------------------


def llm_over(pool: ModelPool, history: list[bytes], sampling: Sampling | None = None, **fields: Any) -> LLM:
    return LLM(
        resolve=lambda _: pool,
        default_alias="default",
        sampling=sampling or Sampling(),
        history=history,
        **{"role": "solver", "hop": 2, "attempt": 1, "seed": 7, **fields},
    )


@pytest.fixture
async def pool(server: Server) -> AsyncIterator[ModelPool]:
    made = ModelPool(ModelConfig(model="m"), [server.url])
    yield made
    await made.close()


async def test_a_call_is_recorded(pool: ModelPool, server: Server) -> None:
    server.answers(200, completion("hello", usage={"prompt_tokens": 5, "completion_tokens": 1}))
    history: list[bytes] = []
    llm = llm_over(pool, history, Sampling(temperature=0.1, max_tokens=9))
    chat = [user("hi")]
    first = await llm.chat(chat, temperature=0.9, extra={"top_k": 1})
    chat += [assistant(first.text), user("more")]
    await llm.chat(chat)
    assert llm.usage == Usage(10, 2, 0, 2)
    one, two = (read_call(line) for line in history)
    seeds = [derived_seed(7, 2, index) for index in range(2)]
    assert one.sampling == {"top_k": 1, "temperature": 0.9, "max_tokens": 9, "seed": seeds[0]}
    assert two.sampling == {"temperature": 0.1, "max_tokens": 9, "seed": seeds[1]}
    assert server.bodies[1]["seed"] == seeds[1]
    assert (one.role, one.model, one.endpoint, one.text) == ("solver", "m", server.url, "hello")
    assert (one.hop, one.attempt, one.error, one.finish_reason) == (2, 1, None, "stop")
    assert one.usage == Usage(5, 1, 0, 1)
    assert one.latency_s > 0 < one.started_at
    assert (one.prefix, two.prefix) == (None, (0, 1))
    assert two.messages == chat[1:]
    assert full_messages(history, 1) == chat


async def test_a_call_that_has_a_price_costs_something(server: Server) -> None:
    server.answers(200, completion("hello", usage={"prompt_tokens": 500, "completion_tokens": 100}))
    priced = ModelPool(ModelConfig(model="m", prompt_price=2.0, completion_price=8.0), [server.url])
    llm = llm_over(priced, [])
    await llm.chat([user("hi")])
    await llm.chat([user("hi")])
    await priced.close()
    assert llm.usage.cost == pytest.approx(2 * (500 * 2.0 + 100 * 8.0) / 1e6)
    assert (llm.usage.prompt_tokens, llm.usage.completion_tokens, llm.usage.calls) == (1000, 200, 2)


async def test_a_failed_call_is_recorded(pool: ModelPool, server: Server) -> None:
    server.answers(400, {"error": {"message": "no"}})
    history: list[bytes] = []
    llm = llm_over(pool, history)
    with pytest.raises(ModelRefused):
        await llm.chat([user("hi")])
    call = read_call(history[0])
    assert call.error is not None
    assert (call.error.type, call.endpoint, call.messages) == ("ModelRefused", server.url, [user("hi")])
    assert llm.usage == Usage(calls=1)


async def test_concurrent_calls_are_recorded_in_the_order_of_their_start(fakes: Fakes) -> None:
    pool = pool_of("a", cap=9)
    history: list[bytes] = []
    llm = llm_over(pool, history)
    tasks = [asyncio.create_task(llm.chat([system("s"), user(str(i))])) for i in range(4)]
    await settle()
    assert [read_call(line).error.type for line in history] == ["Unfinished"] * 4  # type: ignore[union-attr]
    tasks[1].cancel()
    for index in (3, 0, 2):
        fakes["a"].finish(index)
        await settle()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [full_messages(history, i)[1].content for i in range(4)] == ["0", "1", "2", "3"]
    errors = [read_call(line).error for line in history]
    assert [error and error.type for error in errors] == [None, "CancelledError", None, None]
    seeds = [read_call(line).sampling["seed"] for line in history]
    assert seeds == [derived_seed(7, 2, i) for i in range(4)]
    await pool.close()


async def test_each_role_builds_on_its_own_calls(pool: ModelPool) -> None:
    history: list[bytes] = []
    solver, critic = [system("solve"), user("1+1")], [system("judge"), user("1+1")]
    for _ in range(3):
        # A new LLM for every handler call, as the worker does it.
        reply = await llm_over(pool, history, role="solver").chat(solver)
        solver += [assistant(reply.text), user("again")]
        await llm_over(pool, history, role="critic").chat(critic)
        critic += [user("and now?")]
    calls = [read_call(line) for line in history]
    assert [call.prefix for call in calls] == [None, None, (0, 2), (1, 2), (2, 4), (3, 3)]
    assert full_messages(history, 4) == solver[:-2]
    assert full_messages(history, 5) == critic[:-1]


async def test_many_choices(pool: ModelPool, server: Server) -> None:
    server.answers(200, completion("a", "b"))
    history: list[bytes] = []
    reply = await llm_over(pool, history).chat([user("hi")], extra={"n": 2})
    assert (reply.text, reply.choices) == ("a", ["a", "b"])
    assert read_call(history[0]).choices == ["a", "b"]


async def test_a_given_seed_is_kept(pool: ModelPool, server: Server) -> None:
    llm = llm_over(pool, [], Sampling(seed=5))
    await llm.chat([user("hi")])
    await llm.chat([user("hi")], seed=6)
    assert [body["seed"] for body in server.bodies] == [5, 6]


async def test_aliases(pool: ModelPool) -> None:
    asked: list[str | None] = []

    def resolve(alias: str | None) -> ModelPool:
        asked.append(alias)
        return pool

    llm = LLM(resolve, "default", Sampling(), [], "solver", 0, 0, 0)
    await llm.chat([user("hi")])
    await llm.chat([user("hi")], model="judge")
    assert asked == ["default", "judge"]


async def test_mistakes_are_explained(pool: ModelPool) -> None:
    history: list[bytes] = []
    llm = llm_over(pool, history)
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        await llm.chat([user("hi")], temprature=1)
    with pytest.raises(ConfigError, match=r"chat\.top_p"):
        await llm.chat([user("hi")], top_p=2.0)
    with pytest.raises(ConfigError, match="stream"):
        await llm.chat([user("hi")], extra={"stream": True})
    with pytest.raises(HandlerError, match="passed a dict as a message"):
        await llm.chat([{"role": "user", "content": "hi"}])  # type: ignore[list-item]
    assert history == []


# --- structured output --------------------------------------------------------------------------------------


class Verdict(msgspec.Struct):
    score: int
    why: str = ""


async def test_a_reply_of_a_type_is_asked_for_by_its_schema(pool: ModelPool, server: Server) -> None:
    server.answers(200, completion('{"score": 4, "why": "short"}'))
    assert await llm_over(pool, []).parse([user("judge")], Verdict, temperature=0.5) == Verdict(4, "short")
    (body,) = server.bodies
    assert body["response_format"]["type"] == "json_schema"
    asked = body["response_format"]["json_schema"]
    assert asked["name"] == "Verdict"
    assert asked["schema"]["$defs"]["Verdict"]["required"] == ["score"]
    assert body["temperature"] == 0.5


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 4}',
        'Sure!\n```json\n{"score": 4}\n```\nAnything else?',
        '<think>{"score": 9}</think>Well, {"score": 4} it is.',
        'The set {1, 2} aside: {"score": 4}',
        ' [1, {"a": 2}] and {"score": 4, "more": {"x": []}}',
    ],
)
async def test_json_is_found_in_what_surrounds_it(pool: ModelPool, server: Server, text: str) -> None:
    server.answers(200, completion(text))
    assert (await llm_over(pool, []).parse([user("judge")], Verdict)).score == 4


async def test_a_server_without_guided_decoding_is_asked_in_words(pool: ModelPool, server: Server) -> None:
    async def plain(request: web.Request) -> web.StreamResponse:
        if "response_format" in await request.json():
            return web.json_response({"error": {"message": "unknown field response_format"}}, status=400)
        return web.json_response(completion('{"score": 4}'))

    server.handler = plain
    llm = llm_over(pool, [])
    assert await llm.parse([system("s"), user("judge")], Verdict) == Verdict(4)
    assert await llm.parse([user("judge")], Verdict) == Verdict(4)
    assert ["response_format" in body for body in server.bodies] == [True, False, False]
    last = server.bodies[-1]["messages"]
    assert len(last) == 1
    assert last[0]["content"].startswith("judge\n\n")
    assert '"score"' in last[0]["content"]


async def test_one_repair_and_then_an_error(pool: ModelPool, server: Server) -> None:
    answers = iter(['{"score": "high"}', '{"score": 3}', "no", '{"why": "because"}'])

    async def next_one(_: web.Request) -> web.StreamResponse:
        return web.json_response(completion(next(answers)))

    server.handler = next_one
    history: list[bytes] = []
    llm = llm_over(pool, history)
    assert await llm.parse([user("judge")], Verdict) == Verdict(3)
    told = server.bodies[1]["messages"]
    assert [message["role"] for message in told] == ["user", "assistant", "user"]
    assert "Expected `int`, got `str`" in told[2]["content"]
    with pytest.raises(StructureInvalid, match=r"as Verdict, also after it was told what is wrong: .*score"):
        await llm.parse([user("judge")], Verdict)
    assert len(history) == 4
    assert not is_transient(StructureInvalid("x"))


async def test_a_refusal_that_has_other_reasons_stays_one(pool: ModelPool, server: Server) -> None:
    server.answers(400, {"error": {"message": "temperature is too high"}})
    with pytest.raises(ModelRefused, match="too high"):
        await llm_over(pool, []).parse([user("judge")], Verdict)
    assert pool.guided, "it is not known to be unable"
    with pytest.raises(HandlerError, match="no JSON schema"):
        await llm_over(pool, []).parse([user("judge")], type(pool))


async def test_tools_choices_and_logprobs_are_words_of_a_call(pool: ModelPool, server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    history: list[bytes] = []
    llm = llm_over(pool, history)
    await llm.chat([user("hi")], tools=tools, tool_choice="auto", n=2, logprobs=3, extra={"top_k": 1})
    (body,) = server.bodies
    assert (body["tools"], body["tool_choice"], body["n"]) == (tools, "auto", 2)
    assert (body["logprobs"], body["top_logprobs"], body["top_k"]) == (True, 3, 1)
    assert read_call(history[0]).sampling["n"] == 2


@given(st.integers(), st.integers(0, 1000), st.integers(0, 1000))
def test_derived_seeds_are_31_bits_and_stable(seed: int, hop: int, call: int) -> None:
    derived = derived_seed(seed, hop, call)
    assert 0 <= derived < 2**31
    assert derived == derived_seed(seed, hop, call) != derived_seed(seed, hop, call + 1)


# --- the record: any conversation comes back as it was -----------------------------------------------------

# Few texts, so that conversations share beginnings; numbers that are equal but not the same.
contents = st.one_of(
    st.sampled_from(["a", "b", "é\n"]),
    st.none(),
    st.lists(st.fixed_dictionaries({"n": st.sampled_from([1, 1.0, True, None, "x"])}), max_size=2),
)
chats = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), contents), max_size=6)
rows = st.lists(st.tuples(st.sampled_from(["solver", "critic"]), chats, st.booleans()), max_size=12)


def encoded(messages: Sequence[Message]) -> bytes:
    return msgspec.json.encode(list(messages))


@given(rows)
def test_messages_come_back_as_they_were(calls: list[tuple[str, list[Message], bool]]) -> None:
    history: list[bytes] = []
    recorders: dict[str, Recorder] = {}
    for role, chat, same_handler in calls:
        if not same_handler or role not in recorders:
            recorders = {role: Recorder(history, role)}
        index, call = recorders[role].open(Call(role=role, model="m", messages=chat))
        recorders[role].close(index, call)
    for index, (role, chat, _) in enumerate(calls):
        assert encoded(full_messages(history, index)) == encoded(chat)
        call = read_call(history[index])
        assert call.error is None
        if call.prefix is not None:
            before, kept = call.prefix
            assert before == max(i for i in range(index) if calls[i][0] == role)
            assert kept >= 1
            assert len(call.messages) == len(chat) - kept


def test_a_growing_conversation_is_stored_once() -> None:
    history: list[bytes] = []
    chat: list[Message] = []
    for turn in range(100):
        chat = [*chat, user(f"{turn:03d}" + "x" * 1000)]
        Recorder(history, "solver").open(Call(role="solver", model="m", messages=chat))
    assert sum(map(len, history)) < 2 * 100 * 1000
    assert full_messages(history, 99) == chat


@pytest.mark.parametrize(
    "history",
    [
        [b"not json"],
        [b'{"role":"a","model":"m","prefix":[0,1]}'],
        [b'{"role":"a","model":"m","messages":[{"role":"nobody","content":"x"}]}'],
        [],
    ],
)
def test_a_broken_history_is_named(history: list[bytes]) -> None:
    with pytest.raises(RowError, match="line 0"):
        full_messages(history, 0)


def test_a_line_that_is_no_call_is_named() -> None:
    with pytest.raises(RowError, match="cannot be read"):
        read_call(b"{}")


def test_the_public_names() -> None:
    assert set(matrix_bus.llm.__all__) == {
        *("LLM", "Call", "ChatRequest", "Endpoint", "Message", "Model", "ModelPool", "Reply", "Usage"),
        *("Responder", "ScriptedModels"),
        *("assistant", "system", "tool", "user"),
        *("SEGMENT_MARK", "read_segment", "segment_body", "with_segment"),
        *("full_messages", "read_call"),
    }
    assert int(Endpoint("http://a", FakeTransport("http://a"), 2).limit) == 2


# --- histories that are closed into segments ------------------------------------------------------------------------

asked = st.lists(st.sampled_from(["hi", "who", "why", "é" * 30]).map(user), min_size=1, max_size=4)


@given(turns=st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), asked, st.booleans()), max_size=12))
def test_a_history_reads_the_same_wherever_it_was_closed(
    turns: list[tuple[str, bool, list[Message], bool]],
) -> None:
    """Each turn: who speaks, whether it goes on from what the role said last, what it says, and a segment after it."""
    history: list[bytes] = []
    stored: dict[str, bytes] = {}
    said: dict[str, list[Message]] = {}
    expected: list[list[Message]] = []
    for role, goes_on, new, close in turns:
        messages = [*(said.get(role, []) if goes_on else []), *new]
        said[role] = messages
        expected.append(messages)
        recorder = Recorder(history, role)
        place, call = recorder.open(Call(role=role, model="m", messages=messages))
        recorder.close(place, msgspec.structs.replace(call, text="done"))
        assert place == len(expected) - 1
        if close:
            body = segment_body(history)
            ref = Ref.of(body)
            stored[ref.sha256] = body
            history = with_segment(history, ref)
    whole: list[bytes] = []
    for line in history:
        segment = read_segment(line)
        calls = [line] if segment is None else msgspec.json.decode(stored[segment.calls.sha256], type=list[msgspec.Raw])
        assert segment is None or segment.count == len(calls)
        whole += map(bytes, calls)
    assert [full_messages(whole, index) for index in range(len(expected))] == expected


def test_a_conversation_goes_on_from_a_segment_without_repeating_it() -> None:
    history: list[bytes] = []
    messages: list[Message] = []
    for turn in range(6):
        messages.append(user(f"{turn}" * 1000))
        recorder = Recorder(history, "a")
        place, call = recorder.open(Call(role="a", model="m", messages=messages))
        recorder.close(place, call)
        assert len(history[-1]) < 1300, "one message a turn, wherever the earlier ones are"
        if turn in (1, 3):
            history = with_segment(history, Ref.of(segment_body(history)))
    assert len(history) == 4
