"""What the hop benchmark counts in the reference's output, and which outputs it does not believe."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.reference import examine

TURN = [["teacher", "answer_extractor", "answer_matcher"], ["student", "answer_extractor", "answer_matcher"]]


def row(n: int, turns: int = 2) -> dict[str, Any]:
    """A sound row of its output: the question, then hops until the matcher agrees."""
    history: list[dict[str, Any]] = [{"agent": "student", "response": {"text": "a question"}}]
    for turn in range(turns):
        speaker, extractor, matcher = TURN[turn % 2]
        history += [
            {"agent": speaker, "response": {"status_ok": True, "text": "x" * 1000}},
            {"agent": extractor, "response": {"status_ok": True, "text": "(A)"}},
            {
                "agent": matcher,
                "response": {"status_ok": True, "agreement": turn == turns - 1, "rated_turns": turn + 1},
            },
        ]
    return {"id": n, "history": history, "creation_timestamp": 100.0 + n, "finish_timestamp": 110.0 + n}


def written(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in rows).encode()


def test_hops_are_counted_without_the_question() -> None:
    found = examine(written(row(0), row(1, turns=3)), 2)
    assert (found.hops, found.rows, found.seconds, found.problems) == (15, 2, 11.0, [])
    assert found.hops_per_s == pytest.approx(15 / 11)


def test_rows_that_are_missing_or_twice_are_told() -> None:
    assert "1 rows, 1 distinct, of 2" in examine(written(row(0)), 2).problems[0]
    assert "2 rows, 1 distinct, of 2" in examine(written(row(0), row(0)), 2).problems[0]


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("history", 4, "response", "status_ok"), False, "1 of 6 hops failed"),
        (("history", 2, "agent"), "student", "an unexpected route"),
        (("history", 1, "response", "text"), "", "an answer of the wrong length"),
        (("history", 6, "response", "agreement"), False, "ended against its matcher"),
        (("history", 3, "response", "agreement"), True, "ended against its matcher"),
        (("history", 6, "response", "rated_turns"), 3, "turns lost"),
        (("history",), [], "no hops"),
        (("error",), "died", "died"),
    ],
)
def test_a_row_that_did_not_make_its_way_is_told(path: tuple[Any, ...], value: object, problem: str) -> None:
    wrong = row(1)
    *steps, last = path
    part: Any = wrong
    for step in steps:
        part = part[step]
    part[last] = value
    (found,) = examine(written(row(0), wrong), 2).problems
    assert found.startswith("reference: row 1: ") and problem in found


def test_a_line_cut_short_is_told() -> None:
    found = examine(written(row(0), row(1))[:-20], 2)
    assert len(found.problems) == 2 and "line 2" in found.problems[0]


def test_an_output_without_hops_is_no_measurement() -> None:
    failed = {"id": 0, "history": [], "creation_timestamp": 1.0, "finish_timestamp": 2.0}
    with pytest.raises(SystemExit, match="made no hops"):
        examine(written(failed), 1)
    with pytest.raises(SystemExit, match="made no hops"):
        examine(b"", 1)
