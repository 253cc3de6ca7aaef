"""What a handler sees of models: `await llm.chat([...])`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Protocol

import msgspec

from ..config import Sampling, parse
from ..errors import ConfigError, HandlerError
from ..orchestrator import Usage
from .history import Call, Failure, Recorder
from .messages import ChatRequest, Message, Reply, sent
from .pool import Flight


class Model(Protocol):
    """What answers the calls of one alias: a `ModelPool`, or a script."""

    @property
    def model(self) -> str:
        """The name that the servers know the model by."""
        ...

    async def complete(self, request: ChatRequest, flight: Flight) -> tuple[Reply, float]:
        """The reply, and the seconds spent in line for it. Raises `ModelError`."""
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
        self._calls = 0
        self._usage = Usage()

    @property
    def usage(self) -> Usage:
        """What this handler call has used so far; a failed call counts as a call."""
        return self._usage

    async def chat(self, messages: Sequence[Message], *, model: str | None = None, **sampling: Any) -> Reply:
        """One model call. `model` is an alias of `llm.models`; keywords are fields of `Sampling`.

        Calls may run concurrently: their order in the history, and their seeds, are those of their start, so
        that a retry of the handler asks the same. Raises `ConfigError` for an unknown alias or parameter,
        `HandlerError` for messages that are none, and the `ModelError` that fits if the call fails.
        """
        chosen = self._choose(sampling)
        pool = self._resolve(model or self._default_alias)
        for message in messages:
            if not isinstance(message, Message):
                raise HandlerError(
                    f"role {self._role!r} passed a {type(message).__name__} as a message: {message!r:.200}; "
                    "chat takes a list such as [system('…'), user('…')]"
                )
        request = ChatRequest(pool.model, list(messages), chosen)
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
            reply, wait_s = await pool.complete(request, flight)
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
        )
        self._recorder.close(index, done)
        return reply

    def _choose(self, given: dict[str, Any]) -> Sampling:
        chosen = self._sampling
        if given:
            chosen = parse(given, Sampling, at="chat").over(chosen)
        if chosen.extra and chosen.extra.get("stream"):
            raise ConfigError("chat does not stream: take stream out of the sampling parameters (extra)")
        if chosen.seed is None:
            seed = derived_seed(self._seed, self._hop, self._calls)
            chosen = msgspec.structs.replace(chosen, seed=seed)
        return chosen


def derived_seed(row_seed: int, hop: int, call: int) -> int:
    """The seed of a hop's `call`-th model call: 31 bits, which every server takes, the same on a retry."""
    digest = blake2b(f"{row_seed}:{hop}:{call}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF
