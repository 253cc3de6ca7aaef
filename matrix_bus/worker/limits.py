"""When enough is enough: the limits of a row, and the rule that pauses a run whose rows mostly fail."""

from __future__ import annotations

import math
import time
from collections import Counter, deque

import msgspec
from msgspec import Raw, Struct

from .. import registry
from ..bus import Bus
from ..config import LimitsConfig
from ..errors import BusError, LimitReached
from ..orchestrator import ErrorRecord, Orchestrator, Usage, outcome_stream
from ..telemetry import logger

_CHECK_EVERY_S = 2.0
_TOO_EARLY_S = 0.25
_GLANCE = 20
_SAID = 3

log = logger("worker")


def check(message: Orchestrator, limits: LimitsConfig, now: float) -> None:
    """Raises `LimitReached` if the row must not go to another handler."""
    if limits.row_s is limits.hops is limits.attempts is limits.tokens is limits.cost is None:
        return
    used = sum(message.usage.values(), Usage()) if limits.tokens or limits.cost else Usage()
    tokens = used.prompt_tokens + used.completion_tokens
    for name, value, most in (
        ("row_s", now - message.admitted_at, limits.row_s),
        ("hops", message.hop - 1, limits.hops),
        ("attempts", message.calls, limits.attempts),
        ("tokens", tokens, limits.tokens),
        ("cost", used.cost, limits.cost),
    ):
        if most is not None and value >= most:
            raise LimitReached(f"the row has reached limits.{name}={most:g}, with {value:.6g}")


def seconds_left(message: Orchestrator, limits: LimitsConfig, now: float) -> float:
    """Until the row's time is up; not below 0, and infinite where it has no limit."""
    return math.inf if limits.row_s is None else max(0.0, message.admitted_at + limits.row_s - now)


class _Head(Struct):
    """What the rule reads of an outcome."""

    row: int
    outcome: str
    reason: str = ""
    errors: list[ErrorRecord] = []
    state: Raw = Raw()


_decode = msgspec.json.Decoder(_Head)


class StopRule:
    """Pauses the run when `failed_share` of its last `failed_window` outcomes are failures, whoever made them.

    A worker that sees many failures among its own last few looks at the outcomes of all. Those from before the run
    was resumed do not count.
    """

    def __init__(self, bus: Bus, run: str, limits: LimitsConfig) -> None:
        self._bus = bus
        self._run = run
        self._window = limits.failed_window
        self._share = limits.failed_share
        self._own: deque[bool] = deque(maxlen=_GLANCE)
        self._next_check_at = 0.0

    def suspects(self, failed: bool) -> bool:
        """Takes note of an outcome; True if it is time for `check`."""
        self._own.append(failed)
        if not (failed and self._window) or sum(self._own) < self._share * len(self._own):
            return False
        now = time.monotonic()
        if now < self._next_check_at:
            return False
        self._next_check_at = now + _CHECK_EVERY_S
        return True

    async def check(self) -> None:
        """Looks at the last outcomes of the run, and pauses it if they are what the rule is for."""
        try:
            record = await registry.get(self._bus, self._run)
            if record is None or record.state != "active":
                return
            stream = outcome_stream(self._run)
            last = await self._bus.last_sequence(stream)
            start = last - self._window + 1
            if start <= record.watch_from:
                self._next_check_at = time.monotonic() + _TOO_EARLY_S
                return
            reasons: Counter[str] = Counter()
            example = ""
            async for message in self._bus.read(stream, start):
                head = _decode.decode(message.data)
                if head.outcome == "failed" and message.seq <= last:  # more of them come in meanwhile
                    reasons[head.reason] += 1
                    if head.errors:
                        what = head.errors[-1]
                        example = f"row {head.row}: {what.type}: {what.message.partition(chr(10))[0]}"
            if reasons.total() < self._share * self._window:
                return
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(_SAID))
            why = f"{reasons.total()} of the last {self._window} outcomes failed: {counts}; {example}"
            await registry.update(self._bus, self._run, when="active", state="paused", why=why)
            log.warning("worker.run_paused", run=self._run, why=why)
        except (BusError, msgspec.DecodeError) as error:
            log.warning("worker.stop_rule_failed", run=self._run, error=str(error))
