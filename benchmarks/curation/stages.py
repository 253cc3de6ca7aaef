"""What is asked of the model and what its answers mean: one text for all systems that are compared.

Only the standard library is imported here, since Ray has an environment of its own.
"""

from __future__ import annotations

from typing import Any

MODEL = "curation"
STAGES = ("filter", "score", "question")
SUCCESS = "success"
REASONS = ("filter_by_en", "filter_by_classifier", "filter_by_score", "no_boxed_answer")
"""Why a page ends without success."""

TEMPERATURE = 0.7
MAX_TOKENS = 4096
PAGE_CHARS = 24_000
"""A longer page is cut, to fit into the model's context."""
LOWEST_SCORE = 3

_ASKED = {
    "filter": "Name the language of the page as ISO code, then yes or no: does it hold reasoning worth a question?",
    "score": "Rate from 1 to 5 how much reasoning a question about the page can take. Argue, then end with Score: N.",
    "question": "Write a hard question that the page answers, solve it step by step, and put the answer in \\boxed{}.",
}


def messages(stage: str, page: str) -> list[dict[str, str]]:
    """The prompt of a stage."""
    return [{"role": "system", "content": _ASKED[stage]}, {"role": "user", "content": page[:PAGE_CHARS]}]


def body(stage: str, page: str) -> dict[str, Any]:
    """The request of a stage, for those who write it themselves."""
    return {
        "model": MODEL,
        "messages": messages(stage, page),
        "temperature": TEMPERATURE,
        "max_tokens": MAX_TOKENS,
    }


def stage_of(system: str) -> str:
    """Which stage asks so."""
    return next(stage for stage, asked in _ASKED.items() if asked == system)


def judge(stage: str, answer: str) -> str:
    """How the page ends with this answer; empty: it goes on to the next stage. Raises `ValueError` for nonsense."""
    if stage == "filter":
        language, _, worth = answer.partition(" ")
        if worth not in {"yes", "no"}:
            raise ValueError(f"the filter said {answer[:80]!r}")
        return "filter_by_en" if language != "en" else "filter_by_classifier" if worth == "no" else ""
    if stage == "score":
        return "filter_by_score" if int(answer.rpartition("Score: ")[2]) < LOWEST_SCORE else ""
    return SUCCESS if "\\boxed{" in answer else "no_boxed_answer"
