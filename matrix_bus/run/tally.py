"""Sums over outcomes: what a summary and a manifest say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
from msgspec import Struct

from ..agent import Workflow
from ..orchestrator import OutcomeRecord, Usage
from ..telemetry import logger

log = logger("run")


class EndpointTally(Struct, omit_defaults=True):
    """What one model server did for a run."""

    model: str
    calls: int = 0
    """Sent to it, those that failed included."""
    cached: int = 0
    """Answered from before, and not sent."""
    retries: int = 0
    """Calls of a hop's second or later attempt."""
    errors: dict[str, int] = {}
    """By type."""
    usage: Usage = Usage()
    latency_s: float = 0.0
    """Summed over the calls that were answered."""
    wait_s: float = 0.0
    """In line, summed."""


class _Failure(Struct):
    type: str = ""


class _Call(Struct):
    """What is summed of a call in the history."""

    model: str = ""
    endpoint: str = ""
    usage: Usage = Usage()
    wait_s: float = 0.0
    latency_s: float = 0.0
    attempt: int = 0
    cached: bool = False
    error: _Failure | None = None


_call = msgspec.json.Decoder(_Call)


class Tally:
    """Sums over outcomes, for summaries and manifests."""

    def __init__(self, flow: Workflow[Any] | None = None) -> None:
        self._flow = flow
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self.rows = 0
        self.kinds: Counter[str] = Counter()
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.example = ""
        """The last error of a failed row."""
        self.hops = 0
        self.usage = Usage()
        self.usage_by_role: dict[str, Usage] = {}
        self.endpoints: dict[str, EndpointTally] = {}
        """By URL."""
        self.first_at = self.last_at = 0.0
        self._sums: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def add(self, record: OutcomeRecord) -> None:
        self.rows += 1
        self.kinds[record.outcome] += 1
        self.reasons[record.outcome, record.reason] += 1
        if record.outcome == "failed" and record.errors:
            self.example = f"{record.errors[-1].type}: {record.errors[-1].message.partition(chr(10))[0]}"
        self.hops += record.hops
        self.usage += record.usage
        for role, usage in record.usage_by_role.items():
            self.usage_by_role[role] = self.usage_by_role.get(role, Usage()) + usage
        for line in record.history:
            self._add_call(_call.decode(line))
        admitted, finished = record.timings.admitted_at, record.timings.finished_at
        self.first_at = min(self.first_at or admitted, admitted)
        self.last_at = max(self.last_at, finished)
        if self._flow is not None and self._flow.name == record.workflow:
            try:
                measured = self._flow.measure(record)
            except Exception as error:  # the user's function: its mistake must not cost the output
                log.warning("run.metrics_failed", row=record.row, error=repr(error))
                return
            for name, value in measured.items():
                self._sums[name] += value  # type: ignore[assignment]  # a Counter of floats
                self._counts[name] += 1

    def _add_call(self, call: _Call) -> None:
        of = self.endpoints.setdefault(call.endpoint, EndpointTally(model=call.model))
        if call.cached:
            of.cached += 1
            return
        of.calls += 1
        of.retries += call.attempt > 1
        of.wait_s += call.wait_s
        if call.error is not None:
            of.errors[call.error.type] = of.errors.get(call.error.type, 0) + 1
            return
        of.latency_s += call.latency_s
        of.usage += call.usage

    @property
    def seconds(self) -> float:
        """From the first row admitted to the last outcome."""
        return max(0.0, self.last_at - self.first_at)

    @property
    def metrics(self) -> dict[str, float]:
        """The workflow's metrics, averaged over the rows that have them."""
        return {name: self._sums[name] / count for name, count in self._counts.items()}
