"""What a coral row carries from hop to hop."""

from __future__ import annotations

import msgspec

import matrix_bus as mb


class Turn(msgspec.Struct):
    """One agent's message, and the answer that the extractor found in it."""

    agent: str
    text: str
    answer: str | None = None
    """A letter, or None for "not sure yet"."""


class Discussion(mb.State):
    """A question with lettered options, and the discussion about it."""

    question: str
    options: list[str]
    answer: str | None = None
    """The right letter, if the dataset knows it; the agents never see it."""
    coral_turns: list[Turn] = msgspec.field(default_factory=list)
    coral_agreed: str | None = None
    """The letter on which both agents agree."""


class CoralConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`workflow.<name>=value`."""

    max_turns: int = 20
    """Agent messages before a row ends without agreement."""

    def __post_init__(self) -> None:
        if self.max_turns < 2:
            raise ValueError("must be at least 2: agreement takes a message of each agent")
