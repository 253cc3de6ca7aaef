"""The endpoints of one model: who goes next, where to, and what happens when an endpoint is gone."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Protocol

import msgspec

from ..config import ModelConfig, check_url
from ..errors import (
    EndpointGone,
    ModelAccessDenied,
    ModelError,
    ModelNotFound,
    ModelRefused,
    ModelTimeout,
    RateLimited,
)
from ..telemetry import logger
from .endpoint import Endpoint
from .messages import ChatRequest, OnText, Reply, Transport

_ERRORS_MOST = 3
"""Server errors that one call may cause: a request that breaks servers must not go round all of them."""
_SAY_WAITING_EVERY_S = 30.0
_BOUND = 1.25
"""How much more than its share a replica may hold because of rows that stick to it."""

log = logger("llm")


class Flight:
    """How far a call has come; readable while it is under way and after it failed."""

    __slots__ = ("endpoint", "wait_s")

    def __init__(self) -> None:
        self.endpoint = ""
        """URL of the endpoint that has the call, or had it last."""
        self.wait_s = 0.0
        """Time in line, summed over all endpoints that were tried."""


class Meter(Protocol):
    """Keeps calls to a rate that is shared with other processes."""

    async def start(self, guess: float) -> float:
        """Returns when a call may start, with the tokens reserved for it; `guess` is how many it may take."""
        ...

    def ended(self, reserved: float, used: float) -> None:
        """What the call took in the end."""
        ...


def _guess(request: ChatRequest) -> float:
    """Tokens that a call may take, before any has told: four characters each, and as many as it asks for."""
    chars = sum(len(str(message.content)) for message in request.messages)
    return chars / 4 + (request.sampling.max_tokens or 256)


_Tried = frozenset[Endpoint]


class _Caller:
    """Somebody in line."""

    __slots__ = ("seat", "session")

    def __init__(self, session: str) -> None:
        self.seat: asyncio.Future[Endpoint | None] = asyncio.get_running_loop().create_future()
        self.session = session


class ModelPool:
    """Calls one model at any of its endpoints, `config.concurrency` calls at a time each.

    Callers stand in line, first come, first served, and a call's timeout starts when it is sent. The pool
    belongs to one event loop. While it has no endpoints, callers wait for `set_urls` to bring one.
    """

    def __init__(
        self,
        config: ModelConfig,
        urls: Sequence[str] | Mapping[str, float],
        api_key: str | None = None,
        meter: Meter | None = None,
    ) -> None:
        """`urls` may have capacities beside them. Raises `ConfigError` for a URL that is none."""
        self.model = config.model
        """The name that the servers know the model by."""
        self.guided = True
        """Whether its servers take a JSON schema, as far as is known."""
        self._config = config
        self._meter = meter
        self._api_key = api_key.strip() if api_key else None
        self._transports = _factory(config, self._api_key)
        self._endpoints: list[Endpoint] = []
        # One line per set of endpoints tried in vain: nobody stands behind a caller who waits for an endpoint
        # that he could do without.
        self._lines: dict[_Tried, deque[_Caller]] = {frozenset(): deque()}
        self._said_waiting_at = -math.inf
        self._ticks = itertools.count(1)
        self._draining: set[Endpoint] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self.set_urls(urls)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The endpoints as they are now, for metrics and tests."""
        return tuple(self._endpoints)

    @property
    def waiting(self) -> int:
        """How many callers stand in line."""
        return sum(not caller.seat.done() for line in self._lines.values() for caller in line)

    def set_urls(
        self, urls: Sequence[str] | Mapping[str, float], others: Mapping[str, tuple[ModelConfig, str | None]] = {}
    ) -> None:
        """Replace the endpoints: those that stay keep their calls, those that go finish theirs.

        `others` are config and key of those that are called in another way. Raises `ConfigError` for a URL that is
        none.
        """
        if self._closed:
            return
        capacities = {url.rstrip("/"): urls[url] if isinstance(urls, Mapping) else 1.0 for url in urls}
        for url in capacities:
            check_url(url)
        kept = {endpoint.url: endpoint for endpoint in self._endpoints if endpoint.url in capacities}
        gone = [endpoint for endpoint in self._endpoints if endpoint.url not in kept]
        wanted = list(capacities)
        random.shuffle(wanted)
        self._endpoints = [
            kept.get(url)
            or Endpoint(
                url, (_factory(*others[url]) if url in others else self._transports)(url), self._config.concurrency
            )
            for url in wanted
        ]
        for endpoint in self._endpoints:
            endpoint.capacity = capacities[endpoint.url]
        for endpoint in gone:
            self._retire(endpoint)
        self._serve()

    def abandon(self, urls: Collection[str]) -> None:
        """These servers are dead: calls under way to them are not waited for, and go elsewhere."""
        for endpoint in (*self._endpoints, *self._draining):
            if endpoint.url in urls:
                self._look_again(endpoint, endpoint.gone)
                for task in list(endpoint.calls):
                    endpoint.calls[task] = True
                    task.cancel()

    async def complete(
        self, request: ChatRequest, flight: Flight | None = None, on_text: OnText | None = None
    ) -> tuple[Reply, float]:
        """The reply, and the seconds spent in line for it; `flight`, if given, is kept up to date on the way.

        A call whose endpoint is gone is tried at each of the others, and waits for one to come back for up to
        `patience_s`; one whose endpoint is busy goes elsewhere, or waits as long as it is asked to. Raises the last
        `EndpointGone` or `RateLimited`, or any other `ModelError` at once.
        """
        flight = flight or Flight()
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._config.patience_s
        tried: _Tried = frozenset()
        errors = 0
        while True:
            queued = time.perf_counter()
            reserved = 0.0
            try:
                if self._meter is not None:
                    reserved = await self._meter.start(_guess(request))
                endpoint = await self._seat(tried, request.session)
            finally:
                flight.wait_s += time.perf_counter() - queued
            if endpoint is None:
                raise EndpointGone(f"the calls of model {self.model!r} are closed in this worker; try another one")
            flight.endpoint = endpoint.url
            task = asyncio.current_task()
            assert task is not None
            endpoint.calls[task] = False
            try:
                reply = await self._send(endpoint, task, request, on_text)
                endpoint.went_well(reply.latency_s, reply.usage.completion_tokens, loop.time())
                if self._meter is not None:
                    self._meter.ended(reserved, reply.usage.prompt_tokens + reply.usage.completion_tokens)
                return self._priced(reply), flight.wait_s
            except RateLimited as error:
                self._look_again(endpoint, functools.partial(endpoint.push_back, error.retry_after_s))
                if self._closed or endpoint.down_until > give_up_at:
                    raise
            except ModelTimeout:
                endpoint.limit.push_back(endpoint.outstanding, loop.time())
                raise
            except EndpointGone as error:
                self._look_again(endpoint, endpoint.answered_with_error if error.answered else endpoint.gone)
                errors += error.answered
                tried |= {endpoint}
                all_tried = tried.issuperset(self._endpoints)
                if self._closed or errors >= _ERRORS_MOST:
                    raise
                if all_tried and (error.answered or loop.time() >= give_up_at):
                    raise
                if all_tried:
                    tried = frozenset()
                    self._say_waiting(error)
            finally:
                self._leave(endpoint)

    async def _send(
        self, endpoint: Endpoint, task: asyncio.Task[Any], request: ChatRequest, on_text: OnText | None
    ) -> Reply:
        try:
            return await endpoint.transport.complete(request, self._config.timeout_s, on_text)
        except asyncio.CancelledError:
            if endpoint.calls.get(task) and task.uncancel() == 0:
                raise EndpointGone(f"{endpoint.url} (model {self.model!r}) is not heard of any more") from None
            raise
        finally:
            endpoint.calls.pop(task, None)

    def _say_waiting(self, error: EndpointGone) -> None:
        now = time.monotonic()
        if now - self._said_waiting_at > _SAY_WAITING_EVERY_S:
            self._said_waiting_at = now
            log.warning("llm.no_endpoint_answers", model=self.model, waiting=self.waiting + 1, error=str(error))

    def _priced(self, reply: Reply) -> Reply:
        prompt, completion = self._config.prompt_price, self._config.completion_price
        if not (prompt or completion):
            return reply
        usage = reply.usage
        cost = (usage.prompt_tokens * prompt + usage.completion_tokens * completion) / 1e6
        return msgspec.structs.replace(reply, usage=msgspec.structs.replace(usage, cost=cost))

    async def check(self) -> None:
        """Asks the endpoints what they serve. Raises the last one's `ModelError` if none serves the model."""
        failure: ModelError | None = None
        for endpoint in self.endpoints:
            try:
                names = await endpoint.transport.models()
            except ModelAccessDenied:
                raise
            except ModelRefused:
                return  # it does not tell: the first call will
            except ModelError as error:
                failure = error
                continue
            if not names or self.model in names or self._config.transport == "azure":  # it lists no deployments
                return
            failure = ModelNotFound(f"{endpoint.url} has no model {self.model!r}: it has {', '.join(names)}")
        if failure is not None:
            raise failure

    async def close(self) -> None:
        """Send callers in line away with `EndpointGone` and close all connections; safe to repeat."""
        self._closed = True
        for endpoint in self._endpoints:
            self._retire(endpoint)
        left, self._endpoints, self._draining = self._draining, [], set()
        self._serve()
        await asyncio.gather(*(endpoint.transport.close() for endpoint in left), *self._closing)

    async def _seat(self, tried: _Tried, session: str) -> Endpoint | None:
        caller = _Caller(session if self._config.sticky else "")
        self._lines.setdefault(tried, deque()).append(caller)
        self._serve()
        try:
            return await caller.seat
        except asyncio.CancelledError:
            if caller.seat.done() and not caller.seat.cancelled() and (endpoint := caller.seat.result()):
                self._leave(endpoint)  # the seat was given in the same instant
            raise

    def _serve(self) -> None:
        """Give the free places to those at the head of the lines, first to those who waited before."""
        for tried in sorted(self._lines, key=len, reverse=True):
            line = self._lines[tried]
            while line:
                if line[0].seat.done():  # cancelled while in line
                    line.popleft()
                elif self._closed:
                    line.popleft().seat.set_result(None)
                elif endpoint := self._free(tried, line[0].session):
                    endpoint.outstanding += 1
                    endpoint.last_used = next(self._ticks)
                    line.popleft().seat.set_result(endpoint)
                else:
                    break
            if tried and not line:
                del self._lines[tried]

    def _free(self, tried: _Tried, session: str) -> Endpoint | None:
        now = asyncio.get_running_loop().time()
        # If the set changed and nothing untried is left, anything new is better than nothing.
        others = [endpoint for endpoint in self._endpoints if endpoint not in tried] or self._endpoints
        free = [endpoint for endpoint in others if endpoint.has_room(now)]
        if not free:
            return None
        if session and len(self._endpoints) > 1:
            # Rendezvous hashing (Thaler and Ravishankar, 1998) with bounded loads (Mirrokni and others, 2018): a row's
            # calls find the replica that has its prefix, unless that has a quarter more to do than its share.
            share = (sum(e.outstanding for e in self._endpoints) + 1) / sum(e.capacity for e in self._endpoints)
            near = [endpoint for endpoint in free if endpoint.outstanding < _BOUND * share * endpoint.capacity]
            if near:
                return max(near, key=lambda endpoint: _score(session, endpoint))
        return min(free, key=lambda endpoint: (endpoint.load, endpoint.last_used))

    def _leave(self, endpoint: Endpoint) -> None:
        endpoint.outstanding -= 1
        if endpoint in self._draining:
            self._retire(endpoint)
        self._serve()

    def _look_again(self, endpoint: Endpoint, note: Callable[[float], None]) -> None:
        """Notes what happened to an endpoint, and serves the lines when it may be called again."""
        loop = asyncio.get_running_loop()
        note(loop.time())
        if endpoint in self._endpoints and endpoint.down_until > loop.time():
            if endpoint.timer:
                endpoint.timer.cancel()
            endpoint.timer = loop.call_at(endpoint.down_until, self._serve)

    def _retire(self, endpoint: Endpoint) -> None:
        if endpoint.timer:
            endpoint.timer.cancel()
        if endpoint.outstanding:
            self._draining.add(endpoint)
            return
        self._draining.discard(endpoint)
        task = asyncio.get_running_loop().create_task(endpoint.transport.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _factory(config: ModelConfig, api_key: str | None) -> Callable[[str], Transport]:
    """What makes the transport for a URL; neither library is imported for the other's sake."""
    if config.transport != "direct":
        from .sdk import SdkTransport

        azure_version = config.api_version if config.transport == "azure" else ""
        return lambda url: SdkTransport(url, api_key, azure_version)
    from .direct import DirectTransport, Session

    session = Session()
    return lambda url: DirectTransport(url, api_key, session)


def _score(session: str, endpoint: Endpoint) -> float:
    """Weighted rendezvous: the replica with the highest score has the session, in proportion to capacities."""
    digest = blake2b(f"{session} {endpoint.url}".encode(), digest_size=8).digest()
    return -endpoint.capacity / math.log((int.from_bytes(digest, "big") + 1) / 2**64)
