"""Estimates from a sample: what must follow from the model of the servers, whatever its numbers."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from matrix_bus import system, user
from matrix_bus.errors import UsageError
from matrix_bus.llm import Call as RecordedCall
from matrix_bus.orchestrator import RowMessage, admit, encode, finish
from matrix_serving.plan import Call, estimate, read_sample
from matrix_serving.simulator import Profile, load_profile


def profile(**more: object) -> Profile:
    plain = {
        "name": "test",
        "source": "made up",
        "prefill_tokens_per_s": 10_000.0,
        "base_s": 0.02,
        "per_seq_s": 0.001,
        "max_num_seqs": 16,
        "max_model_len": 4096,
        "kv_cache_tokens": 65_536,
    }
    return msgspec.convert({**plain, **more}, Profile)


ROW = [Call(100, 50, ()), Call(200, 50, ())]


def test_one_row_alone_takes_what_its_calls_take() -> None:
    found = estimate([ROW], profile(), replicas=1, rows=1, in_flight=1)
    # Two prompts, and 49 decode steps each after the token that comes with the prompt.
    assert found.hours * 3600 == pytest.approx(300 / 10_000 + 2 * 49 * 0.021, rel=0.05)
    assert (found.calls_per_row, found.prompt_tokens_per_row, found.completion_tokens_per_row) == (2, 300, 100)


def test_what_must_hold_whatever_the_numbers() -> None:
    def rate(**more: int) -> float:
        return estimate([ROW], profile(), **{"replicas": 1, "rows": 400, "in_flight": 64, **more}).rows_per_s

    assert rate(in_flight=16) > 5 * rate(in_flight=1), "batching pays"
    assert rate(in_flight=64) == pytest.approx(rate(in_flight=16), rel=0.15), "up to the largest batch"
    assert rate(replicas=4, in_flight=64) == pytest.approx(4 * rate(in_flight=16), rel=0.15)


def test_a_long_run_is_extrapolated() -> None:
    short = estimate([ROW], profile(), replicas=1, rows=2000, in_flight=16)
    long = estimate([ROW], profile(), replicas=1, rows=200_000, in_flight=16)
    assert long.simulated_rows < 2000
    assert long.hours == pytest.approx(100 * short.hours, rel=0.05)


def test_only_what_rows_have_in_common_is_found_again() -> None:
    common, other = tuple(range(5)), (7, 8)
    sample = [[Call(112, 16, (*common, *(n * 100 + key for key in other)))] for n in range(1, 3)]
    found = estimate(sample, profile(), replicas=1, rows=100, in_flight=4)
    assert 0.6 < found.prefix_hit_share < 0.75, "five of seven blocks"


def test_too_long_for_the_servers() -> None:
    with pytest.raises(UsageError, match="about 5050 tokens, and profile 'test' takes 4096"):
        estimate([[Call(5000, 50, ())]], profile(), replicas=1, rows=1, in_flight=1)


def test_a_sample_is_read_from_outcomes(tmp_path: Path) -> None:
    message = admit(RowMessage(input=msgspec.Raw(b"{}"), id="0", seed=0, submitted_at=0.0), "r", 0, "a", b"{}", 0.0)
    chat = [system("s" * 80), user("u" * 40)]
    calls = [
        RecordedCall(role="a", model="m", messages=chat, text="x" * 100),
        RecordedCall(role="a", model="m", prefix=(0, 2), messages=[user("more")], text="y"),
    ]
    message.history = [msgspec.json.encode(call) for call in calls]
    path = tmp_path / "out.jsonl"
    path.write_bytes(encode(finish(message, "w", 1, "success", "", 1.0)) + b"\n")
    ((first, second),) = read_sample(path)
    assert (first.prompt_tokens, first.output_tokens, len(first.keys)) == (30, 25, 3)
    assert (second.prompt_tokens, second.output_tokens) == (31, 1)
    assert second.keys[0] == first.keys[0], "the prompts begin alike"
    assert estimate(read_sample(path), load_profile("embedded"), replicas=1, rows=10, in_flight=2).rows_per_s > 0
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="has no model calls"):
        read_sample(path)
