"""Coral without a broker and without a model: parsing, agreement, prompts and routes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import matrix_bus as mb
from matrix_agents.coral import flow
from matrix_agents.coral.answers import agreed_answer, parse_answer
from matrix_agents.coral.prompts import conversation, extraction, question_text
from matrix_agents.coral.state import CoralConfig, Discussion, Turn
from matrix_bus import dataset
from matrix_bus.agent import load_workflow
from matrix_bus.orchestrator import RowMessage, admit, advance

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
        ("answer: a", 4, "A"),
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


@given(st.text(), st.integers(2, 10))
def test_parsing_never_invents_an_option(reply: str, options: int) -> None:
    letter = parse_answer(reply, options)
    assert letter is None or letter in "ABCDEFGHIJ"[:options]


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


class Script:
    """Stands in for a model: says its lines in order."""

    def __init__(self, replies: Sequence[str]) -> None:
        self._replies = list(replies)

    async def chat(self, messages: Sequence[mb.Message]) -> mb.Reply:
        assert messages[0].role == "system"
        return mb.Reply(text=self._replies.pop(0), finish_reason="stop", model="script", endpoint="none")


async def discuss(replies: Sequence[str], max_turns: int = 20) -> tuple[list[str], mb.Outcome, Discussion]:
    """The path of one row, with its state going through its wire form at every hop."""
    line = b'{"question": "2+2?", "options": ["3", "4"], "answer": "B", "category": "math"}'
    row = RowMessage(input=msgspec.Raw(line), id="0", seed=1, submitted_at=0.0)
    message = admit(row, "r", 0, flow.start, msgspec.json.encode(flow.begin(line)), 0.0)
    llm, path = Script(replies), []
    while True:
        role = flow.roles[message.role]
        path.append(message.role)
        state = flow.decode_state(message.state)
        arguments = {n: llm if k is mb.LLM else CoralConfig(max_turns) for n, k in role.parameters}
        result = await role.handler(mb.Row(message, state), **arguments)
        message.state = msgspec.json.encode(state)
        if isinstance(result, mb.Outcome):
            return path, result, state
        message = advance(message, result.role)


async def test_a_discussion_goes_on_until_both_agree() -> None:
    path, outcome, state = await discuss(["I say A", "(A)", "No, B", "(B)", "Right, B", "(B)"])
    half = ["extractor", "matcher"]
    assert path == ["solver", *half, "reviewer", *half, "solver", *half]
    assert (outcome.kind, outcome.reason, state.coral_agreed) == ("success", "agreement", "B")
    assert flow.measure(_record(state)) == {"agreement": 1.0, "turns": 3.0, "agreement_correct": 1.0}


async def test_a_discussion_without_agreement_ends_after_max_turns() -> None:
    path, outcome, state = await discuss(["A", "(A)", "hm", "not sure yet", "A", "(A)"], max_turns=3)
    assert path.count("matcher") == 3
    assert (outcome.kind, outcome.reason, state.coral_agreed) == ("filtered", "no_agreement", None)
    assert flow.measure(_record(state)) == {"agreement": 0.0, "turns": 3.0}


def _record(state: Discussion) -> Any:
    class Record:
        input = msgspec.Raw(b"{}")

    Record.state = msgspec.Raw(msgspec.json.encode(state))  # type: ignore[attr-defined]
    return Record


def test_max_turns_must_leave_room_for_both() -> None:
    with pytest.raises(mb.MatrixBusError, match="at least 2"):
        flow.parse_config({"max_turns": 1})


def test_it_is_installed_and_its_routes_hold() -> None:
    assert load_workflow("coral") is flow
    assert len(flow.code_hash) == 16


def test_the_questions_are_well_formed() -> None:
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    assert len(rows) == 24
    assert len({row["question"] for row in rows}) == 24
    for row in rows:
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
