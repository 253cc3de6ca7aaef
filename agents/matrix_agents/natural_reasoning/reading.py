"""Reading what models say, and cutting what they are shown. Pure."""

from __future__ import annotations

import difflib
import re

from .state import CATEGORIES

_AROUND = " \t\r\n\"'`*_.!()[]"
_BOXED = re.compile(r"\\boxed\s*\{")


def says_yes(reply: str) -> bool:
    """Whether a reply is Yes; anything but that word, with marks around it or not, is none."""
    return reply.strip(_AROUND).lower() == "yes"


def last_boxed(text: str) -> str:
    r"""What stands in the last `\boxed{…}` that is closed and not empty, braces within it included; else nothing."""
    for begin in reversed(list(_BOXED.finditer(text))):
        depth, at = 1, begin.end()
        while at < len(text) and depth:
            if text[at] == "\\":
                at += 1  # an escaped brace is a character
            elif text[at] in "{}":
                depth += 1 if text[at] == "{" else -1
            at += 1
        found = text[begin.end() : at - 1].strip()
        if not depth and found:
            return found
    return ""


def category_of(text: str) -> str:
    """The category that is meant; `Other` where none is."""
    names = {name.lower(): name for name in CATEGORIES}
    near = difflib.get_close_matches(text.strip().lower(), names, n=1, cutoff=0.8)
    return names[near[0]] if near else "Other"


def beginning(text: str, most: int) -> str:
    """The beginning of a text, at most so many characters, to the end of a paragraph, a line or a word near there."""
    if len(text) <= most:
        return text
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, most * 9 // 10, most)
        if end > 0:
            return text[:end]
    return text[:most]
