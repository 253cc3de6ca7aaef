"""Coral without a broker and without a model: parsing, agreement, prompts and routes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import matrix_bus as mb
from matrix_agents.coral import flow
from matrix_agents.coral.answers import agreed_answer, parse_answer
from matrix_agents.coral.prompts import conversation, extraction, question_text
from matrix_agents.coral.state import LETTERS, CoralConfig, Discussion, Turn
from matrix_bus import dataset
from matrix_bus.agent import load_workflow
from matrix_bus.orchestrator import RowMessage, admit, advance, finish

QUESTIONS = Path(__file__).parents[2] / "agents" / "matrix_agents" / "coral" / "questions.jsonl"
MMLU_PRO = Path(__file__).parents[3] / "shared" / "data" / "mmlu_pro_test.jsonl.zst"


@pytest.mark.parametrize(
    ("reply", "options", "letter"),
    [
        ("(C)", 4, "C"),
        ("The answer is (B) Osaka.", 4, "B"),
        ("( D )", 4, "D"),
        ("B", 4, "B"),
        (" b. ", 4, None),
        ("C) Earth", 4, "C"),
        ("A: twelve", 4, "A"),
        ("The answer is D", 4, "D"),
        ("Answer: A", 4, "A"),
        ("The answer is **C**.", 4, "C"),
        ("B\n\nIts author chooses Osaka.", 4, "B"),
        ("answer: a", 4, None),
        ("The answer is a prime number.", 4, None),
        ("The answer a student would give", 4, None),
        ("The answer I would choose is unclear.", 10, None),
        ("not sure yet", 4, None),
        ("Not sure yet, perhaps (A)", 4, None),
        ("(B), though I was not sure at first", 4, "B"),
        ("(E)", 4, None),
        ("(E) or rather (B)", 4, "B"),
        ("A hexagon has six sides.", 4, None),
        ("", 4, None),
        ("(J)", 10, "J"),
    ],
)
def test_parses_what_extractors_say(reply: str, options: int, letter: str | None) -> None:
    assert parse_answer(reply, options) == letter


WORDS = st.sampled_from(
    ["The answer is", "answer:", "(", ")", ".", "\n", " ", "not sure yet", "A", "B", "J", "a", "**"]
)


@given(st.text() | st.lists(WORDS).map("".join), st.integers(2, 10))
def test_parsing_never_invents_an_option(reply: str, options: int) -> None:
    letter = parse_answer(reply, options)
    assert letter is None or (letter in "ABCDEFGHIJ"[:options] and letter in reply)


@given(st.integers(2, 26), st.data())
def test_the_form_that_is_asked_for_is_always_read(options: int, data: st.DataObject) -> None:
    letter = data.draw(st.sampled_from(LETTERS[:options]))
    assert parse_answer(f"({letter})", options) == letter
    assert parse_answer(f"The answer is ({letter}).", options) == letter


@given(st.lists(st.sampled_from(["A", "B", "C", None]), max_size=20))
def test_agreement_is_that_of_the_last_letters_of_each(answers: list[str | None]) -> None:
    turns = [Turn(("solver", "reviewer")[i % 2], "", answer) for i, answer in enumerate(answers)]
    mine, other = ([a for a in answers[start::2] if a is not None] for start in (0, 1))
    expected = mine[-1] if mine and other and mine[-1] == other[-1] else None
    assert agreed_answer(turns) == expected


def test_agreement_takes_the_latest_valid_answers_of_both() -> None:
    s, r = "solver", "reviewer"
    assert agreed_answer([Turn(s, "", "A")]) is None
    assert agreed_answer([Turn(s, "", "A"), Turn(r, "", "B")]) is None
    assert agreed_answer([Turn(s, "", "A"), Turn(r, "", "A")]) == "A"
    assert agreed_answer([Turn(s, "", "A"), Turn(r, "", "B"), Turn(s, "", "B")]) == "B"
    # Not sure yet: the agent's earlier answer still stands.
    assert agreed_answer([Turn(s, "", "A"), Turn(r, "", None), Turn(s, "", "B"), Turn(r, "", "B")]) == "B"
    assert agreed_answer([Turn(s, "", "A"), Turn(s, "", "A")]) is None


def test_a_conversation_only_ever_grows_at_its_end() -> None:
    state = Discussion(question="What?", options=["one", "two"])
    earlier: dict[str, list[mb.Message]] = {}
    for number in range(6):
        agent = ("solver", "reviewer")[number % 2]
        messages = conversation(agent, state)
        before = earlier.get(agent, [])
        assert messages[: len(before)] == before
        assert [m.role for m in messages[1:]] == ["user", "assistant"] * (number // 2) + ["user"]
        earlier[agent] = messages
        state.coral_turns.append(Turn(agent, f"message {number}"))


def test_agents_see_the_options_and_never_the_right_answer() -> None:
    state = Discussion(question="What?", options=["one", "two"], answer="B")
    assert question_text(state) == "What?\n(A) one\n(B) two"
    blind = Discussion(question="What?", options=["one", "two"])
    assert conversation("solver", state) == conversation("solver", blind)


def test_the_extractor_is_asked_about_the_message_alone() -> None:
    assert "I say two" in str(extraction(Turn("solver", "I say two"))[-1].content)


LINE = b'{"question": "2+2?", "options": ["3", "4"], "answer": "B", "category": "math"}'


class Script:
    """Stands in for a model: says its lines in order."""

    def __init__(self, replies: Sequence[str]) -> None:
        self._replies = list(replies)

    async def chat(self, messages: Sequence[mb.Message]) -> mb.Reply:
        assert messages[0].role == "system"
        return mb.Reply(text=self._replies.pop(0), finish_reason="stop", model="script", endpoint="none")


async def discuss(
    replies: Sequence[str], max_turns: int = 20, line: bytes = LINE
) -> tuple[list[str], mb.OutcomeRecord, Discussion]:
    """The path of one row, with its state going through its wire form at every hop."""
    row = RowMessage(input=msgspec.Raw(line), id="0", seed=1, submitted_at=0.0)
    message = admit(row, "r", 0, flow.start, msgspec.json.encode(flow.begin(line)), 0.0)
    llm, path = Script(replies), []
    while True:
        role = flow.roles[message.role]
        path.append(message.role)
        state = flow.decode_state(message.state)
        assert msgspec.json.encode(state) == message.state
        arguments = {n: llm if k is mb.LLM else CoralConfig(max_turns) for n, k in role.parameters}
        result = await role.handler(mb.Row(message, state), **arguments)
        message.state = msgspec.json.encode(state)
        if isinstance(result, mb.Outcome):
            return path, finish(message, flow.name, 1, result.kind, result.reason, 1.0), state
        message = advance(message, result.role)


async def test_a_discussion_goes_on_until_both_agree() -> None:
    path, outcome, state = await discuss(["I say A", "(A)", "No, B", "(B)", "Right, B", "(B)"])
    half = ["extractor", "matcher"]
    assert path == ["solver", *half, "reviewer", *half, "solver", *half]
    assert (outcome.kind, outcome.reason, state.coral_agreed) == ("success", "agreement", "B")
    assert [(turn.agent, turn.answer) for turn in state.coral_turns] == [
        ("solver", "A"),
        ("reviewer", "B"),
        ("solver", "B"),
    ]
    assert flow.measure(outcome) == {"agreement": 1.0, "turns": 3.0, "agreement_correct": 1.0}


async def test_agreement_on_a_wrong_answer_is_a_success_that_is_not_correct() -> None:
    path, outcome, state = await discuss(["I say A", "(A)", "A too", "(A)"])
    assert path == ["solver", "extractor", "matcher", "reviewer", "extractor", "matcher"]
    assert (outcome.kind, outcome.reason, state.coral_agreed) == ("success", "agreement", "A")
    assert flow.measure(outcome) == {"agreement": 1.0, "turns": 2.0, "agreement_correct": 0.0}


async def test_without_a_gold_answer_correctness_is_left_out() -> None:
    _, outcome, _ = await discuss(["A", "(A)", "A", "(A)"], line=b'{"question": "2+2?", "options": ["3", "4"]}')
    assert flow.measure(outcome) == {"agreement": 1.0, "turns": 2.0}


async def test_an_answer_stands_while_its_agent_is_not_sure() -> None:
    path, outcome, _ = await discuss(["B", "(B)", "hm", "not sure yet", "hm", "not sure yet", "B", "(B)"])
    assert path.count("matcher") == 4
    assert outcome.kind == "success"


async def test_a_discussion_without_agreement_ends_after_max_turns() -> None:
    path, outcome, state = await discuss(["A", "(A)", "hm", "not sure yet", "A", "(A)"], max_turns=3)
    assert path.count("matcher") == 3
    assert (outcome.kind, outcome.reason, state.coral_agreed) == ("filtered", "no_agreement", None)
    assert flow.measure(outcome) == {"agreement": 0.0, "turns": 3.0}


async def test_agreement_in_the_last_turn_counts() -> None:
    _, outcome, _ = await discuss(["B", "(B)", "B", "(B)"], max_turns=2)
    assert outcome.kind == "success"


def test_a_question_with_options_is_enough_and_other_fields_are_left_alone() -> None:
    assert flow.begin(b'{"question": "q", "options": ["a", "b"]}') == Discussion(question="q", options=["a", "b"])
    line = b'{"question": "q", "options": ["a", "b"], "turns": 7, "agreed": true, "history": [], "extra": {}}'
    assert flow.begin(line) == Discussion(question="q", options=["a", "b"])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"question": "q"}', "options"),
        (b'{"question": "q", "options": ["a"]}', "length >= 2"),
        (b'{"question": "q", "options": %s}' % json.dumps(["o"] * 27).encode(), "length <= 26"),
        (b'{"question": "q", "options": ["a", "b"], "answer": "C"}', "one of AB, not 'C'"),
        (b'{"question": "q", "options": ["a", "b"], "answer": ""}', "one of AB, not ''"),
        (b'{"question": "q", "options": ["a", "b"], "answer": "AB"}', "one of AB, not 'AB'"),
    ],
)
def test_a_line_that_could_only_be_misread_is_refused(line: bytes, told: str) -> None:
    with pytest.raises(mb.MatrixBusError, match=told):
        flow.begin(line)


def test_max_turns_must_leave_room_for_both() -> None:
    with pytest.raises(mb.MatrixBusError, match=r"workflow\.max_turns.*>= 2"):
        flow.parse_config({"max_turns": 1})


def test_it_is_installed_and_its_routes_hold() -> None:
    assert load_workflow("coral") is flow
    assert {name: set(role.routes.roles) for name, role in flow.roles.items()} == {
        "solver": {"extractor"},
        "reviewer": {"extractor"},
        "extractor": {"matcher"},
        "matcher": {"solver", "reviewer"},
    }
    assert [name for name, role in flow.roles.items() if not role.wants_model] == ["matcher"]
    assert len(flow.code_hash) == 16


def test_the_questions_are_well_formed() -> None:
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    assert len(rows) == 24
    assert len({row["question"] for row in rows}) == 24
    assert [row["question_id"] for row in rows] == list(range(1, 25))
    for row in rows:
        assert row.keys() == {"question_id", "question", "options", "answer", "answer_index", "category"}
        assert len(set(row["options"])) == 4
        assert row["answer"] == "ABCD"[row["answer_index"]]
    assert set(Counter(row["answer"] for row in rows).values()) == {6}


@pytest.mark.skipif(not MMLU_PRO.exists(), reason="the MMLU-Pro test set is not beside the checkout")
def test_every_mmlu_pro_question_fits() -> None:
    lines = list(dataset.read(str(MMLU_PRO)))
    assert len(lines) == 12_032
    for line in lines:
        assert isinstance(line, dataset.Line)
        state = flow.begin(line.body)
        assert 2 <= len(state.options) <= 10
        assert state.answer is not None
        assert state.answer in "ABCDEFGHIJ"[: len(state.options)]
