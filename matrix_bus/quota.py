"""Requests and tokens per minute of a hosted model, shared by all worker processes that call it.

A leaky bucket as a clock (the generic cell rate algorithm, ITU-T I.371): the value of the model's key says at what
time the next request may start, and everybody who wants to make some moves it on, fenced on what he has read. A
process takes a second's worth at a time, so the broker is asked about once a second.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from hashlib import blake2b

import msgspec
from msgspec import Struct

from .bus import Bus, create_bucket, fence, is_lost_race, patiently
from .config import ModelConfig
from .errors import PublishRefused

BUCKET = "mb_quota"
_STREAM = f"KV_{BUCKET}"
_AHEAD_S = 1.0
"""Seconds' worth of calls that a process takes at a time, and the longest burst that it may make of them."""
_SMOOTH = 0.1


class _Clock(Struct):
    """Unix times from which on the next request, and the next token, is allowed."""

    requests_at: float = 0.0
    tokens_at: float = 0.0


_decode = msgspec.json.Decoder(_Clock)


async def prepare(bus: Bus, replicas: int = 1) -> None:
    """Creates the bucket, if it is not there yet. Raises `BusError`."""
    await create_bucket(bus, BUCKET, replicas)


class Quota:
    """The limits of one model, as this process keeps to them together with all others."""

    def __init__(self, bus: Bus, config: ModelConfig) -> None:
        self._bus = bus
        account = f"{config.model} {' '.join(sorted(config.urls))} {config.api_key_env}"
        self._key = f"$KV.{BUCKET}.{blake2b(account.encode(), digest_size=8).hexdigest()}"
        per_minute = config.requests_per_minute
        self._request_s = 60 / per_minute if per_minute else 0.0
        self._token_s = 60 / config.tokens_per_minute if config.tokens_per_minute else 0.0
        self._starts: deque[float] = deque()
        """Unix times at which calls of this process may start."""
        self._lock = asyncio.Lock()
        self._mean = 0.0
        """Tokens of a call, as the last ones were."""
        self._owed = 0.0
        """Tokens that were used and not reserved; below 0 those that were reserved and not used."""

    async def start(self, guess: float) -> float:
        """Returns when a call may start, with the tokens that are reserved for it; `guess` is for the first calls."""
        tokens = self._mean or guess
        async with self._lock:
            while self._starts and self._starts[0] < time.time() - _AHEAD_S:
                self._starts.popleft()  # not wanted in time: no burst is made of it
            if not self._starts:
                await self._reserve(tokens)
            at = self._starts.popleft()
        if (wait_s := at - time.time()) > 0:
            await asyncio.sleep(wait_s)
        return tokens

    def ended(self, reserved: float, used: float) -> None:
        """The call has taken so many tokens."""
        self._mean += _SMOOTH * (used - self._mean) if self._mean else used
        self._owed += used - reserved

    async def _reserve(self, tokens: float) -> None:
        call_s = max(self._request_s, tokens * self._token_s)
        count = max(1, math.floor(_AHEAD_S / call_s)) if call_s else 1
        wanted = max(0.0, count * tokens + self._owed)
        while True:
            stored = await patiently(self._bus, lambda: self._bus.last(_STREAM, self._key))
            clock = _decode.decode(stored.data) if stored is not None and stored.data else _Clock()
            now = time.time()
            requests_at, tokens_at = max(now, clock.requests_at), max(now, clock.tokens_at)
            following = _Clock(requests_at + count * self._request_s, tokens_at + wanted * self._token_s)
            body, condition = msgspec.json.encode(following), fence(stored.seq if stored is not None else 0)
            try:
                await patiently(self._bus, lambda: self._bus.publish(self._key, body, condition))  # noqa: B023
            except PublishRefused as error:
                if not is_lost_race(error):
                    raise
                await asyncio.sleep(random.uniform(0.0, 0.02))
            else:
                break
        self._owed -= wanted - count * tokens
        each_s = tokens * self._token_s
        self._starts.extend(
            max(requests_at + index * self._request_s, tokens_at + index * each_s) for index in range(count)
        )
