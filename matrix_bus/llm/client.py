"""What a handler sees of models: `await llm.chat([...])`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Protocol, TypeVar

import msgspec

from ..config import Sampling, parse
from ..errors import (
    ConfigError,
    ContextLengthExceeded,
    HandlerError,
    ModelAccessDenied,
    ModelNotFound,
    ModelRefused,
    StructureInvalid,
)
from ..orchestrator import Usage
from ..telemetry import logger
from . import structure
from .history import Call, Failure, Recorder
from .messages import ChatRequest, Message, OnText, Reply, assistant, sent, user
from .pool import Flight

T = TypeVar("T")

log = logger("llm")


class Model(Protocol):
    """What answers the calls of one alias: a `ModelPool`, or a script."""

    @property
    def model(self) -> str:
        """The name that the servers know the model by."""
        ...

    @property
    def guided(self) -> bool:
        """Whether its servers take a JSON schema, as far as is known."""
        ...

    @guided.setter
    def guided(self, known: bool) -> None: ...

    async def complete(
        self, request: ChatRequest, flight: Flight, on_text: OnText | None = None
    ) -> tuple[Reply, float]:
        """The reply, and the seconds spent in line for it. Raises `ModelError`."""
        ...


class Cache(Protocol):
    """Answers by what was asked."""

    async def find(self, request: ChatRequest) -> Reply | None:
        """The answer to exactly this request, if it is kept."""
        ...

    async def keep(self, request: ChatRequest, reply: Reply) -> None:
        """Keeps an answer."""
        ...


class LLM:
    """The models, for one call of one role's handler; every model call goes into the row's history."""

    def __init__(
        self,
        resolve: Callable[[str | None], Model],
        default_alias: str,
        sampling: Sampling,
        history: list[bytes],
        role: str,
        hop: int,
        attempt: int,
        seed: int,
        session: str = "",
        cache: Cache | None = None,
    ) -> None:
        """`resolve` gives the pool for an alias; `sampling` is what holds where a call says nothing."""
        self._resolve = resolve
        self._default_alias = default_alias
        self._sampling = sampling
        self._recorder = Recorder(history, role)
        self._role = role
        self._hop = hop
        self._attempt = attempt
        self._seed = seed
        self._session = session
        self._cache = cache
        self._calls = 0
        self._usage = Usage()

    @property
    def usage(self) -> Usage:
        """What this handler call has used so far; a failed call counts as a call."""
        return self._usage

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        n: int | None = None,
        logprobs: int | None = None,
        on_text: OnText | None = None,
        **sampling: Any,
    ) -> Reply:
        """One model call. `model` is an alias of `llm.models`; other keywords are fields of `Sampling`.

        `n` choices come in `Reply.choices`; `logprobs` is how many alternatives are wanted of each token. With
        `on_text` the reply is streamed: pieces of its text are given to the function as they come. If an endpoint dies
        on the way, another one begins anew, and so do the pieces.

        Calls may run concurrently: their order in the history, and their seeds, are those of their start, so
        that a retry of the handler asks the same. Raises `ConfigError` for an unknown alias or parameter,
        `HandlerError` for messages that are none, and the `ModelError` that fits if the call fails.
        """
        given: dict[str, Any] = {"tools": tools, "tool_choice": tool_choice, "n": n}
        if logprobs is not None:
            given |= {"logprobs": True, "top_logprobs": logprobs}
        chosen = self._choose(sampling, {name: value for name, value in given.items() if value is not None})
        pool = self._resolve(model or self._default_alias)
        for message in messages:
            if not isinstance(message, Message):
                raise HandlerError(
                    f"role {self._role!r} passed a {type(message).__name__} as a message: {message!r:.200}; "
                    "chat takes a list such as [system('…'), user('…')]"
                )
        request = ChatRequest(pool.model, list(messages), chosen, self._session)
        index, call = self._recorder.open(
            Call(
                role=self._role,
                model=pool.model,
                sampling=sent(chosen),
                messages=list(messages),
                started_at=time.time(),
                hop=self._hop,
                attempt=self._attempt,
            )
        )
        self._calls += 1
        flight = Flight()
        asked = time.perf_counter()
        try:
            reply, wait_s = await self._complete(pool, request, flight, on_text)
        except (Exception, asyncio.CancelledError) as error:
            self._usage += Usage(calls=1)
            failed = msgspec.structs.replace(
                call,
                endpoint=flight.endpoint,
                wait_s=flight.wait_s,
                latency_s=time.perf_counter() - asked - flight.wait_s,
                error=Failure(type(error).__name__, str(error)),
            )
            self._recorder.close(index, failed)
            raise
        self._usage += reply.usage
        done = msgspec.structs.replace(
            call,
            endpoint=reply.endpoint,
            text=reply.text,
            finish_reason=reply.finish_reason,
            reasoning=reply.reasoning,
            tool_calls=reply.tool_calls,
            choices=reply.choices if len(reply.choices) > 1 else [],
            usage=reply.usage,
            wait_s=wait_s,
            latency_s=reply.latency_s,
            first_s=reply.first_s,
            cached=reply.cached,
        )
        self._recorder.close(index, done)
        return reply

    async def _complete(
        self, pool: Model, request: ChatRequest, flight: Flight, on_text: OnText | None
    ) -> tuple[Reply, float]:
        if self._cache is None:
            return await pool.complete(request, flight, on_text)
        if (kept := await self._cache.find(request)) is not None:
            if on_text is not None:
                on_text(kept.text)
            return msgspec.structs.replace(kept, cached=True, usage=Usage(), latency_s=0.0, first_s=0.0), 0.0
        reply, wait_s = await pool.complete(request, flight, on_text)
        await self._cache.keep(request, reply)
        return reply, wait_s

    async def parse(
        self, messages: Sequence[Message], kind: type[T], *, model: str | None = None, **sampling: Any
    ) -> T:
        """One model call whose reply is JSON of this type: a msgspec struct, a dataclass, a TypedDict, a list of them.

        The server is asked to decode by the type's JSON schema; one that cannot is asked in words, and its reply may
        be fenced, or have words around it. A reply that does not fit is sent back once with what is wrong. Raises
        `StructureInvalid` if the second does not fit either, else as `chat`.
        """
        schema = structure.schema_of(kind)
        asked = list(messages)
        pool = self._resolve(model or self._default_alias)
        reply = await self._ask(pool, asked, kind, schema, model, sampling)
        try:
            return structure.read(reply.text, kind)
        except ValueError as error:
            what = f"That is not what was asked for: {error}. {structure.instruction(schema)}"
        asked += [assistant(reply.text), user(what)]
        reply = await self._ask(pool, asked, kind, schema, model, sampling)
        try:
            return structure.read(reply.text, kind)
        except ValueError as error:
            raise StructureInvalid(
                f"model {pool.model!r} does not answer as {getattr(kind, '__name__', kind)}, also after it was told "
                f"what is wrong: {error}; it said {reply.text[:200]!r}"
            ) from None

    async def _ask(
        self,
        pool: Model,
        messages: list[Message],
        kind: type[Any],
        schema: dict[str, Any],
        model: str | None,
        sampling: dict[str, Any],
    ) -> Reply:
        if pool.guided:
            extra = {"response_format": structure.response_format(kind, schema), **(sampling.get("extra") or {})}
            try:
                return await self.chat(messages, model=model, **{**sampling, "extra": extra})
            except (ModelNotFound, ModelAccessDenied, ContextLengthExceeded):
                raise
            except ModelRefused as error:
                refusal = error  # servers refuse what they do not know in many words: the same call without it tells
            reply = await self.chat(_with(messages, structure.instruction(schema)), model=model, **sampling)
            pool.guided = False
            log.info("llm.no_guided_decoding", model=pool.model, said=str(refusal))
            return reply
        return await self.chat(_with(messages, structure.instruction(schema)), model=model, **sampling)

    def _choose(self, given: dict[str, Any], body: dict[str, Any]) -> Sampling:
        chosen = self._sampling
        if given:
            chosen = parse(given, Sampling, at="chat").over(chosen)
        if chosen.extra and chosen.extra.get("stream"):
            raise ConfigError("chat streams if it has on_text: take stream out of the sampling parameters (extra)")
        if body:
            chosen = msgspec.structs.replace(chosen, extra={**(chosen.extra or {}), **body})
        if chosen.seed is None:
            seed = derived_seed(self._seed, self._hop, self._calls)
            chosen = msgspec.structs.replace(chosen, seed=seed)
        return chosen


def _with(messages: list[Message], text: str) -> list[Message]:
    """The messages with a text at the end, in the last one if that is a user's: some chat templates want turns."""
    last = messages[-1] if messages else None
    if last is not None and last.role == "user" and isinstance(last.content, str):
        return [*messages[:-1], user(f"{last.content}\n\n{text}")]
    return [*messages, user(text)]


def derived_seed(row_seed: int, hop: int, call: int) -> int:
    """The seed of a hop's `call`-th model call: 31 bits, which every server takes, the same on a retry."""
    digest = blake2b(f"{row_seed}:{hop}:{call}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF
