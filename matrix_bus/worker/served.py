"""One role of a run as this worker serves it: its settings, and a handler call with all that may come of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from .. import metrics
from ..agent import Next, Outcome, Workflow
from ..answers import Answers
from ..errors import HandlerError, decisive
from ..llm import LLM, ModelPool
from ..orchestrator import Orchestrator
from ..registry import RunRecord
from . import limits
from .deadlines import EXPIRED, Deadlines
from .delivery import Delivery
from .handlers import Caller

Resolve = Callable[[str | None], ModelPool]
Handled = tuple[Next | Outcome | Exception, bytes]
"""What the handler decided, or what went wrong; and the state as it left it."""


class Served:
    """Calls the handler; the row's message takes what the call cost, whether it succeeds or not."""

    def __init__(
        self,
        record: RunRecord,
        flow: Workflow[Any],
        name: str,
        caller: Caller,
        deadlines: Deadlines,
        resolve: Resolve,
        cache: Answers | None,
    ) -> None:
        role = flow.roles[name]
        settings = record.config.role(name)
        self.max_attempts = settings.max_attempts
        self.stats = metrics.role_stats(flow.name, name)
        self._workflow = flow.name
        self._timeout_s = settings.timeout_s
        self._limits = record.config.limits
        self._caller = caller
        self._deadlines = deadlines
        self._resolve = resolve
        self._cache = cache
        self._alias = record.config.alias_of(name, role.model)
        llm = record.config.llm
        below = llm.named(self._alias).sampling.over(llm.sampling)
        self._sampling = settings.sampling.over(below).over(role.sampling)

    async def handle(self, delivery: Delivery, message: Orchestrator) -> Handled:
        """Raises `CancelledError` if the worker stops; whatever else happens is returned."""
        message.calls += 1
        llm = self._llm(message) if self._caller.wants_llm else None
        started = time.monotonic()
        delivery.running = True
        most_s = min(self._timeout_s, limits.seconds_left(message, self._limits, time.time()))
        self._deadlines.begin(delivery, started + most_s)
        self.stats.in_flight += 1
        try:
            row, work = self._caller.begin(message, llm)
            return self._caller.end(row, await work)
        except asyncio.CancelledError:
            if delivery.deadline == EXPIRED:
                delivery.task.uncancel()
                return TimeoutError(f"the handler took longer than {most_s:.3g} s"), message.state
            if delivery.task.cancelling():
                raise  # the worker stops: the hop is handed back
            # Of the handler's own making: handed back it would come again for ever.
            return HandlerError(f"role {message.role!r} let a CancelledError out"), message.state
        except SystemExit:
            return HandlerError(f"role {message.role!r} called exit"), message.state
        except Exception as error:  # a failed row is data: whatever a handler raises ends up in its outcome
            return decisive(error), message.state
        finally:
            delivery.deadline = 0.0
            self.stats.in_flight -= 1
            spent_s = time.monotonic() - started
            message.handler_s += spent_s
            self.stats.observe(spent_s)
            if llm is not None:
                self._account(message, llm)

    def _llm(self, message: Orchestrator) -> LLM:
        return LLM(
            self._resolve,
            self._alias,
            self._sampling,
            message.history,
            role=message.role,
            hop=message.hop,
            attempt=message.attempt,
            seed=message.seed,
            session=f"{message.run}:{message.n}",
            cache=self._cache,
        )

    def _account(self, message: Orchestrator, llm: LLM) -> None:
        usage = llm.usage
        before = message.usage.get(message.role)
        message.usage = {**message.usage, message.role: usage if before is None else before + usage}
        metrics.MODEL_CALLS.labels(self._workflow, message.role).inc(usage.calls)
        metrics.TOKENS.labels(self._workflow, message.role, "prompt").inc(usage.prompt_tokens)
        metrics.TOKENS.labels(self._workflow, message.role, "completion").inc(usage.completion_tokens)
