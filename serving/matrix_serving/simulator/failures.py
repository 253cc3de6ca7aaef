"""Failures on demand, each at a rate."""

from __future__ import annotations

import random
from enum import StrEnum

from matrix_bus.errors import ConfigError


class Failure(StrEnum):
    """What may happen to a call."""

    RATE_LIMITED = "429"
    """Refused, with `Retry-After`."""
    SERVER_ERROR = "500"
    HANG = "hang"
    """No answer, until the client goes away."""
    SLOW = "slow"
    """A pause before the answer."""
    CRASH = "crash"
    """The process exits with code 1 at once, and every connection with it."""
    MALFORMED = "malformed"
    """Status 200 and JSON that breaks off."""
    EMPTY = "empty"
    """An answer without choices."""


class Failures:
    """Draws what happens to each call."""

    def __init__(self, rates: dict[Failure, float], seed: int = 0) -> None:
        """Raises `ConfigError` for rates that are no shares of all calls."""
        if any(not 0 <= rate <= 1 for rate in rates.values()) or sum(rates.values()) > 1 + 1e-9:
            told = ",".join(f"{failure}={rate:g}" for failure, rate in rates.items())
            raise ConfigError(f"the failure rates {told} must each be from 0 to 1, and at most 1 together")
        self._rates = [(failure, rate) for failure, rate in rates.items() if rate]
        self._random = random.Random(seed)

    @classmethod
    def parse(cls, spec: str, seed: int = 0) -> Failures:
        """From `429=0.05,hang=0.01`. Raises `ConfigError`."""
        rates: dict[Failure, float] = {}
        for part in filter(None, spec.split(",")):
            name, _, rate = part.partition("=")
            try:
                rates[Failure(name.strip())] = float(rate)
            except ValueError:
                raise ConfigError(
                    f"the failure {part!r} is not NAME=RATE with a rate from 0 to 1 and one of the names "
                    f"{', '.join(Failure)}"
                ) from None
        return cls(rates, seed)

    def draw(self) -> Failure | None:
        """What happens to the next call; None: it is answered as it should."""
        if not self._rates:
            return None
        point = self._random.random()
        for failure, rate in self._rates:
            if point < rate:
                return failure
            point -= rate
        return None
