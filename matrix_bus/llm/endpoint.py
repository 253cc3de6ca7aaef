"""One replica of a model: how much it is given, and when nothing at all."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from .messages import Transport

DOWN_FIRST_S, DOWN_LONGEST_S = 2.0, 30.0
_BROKEN_AFTER = 5
"""Server errors in a row, of whatever calls, after which a replica counts as down: one may be the request's fault."""
_CUT, _CUT_FOR_LATENCY = 0.7, 0.9
_SLOW = 8.0
"""Times the best seconds per token: more is a queue inside the server. A batch of 16 is 7.5 times as slow per token as
a single call on the embedded model, and twice as fast in all."""
_SMOOTH = 0.1
_FORGET_S = 600.0
"""In so many seconds the best counts half: prompts grow, and a replica may get slower neighbours."""


class Limit:
    """How many calls may be under way to one replica: additive increase, multiplicative decrease.

    As TCP does it (Chiu and Jain, 1989): every call that goes well lets in a little more, being told to slow down, or
    waiting far longer for a token than at the best of times, takes a share away, at most once per round trip.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.value = float(most)
        self._best_s = 0.0
        """Seconds per token."""
        self._now_s = 0.0
        self._latency_s = 0.0
        self._cut_at = -1e9
        self._seen_at = 0.0

    def __int__(self) -> int:
        return max(1, int(self.value))

    def went_well(self, latency_s: float, tokens: int, now: float) -> None:
        """A call came back after `latency_s` seconds with so many tokens."""
        per_token_s = latency_s / max(1, tokens)
        self._latency_s += _SMOOTH * (latency_s - self._latency_s)
        self._now_s += _SMOOTH * (per_token_s - self._now_s) if self._now_s else per_token_s
        self._best_s *= 2.0 ** ((now - self._seen_at) / _FORGET_S)
        self._best_s = min(self._best_s or per_token_s, per_token_s)
        self._seen_at = now
        if self._now_s > _SLOW * self._best_s:
            self._cut(_CUT_FOR_LATENCY, now)
        else:
            self.value = min(self.most, self.value + 1 / self.value)

    def push_back(self, outstanding: int, now: float) -> None:
        """The server asked for less, or a call's time was up."""
        self.value = min(self.value, max(1, outstanding))
        self._cut(_CUT, now)

    def _cut(self, factor: float, now: float) -> None:
        if now - self._cut_at >= self._latency_s:
            self._cut_at = now
            self.value = max(1.0, self.value * factor)


class Endpoint:
    """One replica: at most `limit` calls are under way to it, none while it is down, one to see whether it is back."""

    def __init__(self, url: str, transport: Transport, most: int, capacity: float = 1.0) -> None:
        self.url = url
        self.transport = transport
        self.capacity = capacity
        """Its share of the calls, beside other replicas."""
        self.limit = Limit(most)
        self.outstanding = 0
        self.down_until = 0.0
        """On the event loop's clock."""
        self.failures = 0
        """How often in a row it was taken for down; above 0 it gets one call at a time, until one goes well."""
        self.errors = 0
        """Server errors in a row."""
        self.pushes = 0
        """How often in a row it said that it was busy."""
        self.last_used = 0
        """Breaks ties, so that many workers with little to do do not all call the same replica."""
        self.timer: asyncio.TimerHandle | None = None
        self.calls: dict[asyncio.Task[Any], bool] = {}
        """Who waits for an answer, and whether he was told that none will come."""

    def has_room(self, now: float) -> bool:
        """Whether one more call may be sent to it."""
        if now < self.down_until:
            return False
        return self.outstanding < (1 if self.failures else int(self.limit))

    @property
    def load(self) -> float:
        """Calls under way, for its capacity."""
        return self.outstanding / self.capacity

    def went_well(self, latency_s: float, tokens: int, now: float) -> None:
        """A call was answered."""
        self.failures = self.errors = self.pushes = 0
        self.down_until = min(self.down_until, now)
        self.limit.went_well(latency_s, tokens, now)

    def push_back(self, retry_after_s: float | None, now: float) -> None:
        """It is busy: fewer calls from now on, and none for as long as it asks."""
        self.limit.push_back(self.outstanding, now)
        if now >= self.down_until:
            self.pushes += 1
        asked_s = min(DOWN_LONGEST_S, 0.25 * 2**self.pushes) if retry_after_s is None else retry_after_s
        self.down_until = max(self.down_until, now + asked_s * random.uniform(1.0, 1.25))

    def answered_with_error(self, now: float) -> None:
        """It answered that it could not: after several in a row it counts as down."""
        self.errors += 1
        if self.errors >= _BROKEN_AFTER:
            self.gone(now)

    def gone(self, now: float) -> None:
        """It does not answer. Calls sent before that fail all at once and count as one failure."""
        if now < self.down_until:
            return
        pause_s = min(DOWN_LONGEST_S, DOWN_FIRST_S * 2**self.failures) * random.uniform(0.75, 1.25)
        self.failures += 1
        self.down_until = now + pause_s
