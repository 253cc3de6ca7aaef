"""From an extractor's reply to an answer letter, and from the turns to agreement. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .state import LETTERS, Turn

_PARENTHESISED = re.compile(r"\(\s*([A-Z])\s*\)")
_LABEL = re.compile(r"^\W*([A-Z])(?:[).:]|[^\w\n]*(?:\n|$))")
_PHRASE = re.compile(r"(?i:\banswer(?:\s+is|\s*:))[\s:*]*([A-Z])\b")


def parse_answer(reply: str, options: int) -> str | None:
    """The letter that an extractor's reply names, or None for "not sure yet".

    The first parenthesised letter counts; else one that the reply begins with, as a label or alone on its line; else
    one after "answer is" or "answer:". A small letter does not count ("the answer is a guess"), nor one beyond the
    options, nor a reply that says "not sure" before it names one: a letter too few costs a turn, one too many may
    make an agreement that never was.
    """
    valid = LETTERS[:options]
    unsure = reply.lower().find("not sure")
    for pattern in (_PARENTHESISED, _LABEL, _PHRASE):
        for match in pattern.finditer(reply):
            letter = match[1]
            if letter in valid:
                return None if 0 <= unsure < match.start() else letter
    return None


def agreed_answer(turns: Sequence[Turn]) -> str | None:
    """The letter on which the latest valid answers of two different agents agree, or None."""
    latest = {turn.agent: turn.answer for turn in turns if turn.answer is not None}
    letters = set(latest.values())
    return letters.pop() if len(latest) == 2 and len(letters) == 1 else None
