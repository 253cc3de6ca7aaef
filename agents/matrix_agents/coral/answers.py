"""From an extractor's reply to an answer letter, and from the turns to agreement. Pure."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from .state import Turn

LETTERS = string.ascii_uppercase

_PARENTHESISED = re.compile(r"\(\s*([A-Z])\s*\)")
_LABEL = re.compile(r"^\W*([A-Z])(?:[).:]|\W*$)")
_PHRASE = re.compile(r"\banswer(?:\s+is)?\s*:?\s*([A-Z])\b", re.IGNORECASE)


def parse_answer(reply: str, options: int) -> str | None:
    """The letter that an extractor's reply names, or None for "not sure yet".

    The first parenthesised letter counts; else one that the reply begins with, as a label; else one after "answer
    is". A letter beyond the options does not count, nor does a reply that says "not sure" before it names one.
    """
    valid = LETTERS[:options]
    unsure = reply.lower().find("not sure")
    for pattern in (_PARENTHESISED, _LABEL, _PHRASE):
        for match in pattern.finditer(reply):
            letter = match[1].upper()
            if letter in valid:
                return None if 0 <= unsure < match.start() else letter
    return None


def agreed_answer(turns: Sequence[Turn]) -> str | None:
    """The letter on which the latest valid answers of two different agents agree, or None."""
    latest = {turn.agent: turn.answer for turn in turns if turn.answer is not None}
    letters = set(latest.values())
    return letters.pop() if len(latest) == 2 and len(letters) == 1 else None
