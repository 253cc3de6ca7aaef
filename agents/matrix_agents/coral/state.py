"""What a coral row carries from hop to hop."""

from __future__ import annotations

import string
from typing import Annotated

import msgspec
from msgspec import Meta

import matrix_bus as mb

LETTERS = string.ascii_uppercase
"""What the options are called, in their order."""


class Turn(msgspec.Struct):
    """One agent's message, and the answer that the extractor found in it."""

    agent: str
    text: str
    answer: str | None = None
    """A letter, or None for "not sure yet"."""


class Discussion(mb.State):
    """A question with lettered options, and the discussion about it."""

    question: str
    options: Annotated[list[str], Meta(min_length=2, max_length=len(LETTERS))]
    answer: str | None = None
    """The right letter, if the dataset knows it; the agents never see it."""
    coral_turns: list[Turn] = msgspec.field(default_factory=list)
    coral_agreed: str | None = None
    """The letter on which both agents agree."""

    def __post_init__(self) -> None:
        letters = LETTERS[: len(self.options)]
        if self.answer is not None and self.answer not in tuple(letters):
            raise ValueError(f"the answer must be the letter of an option, one of {letters}, not {self.answer!r:.80}")


class CoralConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`workflow.<name>=value`."""

    max_turns: Annotated[int, Meta(ge=2)] = 20
    """Agent messages before a row ends without agreement; agreement takes one of each agent."""
