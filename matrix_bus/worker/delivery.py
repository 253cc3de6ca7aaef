"""One message that a worker holds: what the broker said about it, and where its hop stands."""

from __future__ import annotations

import asyncio

from ..bus import Message, delivery_facts
from ..orchestrator import HEADER_CRASHES, HEADER_GENERATION, HEADER_LEASE
from .pulling import Share


class Delivery:
    """A delivered row or hop message, from its arrival until it is settled."""

    __slots__ = (
        "ack_subject",
        "beat_at",
        "body",
        "deadline",
        "deliveries",
        "doubtful",
        "generation",
        "hop",
        "lease",
        "n",
        "noted",
        "old",
        "role",
        "running",
        "seq",
        "share",
        "spoke",
        "task",
    )

    task: asyncio.Task[None]
    """What settles it."""
    share: Share
    """Of whose slots it takes one."""

    def __init__(self, message: Message, old_until: int, now: float) -> None:
        """`now` is on the monotonic clock."""
        _, _, self.role, n, hop = message.subject.split(".")
        self.n = int(n)
        self.hop = int(hop)
        self.body = message.body
        self.lease = message.header(HEADER_LEASE)
        """Ack subject of the row message; empty if this is the row message."""
        self.generation = int(message.header(HEADER_GENERATION) or 0)
        """Of the row: readable also where the body is not."""
        self.ack_subject = message.reply
        """Replaced when the broker delivers the same message again while it is being worked on."""
        self.deliveries, self.seq = delivery_facts(message.reply)
        self.old = self.deliveries > 1 or self.seq <= old_until
        """Somebody may have handled it before: a restarted broker forgets delivery counts, so age counts too."""
        self.noted = int(message.header(HEADER_CRASHES) or 0)
        """Crashes of workers that were noted of this hop when it was suspected last."""
        self.doubtful = False
        """Whether it may have been given to somebody else since it came: the row may be elsewhere, or at its end."""
        self.running = False
        """True while the handler is at work: then this process owns the hop."""
        self.beat_at = now
        self.spoke = 0
        self.deadline = 0.0
        """On the monotonic clock, while a handler is at work."""

    def forget_body(self) -> None:
        """Frees the bytes once they are decoded, where nobody will need to publish them again."""
        if self.deliveries == 1 and not self.noted:
            self.body = b""
        else:
            self.body = bytes(self.body)  # without what was read beside it

    @property
    def data(self) -> bytes:
        """A copy of the message's bytes."""
        return bytes(self.body)

    @property
    def suspect(self) -> bool:
        """Whether it may be this hop that workers die of: it was with two of them, or it came back once more.

        A first time says nothing, since a worker that is killed takes all its hops with it.
        """
        return self.deliveries > (1 if self.noted else 2)

    @property
    def crashes(self) -> int:
        """Workers that died while they executed it, as far as is known; deliveries that only waited do not count."""
        return (self.noted or 1) + 1 if self.suspect else self.noted
