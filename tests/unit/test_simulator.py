"""The simulator's engine on a clock of its own: what continuous batching must do, whatever the load."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from matrix_bus.errors import ConfigError, DatasetError
from matrix_serving.simulator import PROFILES, Engine, Profile, Sequence, load_profile
from matrix_serving.simulator.answers import fit, lengths, prompt_hash, responder
from matrix_serving.simulator.engine import BLOCK_TOKENS, block_keys, count_tokens
from matrix_serving.simulator.failures import Failure, Failures


def profile(**changes: Any) -> Profile:
    numbers: dict[str, Any] = {
        "name": "test",
        "source": "made up for a test",
        "prefill_tokens_per_s": 1000.0,
        "base_s": 0.010,
        "per_seq_s": 0.001,
        "max_num_seqs": 8,
        "max_model_len": 512,
        "kv_cache_tokens": 8 * 512,
    }
    return Profile(**{**numbers, **changes})


class Clock:
    """Runs an engine to its end and checks in every step what must always hold."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.now_s = 0.0
        self.steps = 0
        self.most_running = 0
        self.first_token_s: dict[int, float] = {}
        self.finished_s: dict[int, float] = {}

    def step(self) -> bool:
        step_s = self.engine.begin()
        blocks = self.engine.blocks
        assert 0 <= blocks.used <= blocks.capacity
        assert 0 <= self.engine.cache_usage <= 1
        assert len(self.engine.running) <= self.engine.profile.max_num_seqs
        self.most_running = max(self.most_running, len(self.engine.running))
        if step_s is None:
            return False
        self.now_s += step_s
        self.steps += 1
        assert self.steps < 100_000, "it does not end"
        for sequence in self.engine.end():
            self.first_token_s.setdefault(id(sequence), self.now_s)
            if sequence.finished:
                self.finished_s[id(sequence)] = self.now_s
        return True

    def run(self, sequences: Iterable[Sequence]) -> Clock:
        for sequence in sequences:
            self.engine.submit(sequence)
        while self.step():
            pass
        return self


def rate(batch: int, settings: Profile) -> float:
    """Tokens a second with so many sequences, all there from the start."""
    clock = Clock(Engine(settings)).run([Sequence(1, 100) for _ in range(batch)])
    return clock.engine.generation_tokens / clock.now_s


def test_a_single_sequence_takes_what_the_profile_says() -> None:
    sequence = Sequence(200, 51)
    clock = Clock(Engine(profile())).run([sequence])
    assert clock.first_token_s[id(sequence)] == pytest.approx(0.2)
    assert clock.now_s == pytest.approx(0.2 + 50 * 0.011)


def test_throughput_grows_with_the_batch_up_to_the_maximum() -> None:
    rates = [rate(batch, profile()) for batch in (1, 2, 4, 8)]
    assert rates == sorted(set(rates))
    assert rate(16, profile()) == pytest.approx(rates[-1], rel=0.01)


def test_the_embedded_profile_gives_back_what_was_measured() -> None:
    embedded = PROFILES["embedded"]
    assert 1 / embedded.step_s(1, 0) == pytest.approx(85, rel=0.01)
    assert 16 / embedded.step_s(16, 0) == pytest.approx(180, rel=0.01)
    assert embedded.step_s(0, 325) == pytest.approx(1)


def test_those_beyond_the_maximum_wait_in_line() -> None:
    sequences = [Sequence(16, 10) for _ in range(20)]
    clock = Clock(Engine(profile(max_num_seqs=4))).run(sequences)
    assert clock.most_running == 4
    finished = [clock.finished_s[id(sequence)] for sequence in sequences]
    assert finished == sorted(finished)
    assert len(set(finished)) == 5


def test_a_long_prompt_is_computed_in_chunks_and_the_others_go_on() -> None:
    engine = Engine(profile(max_num_batched_tokens=64))
    talking = Sequence(1, 40)
    engine.submit(talking)
    clock = Clock(engine)
    clock.step()
    long = Sequence(400, 1)
    engine.submit(long)
    said = talking.generated
    while not long.generated:
        clock.step()
        said += 1
        assert talking.generated == said, "a step without its token"
    assert said > 400 // 64


def test_where_the_cache_is_full_the_youngest_is_preempted_and_finishes_all_the_same() -> None:
    old, young = Sequence(60, 100), Sequence(60, 100)
    clock = Clock(Engine(profile(max_model_len=160, kv_cache_tokens=208))).run([old, young])
    assert old.preemptions == 0
    assert young.preemptions >= 1
    assert clock.engine.preemptions == young.preemptions
    assert old.finished and young.finished
    assert clock.finished_s[id(old)] < clock.finished_s[id(young)]
    assert clock.engine.generation_tokens == 200
    assert clock.engine.prompt_tokens == 120
    assert clock.engine.blocks.used == 0


def test_who_is_preempted_waits_a_step_at_the_head_of_the_line() -> None:
    narrow = profile(max_model_len=160, kv_cache_tokens=208, max_num_seqs=2, max_num_batched_tokens=16)
    engine = Engine(narrow)
    old, young, third = Sequence(60, 100), Sequence(60, 100), Sequence(60, 100)
    for sequence in (old, young, third):
        engine.submit(sequence)
    while not engine.preemptions:
        engine.end()
        engine.begin()
    assert engine.running == [old]
    assert list(engine.waiting) == [young, third]
    engine.end()
    clock = Clock(engine).run([])
    assert clock.finished_s[id(young)] < clock.finished_s[id(third)]


def test_prompts_wait_for_room_in_the_cache() -> None:
    engine = Engine(profile(max_model_len=160, kv_cache_tokens=160))
    engine.submit(Sequence(100, 10))
    engine.submit(Sequence(100, 10))
    engine.begin()
    assert (len(engine.running), len(engine.waiting)) == (1, 1)


def keyed(prompt: list[str], answer: str) -> Sequence:
    return Sequence(sum(map(count_tokens, prompt)), count_tokens(answer), block_keys([*prompt, answer]))


def test_a_prompt_that_begins_like_an_earlier_one_is_computed_from_where_they_part() -> None:
    system = "s" * 64 * 10
    clock = Clock(Engine(profile()))
    first = keyed([system, "one question"], "an answer")
    clock.run([first])
    assert first.cached_tokens == 0
    before_s = clock.now_s
    second = keyed([system, "another question"], "an answer")
    clock.run([second])
    assert second.cached_tokens == 160
    assert clock.first_token_s[id(second)] - before_s == pytest.approx(0.004)
    assert (clock.engine.prefix_hits, clock.engine.prefix_queries) == (160, 163 + 164)


def test_the_next_turn_finds_the_answer_of_the_last_one() -> None:
    question, answer = "q" * 128, "a" * 256
    clock = Clock(Engine(profile())).run([keyed([question], answer)])
    following = keyed([question, answer, "and then?"], "so")
    clock.run([following])
    # the last token of an answer is said, not computed: its block stays incomplete
    assert following.cached_tokens == (128 + 256) // 4 - BLOCK_TOKENS


def test_the_same_prompt_again_computes_its_end() -> None:
    clock = Clock(Engine(profile())).run([keyed(["q" * 640], "a")])
    again = keyed(["q" * 640], "a")
    clock.run([again])
    assert again.cached_tokens == 160 - BLOCK_TOKENS


def test_what_was_not_used_for_long_makes_room() -> None:
    clock = Clock(Engine(profile(max_model_len=160, kv_cache_tokens=320)))
    for letter in "abc":
        clock.run([keyed([letter * 576], "yes")])
    partly, kept = keyed(["a" * 576], "yes"), keyed(["c" * 576], "yes")
    clock.run([partly])
    clock.run([kept])
    assert kept.cached_tokens == 128
    assert 0 < partly.cached_tokens < 128, "the end of a prefix goes before its beginning"


def test_a_cancelled_sequence_leaves_nothing_behind() -> None:
    engine = Engine(profile(max_num_seqs=1))
    running, waiting = Sequence(100, 100), Sequence(100, 100)
    engine.submit(running)
    engine.submit(waiting)
    engine.begin()
    engine.cancel(running)
    engine.cancel(waiting)
    assert engine.end() == []
    assert engine.begin() is None
    assert engine.blocks.used == 0


def test_without_time_a_step_says_everything() -> None:
    sequences = [Sequence(100, 500) for _ in range(50)]
    clock = Clock(Engine(PROFILES["instant"])).run(sequences)
    assert (clock.steps, clock.now_s) == (1, 0)
    assert clock.engine.generation_tokens == 50 * 500


def test_what_could_never_run_is_not_taken() -> None:
    with pytest.raises(ValueError, match="500"):
        Engine(profile()).submit(Sequence(500, 13))


@settings(deadline=None, max_examples=150)
@given(
    loads=st.lists(
        st.tuples(st.integers(0, 90), st.integers(1, 60), st.integers(0, 3), st.integers(0, 20)), max_size=25
    ),
    max_num_seqs=st.integers(1, 8),
    blocks=st.integers(10, 30),
    budget=st.integers(8, 64),
    timeless=st.booleans(),
    cancelled=st.sets(st.integers(0, 24)),
)
def test_whatever_comes_everything_ends(
    loads: list[tuple[int, int, int, int]],
    max_num_seqs: int,
    blocks: int,
    budget: int,
    timeless: bool,
    cancelled: set[int],
) -> None:
    """Prompts with a few common beginnings arrive at any step and some are given up; `Clock` checks each step."""
    times: dict[str, Any] = {"prefill_tokens_per_s": None, "base_s": 0, "per_seq_s": 0} if timeless else {}
    engine = Engine(
        profile(
            **times,
            max_num_seqs=max_num_seqs,
            max_model_len=160,
            kv_cache_tokens=blocks * BLOCK_TOKENS,
            max_num_batched_tokens=budget,
        )
    )
    clock = Clock(engine)
    sequences = []
    for n, (prompt, output, family, steps) in enumerate(loads):
        sequence = keyed([str(family) * prompt * 4], f"{n:04}" * output)
        sequences.append(sequence)
        engine.submit(sequence)
        for _ in range(steps):
            clock.step()
        if n in cancelled:
            engine.cancel(sequence)
    clock.run([])
    assert not engine.running and not engine.waiting
    assert engine.blocks.used == 0
    for n, sequence in enumerate(sequences):
        assert sequence.generated == sequence.output_tokens or n in cancelled
        assert sequence.generated <= sequence.output_tokens
        assert sequence.cached_tokens < max(1, sequence.prompt_tokens)
    assert engine.generation_tokens == sum(sequence.generated for sequence in sequences)
    assert engine.preemptions == sum(sequence.preemptions for sequence in sequences)


def test_tokens_are_quarters_of_characters_and_blocks_are_chained() -> None:
    assert [count_tokens("x" * length) for length in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert len(block_keys(["x" * 63])) == 1
    assert len(block_keys(["x" * 60])) == 0
    one, other = block_keys(["a" * 128]), block_keys(["b" * 64 + "a" * 64])
    assert set(one).isdisjoint(other)
    assert block_keys(["a" * 64, "b" * 64])[0] == one[0]


def test_a_profile_is_read_from_a_file(tmp_path: Path) -> None:
    made = profile(output_tokens="fixed:7")
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(made))
    (tmp_path / "p.yaml").write_bytes(msgspec.yaml.encode(made))
    assert load_profile(str(tmp_path / "p.json")) == made
    assert load_profile(str(tmp_path / "p.yaml")) == made
    assert all(known.source for known in PROFILES.values())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"source": ""}, "source"),
        ({"base_s": -1}, "base_s"),
        ({"speed": 1}, "speed"),
        ({"max_model_len": 1 << 20}, "kv_cache_tokens=4096"),
        ({"max_num_batched_tokens": 4}, "max_num_batched_tokens=4"),
    ],
)
def test_a_wrong_profile_is_told(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**msgspec.to_builtins(profile()), **change}))
    with pytest.raises(ConfigError, match=told):
        load_profile(str(path))


def test_a_profile_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embedded, instant"):
        load_profile("h100")
    with pytest.raises(ConfigError, match="No such file"):
        load_profile(str(tmp_path / "p.yaml"))
    (tmp_path / "p.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not a profile"):
        load_profile(str(tmp_path / "p.yaml"))


def drawn(spec: str, count: int = 2000, seed: int = 0) -> list[int]:
    draw = lengths(spec, seed)
    assert draw is not None
    return [draw() for _ in range(count)]


def test_lengths_follow_their_distribution() -> None:
    assert lengths("") is None
    assert set(drawn("fixed:12")) == {12}
    assert set(drawn("uniform:3:5")) == {3, 4, 5}
    skewed = sorted(drawn("lognormal:200:0.5"))
    assert 180 < skewed[1000] < 220
    assert sum(skewed) / 2000 > skewed[1000] * 1.08
    assert min(drawn("lognormal:1:3")) == 1
    assert drawn("uniform:1:1000", seed=3) == drawn("uniform:1:1000", seed=3) != drawn("uniform:1:1000", seed=4)


def test_lengths_are_drawn_from_a_recorded_file(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"completion_tokens": 11}\n{"usage": {"completion_tokens": 13}}\n'))
    assert set(drawn(f"recorded:{path}", 100)) == {11, 13}
    (tmp_path / "none.jsonl").write_text('{"tokens": 3}\n')
    with pytest.raises(ConfigError, match="row 1"):
        lengths(f"recorded:{tmp_path / 'none.jsonl'}")
    with pytest.raises(DatasetError, match="No such file"):
        lengths(f"recorded:{tmp_path / 'nowhere.jsonl'}")


@pytest.mark.parametrize("spec", ["12", "fixed:", "fixed:0", "fixed:inf", "uniform:5:3", "lognormal:9", "normal:1:2"])
def test_a_wrong_length_is_told(spec: str) -> None:
    with pytest.raises(ConfigError, match=spec):
        lengths(spec)


def ask(spec: str, *texts: str) -> object:
    return responder(spec)({"messages": [{"role": "user", "content": text} for text in texts]})


def test_recorded_answers_by_prompt_and_in_order(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "two?"}]}]
    lines = [
        {"messages": [{"role": "user", "content": "one?"}], "answer": "1"},
        {"prompt_hash": prompt_hash(messages), "answer": "2"},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [ask(f"recorded:{path}", text) for text in ("one?", "two?")] == ["1", "2"]
    with pytest.raises(LookupError, match="no answer"):
        ask(f"recorded:{path}", "three?")
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"answer": "x"}, {"answer": "y"}]))
    respond = responder(f"recorded:{path}")
    asked = ("three?", "one?", "three?", "three?")
    assert [respond({"messages": [{"role": "user", "content": text}]}) for text in asked] == ["x", "1", "y", "x"]


def test_echo_and_fixed() -> None:
    assert ask("echo", "first", "last") == "last"
    assert ask("fixed:a: b", "anything") == "a: b"
    assert fit("ab", 7) == "ab ab a"
    assert fit("abcdef", 2) == "ab"
    assert fit("", 2) == ".."


@pytest.mark.parametrize("spec", ["", "parrot", "echo:x", "recorded:", "script:json", "script:nowhere_at_all:f"])
def test_a_wrong_responder_is_told(spec: str) -> None:
    with pytest.raises(ConfigError, match="responder"):
        responder(spec)
    with pytest.raises(ConfigError, match="no function 'nothing'"):
        responder("script:json:nothing")


def test_failures_come_at_their_rates() -> None:
    failures = Failures.parse("429=0.25, hang=0.5")
    drawn = [failures.draw() for _ in range(4000)]
    assert 900 < drawn.count(Failure.RATE_LIMITED) < 1100
    assert 1900 < drawn.count(Failure.HANG) < 2100
    assert set(drawn) == {Failure.RATE_LIMITED, Failure.HANG, None}
    assert Failures.parse("").draw() is None


@pytest.mark.parametrize("spec", ["429", "429=x", "418=0.5", "429=1.5", "hang=-1", "429=0.6,500=0.6", "slow=nan"])
def test_a_wrong_failure_is_told(spec: str) -> None:
    with pytest.raises(ConfigError, match="rate"):
        Failures.parse(spec)
