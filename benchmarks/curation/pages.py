"""Made-up pages, and what the simulated model says about each: both follow from the seed and the text alone."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import msgspec
from msgspec import Struct

from .stages import MAX_TOKENS, PAGE_CHARS, REASONS, SUCCESS, stage_of

_SHARES = (0.0368, 0.9024, 0.0044, 0.0019)
"""Of the reasons why pages end (arXiv 2511.21686, section 5.2); the rest, 5.45 %, succeeds."""
_PAGE_MEDIAN_CHARS, _PAGE_SIGMA = 4400, 1.0
_SHORTEST_PAGE, _LONGEST_PAGE = 200, 200_000
_LENGTHS_ENV = "CURATION_LENGTHS"
_CHARS_PER_TOKEN = 4


class Lengths(Struct, frozen=True):
    """Tokens that the model says: lognormal, median and sigma of the logarithm, cut at `MAX_TOKENS`."""

    score_median: float = 250.0
    score_sigma: float = 0.6
    question_median: float = 600.0
    question_sigma: float = 1.0

    def environ(self) -> dict[str, str]:
        """For the process of an endpoint, where `respond` finds them."""
        return {_LENGTHS_ENV: msgspec.json.encode(self).decode()}


def write(path: Path, rows: int, seed: int) -> None:
    """The pages, as JSON lines with `id` and `page`."""
    with path.open("wb") as file:
        for n, page in enumerate(pages(rows, seed)):
            file.write(msgspec.json.encode({"id": f"p{n}", "page": page}) + b"\n")


def pages(rows: int, seed: int) -> Iterator[str]:
    """Texts of a lognormal length; no two are the same."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeinorstlumcd", k=draw.randint(2, 9))) for _ in range(500)]
    book = " ".join(draw.choices(words, k=60_000))
    for n in range(rows):
        length = round(_PAGE_MEDIAN_CHARS * draw.lognormvariate(0, _PAGE_SIGMA))
        begin = draw.randrange(1000)
        body = book[begin : begin + min(max(length, _SHORTEST_PAGE), _LONGEST_PAGE)]
        yield f"Page {n} of {seed}. {body}"


def fate(page: str) -> str:
    """How the page ends: one of `REASONS`, or success."""
    drawn, below = _draws(page[:PAGE_CHARS])[0], 0.0
    for reason, share in zip(REASONS, _SHARES, strict=True):
        below += share
        if drawn < below:
            return reason
    return SUCCESS


def expected(rows: int, seed: int) -> dict[str, int]:
    """How many of the pages end how."""
    return dict(Counter(map(fate, pages(rows, seed))))


def respond(request: dict[str, Any]) -> str:
    """The answer of a simulated endpoint."""
    system, user = request["messages"]
    stage, page = stage_of(system["content"]), user["content"]
    end = fate(page)
    lengths = _lengths()
    _, score, question = _draws(page)
    if stage == "filter":
        return "de yes" if end == "filter_by_en" else "en no" if end == "filter_by_classifier" else "en yes"
    if stage == "score":
        rating = " Score: 1" if end == "filter_by_score" else " Score: 4"
        return _said(lengths.score_median, lengths.score_sigma, score, rating)
    boxed = " Answer: 42" if end == "no_boxed_answer" else " \\boxed{42}"
    return _said(lengths.question_median, lengths.question_sigma, question, boxed)


def _draws(page: str) -> tuple[float, float, float]:
    """Three numbers in (0, 1) that follow from the text."""
    digest = hashlib.blake2b(page.encode(), digest_size=18).digest()
    a, b, c = (int.from_bytes(digest[at : at + 6], "big") for at in (0, 6, 12))
    return (a + 0.5) / 2**48, (b + 0.5) / 2**48, (c + 0.5) / 2**48


def _said(median: float, sigma: float, drawn: float, end: str) -> str:
    tokens = median * 2.718281828459045 ** (sigma * NormalDist().inv_cdf(drawn))
    chars = min(max(round(tokens), 8), MAX_TOKENS) * _CHARS_PER_TOKEN
    return _TALK[: chars - len(end)] + end


@cache
def _lengths() -> Lengths:
    return msgspec.json.decode(os.environ.get(_LENGTHS_ENV, "{}"), type=Lengths)


_TALK = "If so, then the next step follows from the text, and nothing else does. " * 300
