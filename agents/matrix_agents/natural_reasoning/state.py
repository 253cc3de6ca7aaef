"""What a page carries from role to role, and what the models are asked to answer."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

import matrix_bus as mb

Share = Annotated[float, Meta(ge=0, le=1)]
Score = Annotated[int, Meta(ge=0, le=5)]

CATEGORIES = (
    "Mathematics",
    "Physics",
    "Chemistry",
    "Biology",
    "Medicine",
    "Computer Science",
    "Engineering",
    "Earth and Space Science",
    "Economics",
    "Business",
    "Law",
    "History",
    "Philosophy",
    "Psychology",
    "Political and Social Science",
    "Language and Literature",
    "Other",
)


class Scores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A page by four criteria, 0 for none of it to 5. The analysis comes first: what follows should rest on it."""

    analysis: str
    completeness: Score
    difficulty: Score
    technical_correctness: Score
    reasoning: Score

    @property
    def least(self) -> int:
        """The lowest of the four."""
        return min(self.completeness, self.difficulty, self.technical_correctness, self.reasoning)


class Extracted(msgspec.Struct, frozen=True):
    """An exam question that a page gives rise to; empty texts for what it does not have."""

    question: str
    category: str
    answer: str
    """As the page has it."""


class Page(mb.State):
    """A web page, and what became of it."""

    text: mb.Large[str]
    """Emptied at the first role, so that the page travels once: it stays in the row's input."""
    language_id_whole_page_fasttext: dict[str, Share] | None = None
    """Language to probability, as DCLM's pages have it."""
    language: str | None = None
    """With `language_score`, as other corpora have it: the likeliest language, such as `en`."""
    language_score: Share | None = None
    nr_english: float | None = None
    """Probability that the page is English, given or detected."""
    nr_page_chars: int = 0
    nr_kept_chars: int = 0
    """So many characters of its beginning were shown to the models: fewer where it was cut to fit."""
    nr_scores: Scores | None = None
    nr_extracted: Extracted | None = None
    nr_answer: str = ""
    """The independent answer, step by step."""
    nr_boxed: str = ""
    """What it ends in, from its last `\\boxed{}`."""


class PageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`workflow.<name>=value`."""

    min_english: Share = 0.8
    """Pages that are less probably English end as `filter_by_en`."""
    max_page_chars: Annotated[int, Meta(ge=200)] = 40_000
    """A longer page is cut to its beginning: 10 000 tokens or so, which with the longest answer, 20 480 tokens, fits
    into a context of 32 768."""
