"""What a handler's failure means: how it is recorded, what it is counted as, how long until the next attempt."""

from __future__ import annotations

import random

from ..errors import LimitReached, MatrixBusError, ModelError, RateLimited, Retry, RowError, WorkerCrashed, user_frames
from ..orchestrator import ErrorRecord, Orchestrator, clean
from ..telemetry import logger

_TRACE_FRAMES = 5
_FIRST_S, _LONGEST_S, _LONGEST_ASKED_S = 1.0, 60.0, 3600.0

log = logger("worker")


def backoff_s(attempt: int, error: Exception) -> float:
    """Seconds to wait after the `attempt`-th call failed: doubling, with full jitter, or what the server asked for.

    Full jitter as in "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015): waiting rows must not come
    back as one wave.
    """
    if isinstance(error, RateLimited | Retry) and error.retry_after_s is not None:
        return min(_LONGEST_ASKED_S, error.retry_after_s) * random.uniform(1.0, 1.25)
    return random.uniform(0.1, min(_LONGEST_S, _FIRST_S * 2.0 ** min(attempt - 1, 10)))


def describe(error: Exception, message: Orchestrator, now: float) -> ErrorRecord:
    """What the outcome will say about it: for a defect of a handler with the user's frames."""
    text = str(error) or ("the handler's time was up" if isinstance(error, TimeoutError) else repr(error))
    if not isinstance(error, MatrixBusError | TimeoutError):
        text = f"{text}\n{user_frames(error, _TRACE_FRAMES)}"
    return ErrorRecord(type(error).__name__, clean(text), message.role, message.hop, message.attempt, now)


def say_defect(error: Exception) -> None:
    """Logs a handler's defect, with the user's frames; what we raise on purpose stands in the outcome alone."""
    if not isinstance(error, MatrixBusError):
        log.warning("worker.handler_raised", error=repr(error), where=user_frames(error))


def reason_of(error: Exception) -> str:
    """A short word to count failures by."""
    if isinstance(error, RowError):
        return "bad_row"
    if isinstance(error, LimitReached):
        return "limit"
    if isinstance(error, ModelError | WorkerCrashed):
        return type(error).__name__
    return "timeout" if isinstance(error, TimeoutError) else f"error: {type(error).__name__}"
