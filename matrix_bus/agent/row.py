"""What a handler gets and what it returns: the row with its state, and where the row goes."""

from __future__ import annotations

import random
from typing import Any, Generic, TypeVar

import msgspec

from ..llm import read_segment
from ..orchestrator import Kind, Orchestrator, read_ref
from .large import Store

S = TypeVar("S", bound=msgspec.Struct)


class State(msgspec.Struct, kw_only=True):
    """Base of a workflow's state: fields without a default are read from the input line by name.

    Handlers change it in place; it travels with the row as JSON.
    """


class Next(msgspec.Struct, frozen=True):
    """The row goes on to `role`."""

    role: str


class Outcome(msgspec.Struct, frozen=True):
    """The row ends here. A handler that returns another kind, or a reason that is no `str`, has its row fail."""

    kind: Kind
    reason: str = ""


def to(role: str) -> Next:
    """Send the row to `role`."""
    return Next(role)


def success(reason: str = "") -> Outcome:
    """End the row as a success."""
    return Outcome("success", reason)


def filtered(reason: str) -> Outcome:
    """End the row early, on purpose, with a reason that is counted: a few words, not an exception."""
    return Outcome("filtered", reason)


def failed(reason: str) -> Outcome:
    """End the row as failed; raise an exception instead where there is one to tell about."""
    return Outcome("failed", reason)


class Row(Generic[S]):
    """One row at one hop, as its handler sees it."""

    __slots__ = ("_message", "_rng", "_store", "number", "run", "state", "trials")

    def __init__(self, message: Orchestrator, state: S, trials: int = 1, store: Store | None = None) -> None:
        self._message = message
        self._store = store
        self._rng: random.Random | None = None
        self.run = message.run
        self.number = message.n
        self.state = state
        self.trials = trials

    @property
    def id(self) -> str:
        """The input's `id` field, else its line number."""
        return self._message.id

    @property
    def line(self) -> int:
        """Line of the dataset, from 0."""
        return self.number // self.trials

    @property
    def trial(self) -> int:
        """Which of the line's trials this is, from 0."""
        return self.number % self.trials

    @property
    def role(self) -> str:
        """The role that the row is at."""
        return self._message.role

    @property
    def hop(self) -> int:
        """Handler deliveries of this row so far, this one included."""
        return self._message.hop

    @property
    def attempt(self) -> int:
        """Calls for this hop, this one included: above 1 after a transient error."""
        return self._message.attempt

    @property
    def turn(self) -> int:
        """How often the row has come to this role, this time included."""
        return self._message.visits.get(self._message.role, 0)

    @property
    def seed(self) -> int:
        """31 bits, from the run's seed and the row's place: the same in every repetition."""
        return self._message.seed

    @property
    def rng(self) -> random.Random:
        """The handler call's own generator, seeded by row and hop: a repeated call draws the same."""
        if self._rng is None:
            self._rng = random.Random(f"{self.seed}:{self.hop}")
        return self._rng

    async def input(self) -> Any:
        """The line as submitted; read from the object store where it was large."""
        ref = read_ref(self._message.input)
        line = self._message.input if ref is None or self._store is None else await self._store.get(ref)
        return msgspec.json.decode(line)

    async def history(self) -> list[dict[str, Any]]:
        """The model calls so far, oldest first, as they will stand in the output. Decoded, and read, at each use."""
        calls: list[dict[str, Any]] = []
        for line in self._message.history:
            segment = read_segment(line)
            if segment is not None and self._store is not None:
                calls += msgspec.json.decode(await self._store.get(segment.calls))
            else:
                calls.append(msgspec.json.decode(line))
        return calls
