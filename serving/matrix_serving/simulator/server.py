"""An OpenAI-compatible server that answers at the pace of a profile; it computes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import msgspec
from aiohttp import web

from matrix_bus.errors import UsageError, user_frames

from . import wire
from .answers import Lengths, Responder, content_text, fit, lengths, responder
from .engine import CHARS_PER_TOKEN, Engine, Sequence, block_keys, count_tokens
from .failures import Failure, Failures
from .metrics import Metrics
from .profiles import Profile

MAX_BODY_BYTES = 1 << 26
"""Of a request; images travel in it."""
SLOW_S = 30.0
RETRY_AFTER_S = 1.0

_FINGERPRINT = "simulated"
"""In every answer, so that nobody takes it for one of a model."""


class _Choice(Sequence):
    """One of the `n` answers of a call."""

    def __init__(self, call: _Call, index: int, text: str, finish_reason: str, prompt: list[str], cache: bool) -> None:
        keys = block_keys([*prompt, text]) if cache else []
        super().__init__(call.prompt_tokens, count_tokens(text) or 1, keys)
        self.call = call
        self.index = index
        self.text = text
        self.finish_reason = finish_reason
        self.told = 0
        """Characters that a stream has sent."""

    def more(self) -> str:
        """What was said since the last time."""
        end = len(self.text) if self.finished else self.generated * CHARS_PER_TOKEN
        piece = self.text[self.told : end]
        self.told = end
        return piece


class _Call:
    """One request while it is answered."""

    def __init__(self, number: int, request: wire.ChatRequest, prompt_tokens: int) -> None:
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.began_s = time.monotonic()
        self.head = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": request.model}
        self.head["system_fingerprint"] = _FINGERPRINT
        self.choices: list[_Choice] = []
        self.left = 0
        """Choices that are not finished."""
        self.spoken = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.progress: asyncio.Queue[_Choice] | None = asyncio.Queue() if request.stream else None

    def usage(self) -> dict[str, Any]:
        """The account so far."""
        generated = sum(choice.generated for choice in self.choices)
        return wire.usage(self.prompt_tokens, self.choices[0].cached_tokens, generated)


class Simulator:
    """The engine at the pace of the clock, and the calls that wait for it."""

    def __init__(
        self,
        profile: Profile,
        model: str,
        respond: Responder,
        failures: Failures,
        draw_length: Lengths | None = None,
        slow_s: float = SLOW_S,
        retry_after_s: float = RETRY_AFTER_S,
    ) -> None:
        self._profile = profile
        self._model = model
        self._respond = respond
        self._failures = failures
        self._draw_length = draw_length
        self._slow_s = slow_s
        self._retry_after_s = retry_after_s
        self._engine = Engine(profile)
        self._metrics = Metrics(self._engine, model)
        self._arrived = asyncio.Event()
        self._numbers = itertools.count(1)
        self._began = int(time.time())

    async def drive(self) -> NoReturn:
        """Run the engine's steps, for ever. A step that ends late does not move those after it."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            step_s = self._engine.begin()
            if step_s is None:
                self._arrived.clear()
                await self._arrived.wait()
                due = loop.time()
                continue
            due += step_s
            await asyncio.sleep(max(0.0, due - loop.time()))
            for sequence in self._engine.end():
                assert isinstance(sequence, _Choice)
                self._spoke(sequence)

    async def handle(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answer one HTTP request."""
        try:
            match http.method, http.path:
                case "POST", "/v1/chat/completions":
                    return await self._chat(http)
                case "GET", "/v1/models":
                    return _json(self._models())
                case "GET", "/health":
                    return web.Response()
                case "GET", "/metrics":
                    return web.Response(body=self._metrics.render(), content_type="text/plain", charset="utf-8")
            raise wire.Refusal(404, f"there is no {http.method} {http.path}", "NotFoundError")
        except wire.Refusal as refusal:
            return _json(refusal.body, refusal.status, refusal.headers)

    def _models(self) -> bytes:
        entry = {"id": self._model, "object": "model", "created": self._began, "owned_by": "matrix-bus-simulator"}
        entry["max_model_len"] = self._profile.max_model_len
        return msgspec.json.encode({"object": "list", "data": [entry]})

    async def _chat(self, http: web.BaseRequest) -> web.StreamResponse:
        body = await http.read()
        request = wire.decode(body)
        if request.model != self._model:
            raise wire.Refusal(
                404, f"The model `{request.model}` does not exist.", "NotFoundError", "model_not_found", "model"
            )
        failure = self._failures.draw()
        await self._fail_before(failure)
        call = await self._begin(request, body)
        try:
            if call.progress is not None:
                return await self._stream(http, call, call.progress, failure)
            await call.done
            return _json(_completion(call, failure))
        finally:
            for choice in call.choices:
                if not choice.finished:  # the client has gone
                    self._engine.cancel(choice)
                    self._metrics.finished["abort"] += 1

    async def _fail_before(self, failure: Failure | None) -> None:
        if failure is Failure.RATE_LIMITED:
            refusal = wire.Refusal(429, "simulated: too many requests", "rate_limit_error", "rate_limit_exceeded")
            refusal.headers["Retry-After"] = f"{self._retry_after_s:g}"
            raise refusal
        if failure is Failure.SERVER_ERROR:
            raise wire.Refusal(500, "simulated: internal error", "InternalServerError")
        if failure is Failure.CRASH:
            os._exit(1)
        if failure is Failure.HANG:
            await asyncio.Event().wait()  # cancelled when the client goes away
        if failure is Failure.SLOW:
            await asyncio.sleep(self._slow_s)

    async def _begin(self, request: wire.ChatRequest, body: bytes) -> _Call:
        prompt = [content_text(message.get("content")) for message in request.messages]
        prompt_tokens = sum(map(count_tokens, prompt)) or 1
        most = wire.fits(request, prompt_tokens, self._profile.max_model_len)
        call = _Call(next(self._numbers), request, prompt_tokens)
        for index in range(request.n or 1):
            text, finish_reason = _cut(await self._say(body), self._draw_length, request.stops, most)
            call.choices.append(_Choice(call, index, text, finish_reason, prompt, self._profile.prefix_caching))
        call.left = len(call.choices)
        for choice in call.choices:
            self._engine.submit(choice)
        self._arrived.set()
        return call

    async def _say(self, body: bytes) -> str:
        try:
            said = self._respond(msgspec.json.decode(body))
            text = await said if inspect.isawaitable(said) else said
        except LookupError as error:
            raise wire.Refusal(500, str(error), "InternalServerError") from None
        except Exception as error:
            print(f"error: the responder failed: {error!r}\n{user_frames(error)}", file=sys.stderr, flush=True)
            raise wire.Refusal(500, f"the responder failed: {error!r}", "InternalServerError") from None
        if not isinstance(text, str):
            raise wire.Refusal(500, f"the responder said {text!r}, which is no text", "InternalServerError")
        return text

    def _spoke(self, choice: _Choice) -> None:
        call = choice.call
        if not call.spoken:
            call.spoken = True
            self._metrics.first_token_s.observe(time.monotonic() - call.began_s)
        if choice.finished:
            call.left -= 1
            self._metrics.finished[choice.finish_reason] += 1
            if not call.left:
                self._metrics.request_s.observe(time.monotonic() - call.began_s)
                if not call.done.done():  # cancelled with its client
                    call.done.set_result(None)
        if call.progress is not None:
            call.progress.put_nowait(choice)

    async def _stream(
        self, http: web.BaseRequest, call: _Call, progress: asyncio.Queue[_Choice], failure: Failure | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        with contextlib.suppress(ConnectionResetError):  # the client has gone
            await response.prepare(http)
            await self._tell(response, call, progress, failure)
        return response

    async def _tell(
        self, response: web.StreamResponse, call: _Call, progress: asyncio.Queue[_Choice], failure: Failure | None
    ) -> None:
        head = {**call.head, "object": "chat.completion.chunk"}

        def chunk(choice: _Choice, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
            return {**head, "choices": [{"index": choice.index, "delta": delta, "finish_reason": finish_reason}]}

        begun: set[int] = set()
        while len(begun) < len(call.choices) or call.left or not progress.empty():
            choice = await progress.get()
            delta = {"content": choice.more()}
            if choice.index not in begun:
                begun.add(choice.index)
                delta["role"] = "assistant"
            data = wire.event(chunk(choice, delta, None))
            if failure is Failure.MALFORMED:
                await response.write(data[: len(data) // 2] + b"\n\n")
                return
            if choice.finished:
                data += wire.event(chunk(choice, {}, choice.finish_reason))
            if failure is not Failure.EMPTY:
                await response.write(data)
        if call.request.stream_options and call.request.stream_options.include_usage:
            await response.write(wire.event({**head, "choices": [], "usage": call.usage()}))
        await response.write(wire.DONE)


def run(
    profile: Profile,
    model: str,
    *,
    ready: Callable[[str], None],
    port: int = 0,
    answers: str = "echo",
    output_tokens: str = "",
    fail: str = "",
    slow_s: float = SLOW_S,
    retry_after_s: float = RETRY_AFTER_S,
    seed: int = 0,
) -> None:
    """Serve `model` at the pace of `profile` on loopback until SIGINT or SIGTERM; call from the main thread.

    `ready` gets the base URL, with `/v1`, once it answers. `port` 0 is a free one; `answers` is a responder
    (`answers.responder`), `output_tokens` a distribution of lengths (`answers.lengths`) instead of the profile's,
    `fail` the rates of failures (`Failures.parse`); `slow_s` is how long a slow call pauses, `retry_after_s` what
    a 429 asks for; `seed` makes lengths and failures repeatable. The signal cuts off the calls under way. Raises
    `UsageError` for a setting that does not work and for a port that is taken.
    """
    import uvloop

    parts = responder(answers), Failures.parse(fail, seed), lengths(output_tokens or profile.output_tokens, seed)

    async def serve() -> None:
        stop = asyncio.Event()
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, stop.set)
        async with serving(Simulator(profile, model, *parts, slow_s, retry_after_s), port) as url:
            ready(url)
            await stop.wait()

    uvloop.run(serve())


@contextlib.asynccontextmanager
async def serving(simulator: Simulator, port: int = 0) -> AsyncIterator[str]:
    """A simulator on loopback, at the URL that this gives, for the time of the block."""
    loop = asyncio.get_running_loop()

    def with_room(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=MAX_BODY_BYTES)

    server = web.Server(simulator.handle, request_factory=with_room, handler_cancellation=True, access_log=None)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)  # 0 would mean for ever
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise UsageError(f"cannot listen on port {port} of loopback: {error}; name another one, or 0") from None
    await runner.setup()
    try:
        await web.SockSite(runner, listening, backlog=4096).start()
        async with asyncio.TaskGroup() as tasks:
            driving = tasks.create_task(simulator.drive())
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            driving.cancel()
    finally:
        await runner.cleanup()


def _cut(text: str, draw_length: Lengths | None, stops: list[str], most: int) -> tuple[str, str]:
    """The text as long as it may be, and why it ends there."""
    if draw_length is not None:
        text = fit(text, min(draw_length(), most + 1) * CHARS_PER_TOKEN)
    ends = [end for stop in stops if stop and (end := text.find(stop)) >= 0]
    text = text[: min(ends)] if ends else text
    if count_tokens(text) > most:
        return text[: most * CHARS_PER_TOKEN], "length"
    return text, "stop"


def _completion(call: _Call, failure: Failure | None) -> bytes:
    choices = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": None,
            "finish_reason": choice.finish_reason,
        }
        for choice in call.choices
    ]
    body = msgspec.json.encode(
        {
            **call.head,
            "object": "chat.completion",
            "choices": [] if failure is Failure.EMPTY else choices,
            "usage": call.usage(),
        }
    )
    return body[: len(body) // 2] if failure is Failure.MALFORMED else body


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")
