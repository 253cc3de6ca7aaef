"""The roles of natural reasoning and their endings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

import matrix_bus as mb

from . import prompts
from .language import LanguageDetector, given_english
from .reading import beginning, category_of, last_boxed, says_yes
from .state import Extracted, Page, PageConfig, Scores

T = TypeVar("T")
_LEAST_CHARS = 200
"""A page that does not fit into a context when it is this short is not what fills it."""

flow = mb.Workflow(
    "natural_reasoning",
    state=Page,
    start="filter",
    config=PageConfig,
    quick={
        "workflow.max_page_chars": 1500,
        "roles.score.max_tokens": 192,
        "roles.question.max_tokens": 192,
    },
)


@flow.resource
def detector() -> LanguageDetector:
    """One for all pages of a worker."""
    return LanguageDetector()


# Sampling as in §5.2 of the paper.
@flow.role(name="filter", sampling=mb.Sampling(temperature=1.0, top_p=0.95, max_tokens=8))
async def filter_page(
    row: mb.Row[Page], llm: mb.LLM, languages: LanguageDetector, config: PageConfig
) -> mb.Next | mb.Outcome:
    """Ends what is not English without asking a model, and what a model finds of no use."""
    state, text = row.state, await _page(row)
    state.text = mb.Large("")
    state.nr_page_chars = len(text)
    given = given_english(state)
    state.nr_english = languages.english(text) if given is None else given
    if state.nr_english < config.min_english:
        return mb.filtered("filter_by_en")
    reply = await _fitting(row, text, config, lambda page: llm.chat(prompts.filtering(page)))
    if not says_yes(reply.text):
        return mb.filtered("filter_by_classifier")
    return mb.to("score")


@flow.role(sampling=mb.Sampling(temperature=0.2, top_p=0.9, max_tokens=10_240))
async def score(row: mb.Row[Page], llm: mb.LLM, config: PageConfig) -> mb.Next | mb.Outcome:
    """Judges the page by four criteria; all of them must be above 0."""
    text = await _page(row)
    try:
        found = await _fitting(row, text, config, lambda page: llm.parse(prompts.scoring(page), Scores))
    except mb.StructureInvalid:
        return mb.filtered("filter_by_score_wo_json")
    row.state.nr_scores = found
    if found.least <= 0:
        return mb.filtered("filter_by_score")
    return mb.to("question")


@flow.role(sampling=mb.Sampling(temperature=0.0, top_p=0.9, max_tokens=20_480))
async def question(row: mb.Row[Page], llm: mb.LLM, config: PageConfig) -> mb.Outcome:
    """Writes a question from the page, and has it answered without the page."""
    state, text = row.state, await _page(row)
    try:
        found = await _fitting(row, text, config, lambda page: llm.parse(prompts.questioning(page), Extracted))
    except mb.StructureInvalid:
        return mb.filtered("filter_by_question_wo_json")
    state.nr_extracted = msgspec.structs.replace(found, category=category_of(found.category))
    if not found.question.strip():
        return mb.filtered("filter_by_no_question")
    if not found.answer.strip():
        return mb.filtered("filter_by_no_answer")
    state.nr_answer = (await llm.chat(prompts.solving(found.question))).text
    state.nr_boxed = last_boxed(state.nr_answer)
    if not state.nr_boxed:
        return mb.filtered("filter_by_no_boxed_answer")
    return mb.success()


async def _page(row: mb.Row[Page]) -> str:
    text: str = (await row.input())["text"]
    return text


async def _fitting(row: mb.Row[Page], text: str, config: PageConfig, ask: Callable[[str], Awaitable[T]]) -> T:
    """Asks about the beginning of the page, and about half of it again as long as the model's context is too short."""
    most = min(config.max_page_chars, row.state.nr_kept_chars or len(text))
    while True:
        page = beginning(text, most)
        row.state.nr_kept_chars = len(page)
        try:
            return await ask(page)
        except mb.ContextLengthExceeded:
            if len(page) <= _LEAST_CHARS:
                raise
            most = max(_LEAST_CHARS, len(page) // 2)


@flow.metrics
def measure(state: Page, _: Any) -> Mapping[str, float]:
    """How many pages came through; of those that were shown to a model, how many were cut."""
    measured = {"survived": float(bool(state.nr_boxed))}
    if state.nr_kept_chars:
        measured["cut"] = float(state.nr_kept_chars < state.nr_page_chars)
    return measured


@flow.messages
def lesson(state: Page, _: Any) -> Sequence[mb.Message]:
    """The question and its answer, step by step."""
    if state.nr_extracted is None or not state.nr_boxed:
        return []
    return [mb.user(state.nr_extracted.question), mb.assistant(state.nr_answer)]
