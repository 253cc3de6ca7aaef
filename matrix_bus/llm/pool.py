"""The endpoints of one model: who goes next, where to, and what happens when an endpoint is gone."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from ..config import ModelConfig
from ..errors import ConfigError, EndpointGone, ModelAccessDenied, ModelError, ModelNotFound, ModelRefused
from .messages import ChatRequest, Reply, Transport

_DOWN_FIRST_S = 2.0
_DOWN_LONGEST_S = 30.0


class Endpoint:
    """One replica: at most `cap` calls are under way to it."""

    def __init__(self, url: str, transport: Transport, cap: int) -> None:
        self.url = url
        self.transport = transport
        self.cap = cap
        self.outstanding = 0
        self.down_until = 0.0
        """On the event loop's clock; until then it gets calls only if no other endpoint is up."""
        self.failures = 0
        """How often in a row it was marked as down."""
        self.last_used = 0
        """Breaks ties, so that many workers with little to do do not all call the same replica."""
        self.timer: asyncio.TimerHandle | None = None

    def up(self, now: float) -> bool:
        """Whether it may be called as far as we know."""
        return now >= self.down_until


class Flight:
    """How far a call has come; readable while it is under way and after it failed."""

    __slots__ = ("endpoint", "wait_s")

    def __init__(self) -> None:
        self.endpoint = ""
        """URL of the endpoint that has the call, or had it last."""
        self.wait_s = 0.0
        """Time in line, summed over all endpoints that were tried."""


_Tried = frozenset[Endpoint]


class ModelPool:
    """Calls one model at any of its endpoints, `config.concurrency` calls at a time each.

    Callers stand in line, first come, first served, and a call's timeout starts when it is sent. The pool
    belongs to one event loop. While it has no endpoints, callers wait for `set_urls` to bring one.
    """

    def __init__(self, config: ModelConfig, urls: Sequence[str], api_key: str | None = None) -> None:
        """Raises `ConfigError` for a URL that is not http(s)."""
        self.model = config.model
        """The name that the servers know the model by."""
        self._config = config
        self._api_key = api_key.strip() if api_key else None
        self._transports = _factory(config, self._api_key)
        self._endpoints: list[Endpoint] = []
        # One line per set of endpoints tried in vain: nobody stands behind a caller who waits for an endpoint
        # that he could do without.
        self._lines: dict[_Tried, deque[asyncio.Future[Endpoint | None]]] = {frozenset(): deque()}
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
        return sum(not caller.done() for line in self._lines.values() for caller in line)

    def set_urls(self, urls: Sequence[str]) -> None:
        """Replace the endpoints: those that stay keep their calls, those that go finish theirs.

        Raises `ConfigError` for a URL that is not http(s).
        """
        if self._closed:
            return
        wanted = list(dict.fromkeys(url.rstrip("/") for url in urls))
        for url in wanted:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"{url!r} is not the URL of a server; it must look like http://host:8000/v1")
        kept = {endpoint.url: endpoint for endpoint in self._endpoints if endpoint.url in wanted}
        gone = [endpoint for endpoint in self._endpoints if endpoint.url not in kept]
        random.shuffle(wanted)
        self._endpoints = [
            kept.get(url) or Endpoint(url, self._transports(url), self._config.concurrency) for url in wanted
        ]
        for endpoint in gone:
            self._retire(endpoint)
        self._serve()

    async def complete(self, request: ChatRequest, flight: Flight | None = None) -> tuple[Reply, float]:
        """The reply, and the seconds spent in line for it; `flight`, if given, is kept up to date on the way.

        A call whose endpoint is gone is tried once at each of the others. Raises the last `EndpointGone`, or
        any other `ModelError` at once.
        """
        flight = flight or Flight()
        tried: _Tried = frozenset()
        while True:
            queued = time.perf_counter()
            try:
                endpoint = await self._seat(tried)
            finally:
                flight.wait_s += time.perf_counter() - queued
            if endpoint is None:
                raise EndpointGone(f"the calls of model {self.model!r} are closed in this worker; try another one")
            flight.endpoint = endpoint.url
            try:
                reply = await endpoint.transport.complete(request, self._config.timeout_s)
                endpoint.failures, endpoint.down_until = 0, 0.0
                return self._priced(reply), flight.wait_s
            except EndpointGone:
                self._mark_down(endpoint)
                tried |= {endpoint}
                if self._closed or tried.issuperset(self._endpoints):
                    raise
            finally:
                self._leave(endpoint)

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
            if not names or self.model in names:
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

    async def _seat(self, tried: _Tried) -> Endpoint | None:
        caller: asyncio.Future[Endpoint | None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(tried, deque()).append(caller)
        self._serve()
        try:
            return await caller
        except asyncio.CancelledError:
            if caller.done() and not caller.cancelled() and (endpoint := caller.result()):
                self._leave(endpoint)  # the seat was given in the same instant
            raise

    def _serve(self) -> None:
        """Give the free places to those at the head of the lines, first to those who waited before."""
        for tried in sorted(self._lines, key=len, reverse=True):
            line = self._lines[tried]
            while line:
                if line[0].done():  # cancelled while in line
                    line.popleft()
                elif self._closed:
                    line.popleft().set_result(None)
                elif endpoint := self._free(tried):
                    endpoint.outstanding += 1
                    endpoint.last_used = next(self._ticks)
                    line.popleft().set_result(endpoint)
                else:
                    break
            if tried and not line:
                del self._lines[tried]

    def _free(self, tried: _Tried) -> Endpoint | None:
        if not self._endpoints:
            return None
        now = asyncio.get_running_loop().time()
        # If the set changed and nothing untried is left, anything new is better than nothing.
        others = [endpoint for endpoint in self._endpoints if endpoint not in tried] or self._endpoints
        best = min(
            [endpoint for endpoint in others if endpoint.up(now)] or others,
            key=lambda endpoint: (
                endpoint.outstanding >= endpoint.cap,
                endpoint.outstanding,
                endpoint.last_used,
            ),
        )
        return best if best.outstanding < best.cap else None

    def _leave(self, endpoint: Endpoint) -> None:
        endpoint.outstanding -= 1
        if endpoint in self._draining:
            self._retire(endpoint)
        self._serve()

    def _mark_down(self, endpoint: Endpoint) -> None:
        loop = asyncio.get_running_loop()
        # Calls that were sent before it went down all fail at once and must count as one failure.
        if len(self._endpoints) == 1 or endpoint not in self._endpoints or not endpoint.up(loop.time()):
            return
        pause_s = min(_DOWN_LONGEST_S, _DOWN_FIRST_S * 2**endpoint.failures) * random.uniform(0.75, 1.25)
        endpoint.failures += 1
        endpoint.down_until = loop.time() + pause_s
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
    if config.transport == "sdk":
        from .sdk import SdkTransport

        return lambda url: SdkTransport(url, api_key)
    from .direct import DirectTransport, Session

    session = Session()
    return lambda url: DirectTransport(url, api_key, session)
