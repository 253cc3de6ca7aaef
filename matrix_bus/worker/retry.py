"""How long a hop waits before it is tried again."""

from __future__ import annotations

import random

from ..errors import RateLimited

_FIRST_S, _LONGEST_S = 1.0, 60.0


def backoff_s(attempt: int, error: Exception) -> float:
    """Seconds to wait after the `attempt`-th call failed: doubling, with full jitter, or what the server asked for.

    Full jitter as in "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015): waiting rows must not come
    back as one wave.
    """
    if isinstance(error, RateLimited) and error.retry_after_s is not None:
        return error.retry_after_s * random.uniform(1.0, 1.25)
    return random.uniform(0.1, min(_LONGEST_S, _FIRST_S * 2.0 ** (attempt - 1)))
