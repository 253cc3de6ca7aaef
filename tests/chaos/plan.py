"""What is done to whom, drawn from the seed alone: the same seed gives the same plan."""

from __future__ import annotations

import random
from dataclasses import dataclass

ACK_WAIT_S = 2.0

PLAIN = {
    "kill worker": 40,
    "terminate worker": 15,
    "freeze worker": 12,
    "cut connections": 10,
    "kill broker": 10,
    "kill submitter": 5,
    "kill collector": 8,
}
"""How often, in percent."""
CLUSTER = {**PLAIN, "kill broker": 6, "kill leader": 6}


@dataclass(frozen=True)
class Strike:
    """One attack."""

    number: int
    action: str
    at: float
    """When this share of the run's handler calls has been made."""
    choice: float
    """0 to 1: which of those that may be the victim."""
    pause_s: float
    """How long a victim is frozen, a broker stays dead, a connection stays cut."""


def draw(seed: int, strikes: int, *, cluster: bool = False) -> list[Strike]:
    """The plan, in the order in which it is carried out."""
    chance = random.Random(seed)
    actions = CLUSTER if cluster else PLAIN
    shares = sorted(chance.uniform(0.01, 0.97) for _ in range(strikes))
    plan = []
    for number, share in enumerate(shares):
        (action,) = chance.choices(list(actions), list(actions.values()))
        pause_s = chance.uniform(1.2, 2.0) * ACK_WAIT_S if action == "freeze worker" else chance.uniform(0.0, 1.0)
        if action == "kill broker" and chance.random() < 0.15:
            pause_s = 1.5 * ACK_WAIT_S  # an outage longer than AckWait must repeat nothing
        # Later a submitter has nothing left to do.
        at = min(share, chance.uniform(0.0, 0.2)) if action == "kill submitter" else share
        plan.append(Strike(number, action, at, chance.random(), pause_s))
    return sorted(plan, key=lambda strike: strike.at)
