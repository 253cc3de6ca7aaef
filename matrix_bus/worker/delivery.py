"""One message that a worker holds: what the broker said about it, and where its hop stands."""

from __future__ import annotations

import asyncio
import time

from nats.aio.msg import Msg

from ..bus import delivery_facts


class Delivery:
    """A delivered row or hop message, from its arrival until it is settled."""

    __slots__ = (
        "ack_subject",
        "beat_at",
        "data",
        "deadline",
        "headers",
        "hop",
        "n",
        "old",
        "role",
        "running",
        "seq",
        "spoke",
        "task",
    )

    task: asyncio.Task[None]
    """What settles it."""

    def __init__(self, message: Msg, old_until: int) -> None:
        _, _, self.role, n, hop = message.subject.split(".")
        self.n = int(n)
        self.hop = int(hop)
        self.data = message.data
        self.headers: dict[str, str] = message.headers or {}
        self.ack_subject = message.reply
        """Replaced when the broker delivers the same message again while it is being worked on."""
        deliveries, self.seq = delivery_facts(message.reply)
        self.old = deliveries > 1 or self.seq <= old_until
        """Somebody may have handled it before: a restarted broker forgets delivery counts, so age counts too."""
        self.running = False
        """True while the handler is at work: then this process owns the hop."""
        self.beat_at = time.monotonic()
        self.spoke = 0
        self.deadline = 0.0
        """On the monotonic clock, while a handler is at work."""
