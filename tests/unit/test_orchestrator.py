"""The row's state machine and its wire form: golden bytes, garbage, transitions, outcomes that fit."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from matrix_bus.errors import RowError
from matrix_bus.orchestrator import (
    LEASE_ROLE,
    SCHEMA,
    ErrorRecord,
    Orchestrator,
    OutcomeRecord,
    RowMessage,
    Timings,
    Usage,
    admit,
    advance,
    decode,
    decode_outcome,
    decode_row,
    encode,
    encode_fitting,
    family,
    finish,
    hop_subject,
    is_token,
    outcome_stream,
    outcome_subject,
    retry,
    row_seed,
    row_subject,
    work_stream,
)
from matrix_bus.worker.failure import describe

LIMIT_BYTES = 100_000
DEEP = b"[" * 100_000 + b"]" * 100_000

ROW = RowMessage(input=Raw(b'{"id":"a","q":"2+2"}'), id="a", seed=42, submitted_at=1700000000.5, generation=1)
ROW_BYTES = b'{"input":{"id":"a","q":"2+2"},"id":"a","seed":42,"submitted_at":1700000000.5,"generation":1}'

UNDER_WAY = Orchestrator(
    schema=1,
    run="r1",
    n=7,
    generation=1,
    hop=3,
    attempt=2,
    role="solver",
    id="a",
    seed=42,
    submitted_at=1700000000.5,
    admitted_at=1700000001.0,
    input=b'{"q":1}',
    state=b'{"t":"x"}',
    history=[b'{"role":"solver"}'],
    errors=[ErrorRecord("EndpointGone", "gone", "solver", 3, 1, 1700000002.0)],
    visits={"solver": 2, "judge": 1},
    usage={"solver": Usage(10, 5, 2, 1)},
    not_before=1700000003.25,
    handler_s=0.5,
    calls=4,
)
UNDER_WAY_BYTES = base64.b64decode(
    "3AAUAaJyMQcBAwKmc29sdmVyoWEqy0HZVPxAIAAAy0HZVPxAQAAAxAd7InEiOjF9xAl7InQiOiJ4In2RxBF7InJvbGUiOiJzb2x2ZXIi"
    "fZGGpHR5cGWsRW5kcG9pbnRHb25lp21lc3NhZ2WkZ29uZaRyb2xlpnNvbHZlcqNob3ADp2F0dGVtcHQBomF0y0HZVPxAgAAAgqZzb2x2"
    "ZXICpWp1ZGdlAYGmc29sdmVyhK1wcm9tcHRfdG9rZW5zCrFjb21wbGV0aW9uX3Rva2VucwWtY2FjaGVkX3Rva2VucwKlY2FsbHMBy0HZ"
    "VPxA0AAAyz/gAAAAAAAABA=="
)

OUTCOME = OutcomeRecord(
    run="r1",
    workflow="math",
    id="a",
    row=7,
    line=3,
    trial=1,
    generation=1,
    seed=42,
    input=Raw(b'{"q":1}'),
    outcome="failed",
    reason="EndpointGone",
    state=Raw(b'{"t":"x"}'),
    history=[Raw(b'{"role":"solver"}')],
    usage=Usage(10, 5, 2, 1),
    usage_by_role={"solver": Usage(10, 5, 2, 1)},
    errors=[ErrorRecord("EndpointGone", "gone", "solver", 3, 1, 1700000002.0)],
    hops=3,
    attempts=4,
    timings=Timings(1700000000.5, 1700000001.0, 1700000009.0, 0.5),
)
OUTCOME_BYTES = (
    b'{"run":"r1","workflow":"math","id":"a","row":7,"line":3,"trial":1,"generation":1,"seed":42,'
    b'"input":{"q":1},"outcome":"failed","reason":"EndpointGone","state":{"t":"x"},'
    b'"history":[{"role":"solver"}],'
    b'"usage":{"prompt_tokens":10,"completion_tokens":5,"cached_tokens":2,"calls":1},'
    b'"usage_by_role":{"solver":{"prompt_tokens":10,"completion_tokens":5,"cached_tokens":2,"calls":1}},'
    b'"errors":[{"type":"EndpointGone","message":"gone","role":"solver","hop":3,"attempt":1,"at":1700000002.0}],'
    b'"hops":3,"attempts":4,"timings":{"submitted_at":1700000000.5,"admitted_at":1700000001.0,'
    b'"finished_at":1700000009.0,"handler_s":0.5},"history_cut":0,"schema":1}'
)


def elements(message: Orchestrator) -> list[Any]:
    """The message as the array that travels."""
    plain = msgspec.msgpack.decode(encode(message))
    assert isinstance(plain, list)
    return plain


def wire(plain: Any) -> bytes:
    return msgspec.msgpack.encode(plain)


# --- golden bytes and evolution -----------------------------------------------------------------------------


def test_schema_is_the_one_of_the_golden_bytes() -> None:
    assert SCHEMA == 1, "keep these bytes and their tests, and add those of the new schema"


def test_golden_row() -> None:
    assert encode(ROW) == ROW_BYTES
    assert decode_row(ROW_BYTES) == ROW


def test_golden_orchestrator() -> None:
    assert encode(UNDER_WAY) == UNDER_WAY_BYTES
    assert decode(UNDER_WAY_BYTES) == UNDER_WAY


def test_golden_outcome() -> None:
    assert encode(OUTCOME) == OUTCOME_BYTES
    found = decode_outcome(OUTCOME_BYTES)
    assert found == OUTCOME
    assert found.kind == "failed"


def test_a_newer_version_may_add_at_the_end() -> None:
    assert decode(wire([*elements(UNDER_WAY), "new", {"more": [1]}])) == UNDER_WAY


@pytest.mark.parametrize("left_out", [1, 2, 3])
def test_an_older_version_may_lack_the_optional_end(left_out: int) -> None:
    older = decode(wire(elements(UNDER_WAY)[:-left_out]))
    names = Orchestrator.__struct_fields__
    for name in names[: len(names) - left_out]:
        assert getattr(older, name) == getattr(UNDER_WAY, name)
    defaults = {"not_before": 0.0, "handler_s": 0.0, "calls": 0}
    for name in names[len(names) - left_out :]:
        assert getattr(older, name) == defaults[name]


def test_a_required_element_may_not_be_missing() -> None:
    with pytest.raises(RowError, match="at least length 17"):
        decode(wire(elements(UNDER_WAY)[:16]))


def test_fields_that_are_new_or_missing_in_json() -> None:
    assert decode_row(ROW_BYTES[:-1] + b',"new":[1]}') == ROW
    assert decode_outcome(OUTCOME_BYTES[:-1] + b',"new":[1]}') == OUTCOME
    older = OUTCOME_BYTES.replace(b',"history_cut":0,"schema":1}', b"}")
    assert decode_outcome(older) == OUTCOME
    assert decode_row(b'{"input":1,"id":"","seed":0,"submitted_at":0}').generation == 0


def test_a_newer_schema_is_refused_with_advice() -> None:
    with pytest.raises(RowError, match="schema 2, this version reads up to 1: upgrade the worker"):
        decode(wire([2, *elements(UNDER_WAY)[1:]]))
    with pytest.raises(RowError, match="schema 2, this version reads up to 1: upgrade the worker"):
        decode_row(ROW_BYTES[:-1] + b',"schema":2}')


def test_an_outcome_of_a_newer_schema_is_refused() -> None:
    with pytest.raises(RowError, match="schema 2"):
        decode_outcome(OUTCOME_BYTES.replace(b'"schema":1', b'"schema":2'))


# --- garbage ------------------------------------------------------------------------------------------------

READERS: list[Callable[[bytes], object]] = [decode, decode_row, decode_outcome]
each_reader = pytest.mark.parametrize("read", READERS, ids=lambda f: f.__name__)


@each_reader
@settings(deadline=None)
@given(body=st.binary(max_size=400))
def test_garbage_is_a_row_error(read: Callable[[bytes], object], body: bytes) -> None:
    with pytest.raises(RowError):
        read(body)


@each_reader
@settings(deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_read_or_a_row_error(read: Callable[[bytes], object], data: st.DataObject) -> None:
    whole = {decode: UNDER_WAY_BYTES, decode_row: ROW_BYTES, decode_outcome: OUTCOME_BYTES}[read]  # type: ignore[index]
    at = data.draw(st.integers(0, len(whole)))
    cut = data.draw(st.integers(0, 4))
    body = whole[:at] + data.draw(st.binary(max_size=6)) + whole[at + cut :]
    try:
        read(body)
    except RowError as error:
        assert str(error).startswith(("the message", "the line"))


@each_reader
@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{}", b"\xc0", b"\x90", b'{"id":"\xff"}', b'"\\ud800"'])
def test_well_known_garbage(read: Callable[[bytes], object], body: bytes) -> None:
    with pytest.raises(RowError):
        read(body)


def test_text_that_is_no_utf8_is_a_row_error() -> None:
    with pytest.raises(RowError, match="utf-8"):
        decode(UNDER_WAY_BYTES.replace(b"\xa2r1", b"\xa2\xff1"))
    with pytest.raises(RowError, match="utf-8"):
        decode_row(ROW_BYTES.replace(b'"id":"a","seed"', b'"id":"\xff","seed"'))


@pytest.mark.parametrize(
    ("read", "body"),
    [
        pytest.param(decode, b"\xdc\x00\x15" + UNDER_WAY_BYTES[3:] + b"\x91" * 100_000 + b"\xc0", id="hop"),
        pytest.param(decode_row, ROW_BYTES.replace(b'{"id":"a","q":"2+2"}', DEEP), id="row"),
        pytest.param(decode_outcome, OUTCOME_BYTES.replace(b'{"t":"x"}', DEEP), id="outcome"),
    ],
)
def test_bytes_nested_too_deeply_are_a_row_error(read: Callable[[bytes], object], body: bytes) -> None:
    with pytest.raises(RowError):
        read(body)


# --- round trip ---------------------------------------------------------------------------------------------

counts = st.integers(0, 2**63 - 1)
times = st.floats(0, 1e12)
usages = st.builds(Usage, counts, counts, counts, counts)
records = st.builds(ErrorRecord, st.text(), st.text(), st.text(), counts, counts, times)
orchestrators = st.builds(
    Orchestrator,
    schema=st.just(SCHEMA),
    run=st.text(),
    n=counts,
    generation=counts,
    hop=counts,
    attempt=counts,
    role=st.text(),
    id=st.text(),
    seed=counts,
    submitted_at=times,
    admitted_at=times,
    input=st.binary(),
    state=st.binary(),
    history=st.lists(st.binary(), max_size=4),
    errors=st.lists(records, max_size=3),
    visits=st.dictionaries(st.text(), counts, max_size=4),
    usage=st.dictionaries(st.text(), usages, max_size=3),
    not_before=times,
    handler_s=times,
    calls=counts,
)


@settings(deadline=None)
@given(orchestrators)
def test_what_is_encoded_is_decoded(message: Orchestrator) -> None:
    assert decode(encode(message)) == message


@settings(deadline=None)
@given(usages, usages)
def test_usage_adds_up_by_field(one: Usage, other: Usage) -> None:
    both = one + other
    for name in Usage.__struct_fields__:
        assert getattr(both, name) == getattr(one, name) + getattr(other, name)


# --- transitions --------------------------------------------------------------------------------------------


def error(attempt: int = 1) -> ErrorRecord:
    return ErrorRecord("ModelTimeout", f"no answer {attempt}", "writer", 1, attempt, 5.0)


def test_admit_is_hop_one_at_the_first_role() -> None:
    message = admit(ROW, "r1", 7, "writer", b'{"t":""}', now=9.0)
    assert (message.hop, message.attempt, message.role, message.calls) == (1, 1, "writer", 0)
    assert (message.run, message.n, message.generation, message.id, message.seed) == ("r1", 7, 1, "a", 42)
    assert (message.submitted_at, message.admitted_at) == (ROW.submitted_at, 9.0)
    assert message.input == b'{"id":"a","q":"2+2"}'
    assert (message.state, message.history, message.errors, message.usage) == (b'{"t":""}', [], [], {})
    assert message.visits == {"writer": 1}
    assert message.schema == SCHEMA
    assert decode(encode(message)) == message


def test_advance_counts_hops_and_visits_and_starts_attempts_anew() -> None:
    first = retry(admit(ROW, "r1", 7, "writer", b"{}", 9.0), error(), not_before=20.0)
    second = advance(first, "judge")
    assert (second.hop, second.attempt, second.role, second.not_before) == (2, 1, "judge", 0.0)
    assert second.visits == {"writer": 1, "judge": 1}
    assert first.visits == {"writer": 1}
    assert second.errors == first.errors, "what was mended stays on record"
    third = advance(second, "writer")
    assert (third.hop, third.visits) == (3, {"writer": 2, "judge": 1})
    assert (third.seed, third.id, third.n, third.input) == (first.seed, first.id, first.n, first.input)


def test_retry_stays_at_its_hop() -> None:
    first = admit(ROW, "r1", 7, "writer", b"{}", 9.0)
    again = retry(retry(first, error(1), 20.0), error(2), 30.0)
    assert (again.hop, again.role, again.attempt, again.not_before) == (1, "writer", 3, 30.0)
    assert again.visits == {"writer": 1}
    assert [e.message for e in again.errors] == ["no answer 1", "no answer 2"]
    assert first.errors == []


def test_finish_sums_up() -> None:
    assert finish(UNDER_WAY, "math", 2, "failed", "EndpointGone", 1700000009.0) == OUTCOME
    more = msgspec.structs.replace(UNDER_WAY, usage={"solver": Usage(10, 5, 2, 1), "judge": Usage(1, 2, 0, 3)})
    record = finish(more, "math", 2, "success", "", 1.0)
    assert record.usage == Usage(11, 7, 2, 4)
    assert record.usage_by_role == more.usage


@pytest.mark.parametrize(("n", "trials", "line", "trial"), [(0, 1, 0, 0), (7, 1, 7, 0), (7, 2, 3, 1), (8, 3, 2, 2)])
def test_the_row_number_holds_line_and_trial(n: int, trials: int, line: int, trial: int) -> None:
    record = finish(msgspec.structs.replace(UNDER_WAY, n=n), "math", trials, "success", "", 1.0)
    assert (record.row, record.line, record.trial) == (n, line, trial)


def test_finish_without_input_or_state_is_null() -> None:
    record = finish(msgspec.structs.replace(UNDER_WAY, input=b"", state=b""), "math", 1, "failed", "x", 1.0)
    plain = msgspec.json.decode(encode(record))
    assert (plain["input"], plain["state"]) == (None, None)


# --- seeds, subjects, names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "seed"),
    [
        ((0, 0, 0), 1746745321),
        ((0, 0, 1), 1800731990),
        ((0, 1, 0), 80304877),
        ((1, 0, 0), 847611521),
        ((123456789, 10**9, 63), 586308732),
    ],
)
def test_row_seeds_are_for_ever(place: tuple[int, int, int], seed: int) -> None:
    assert row_seed(*place) == seed


def test_row_seeds_spread() -> None:
    seeds = [row_seed(0, line, trial) for line in range(2000) for trial in range(4)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) > len(seeds) - 5
    eighths = [sum(seed >> 28 == part for seed in seeds) for part in range(8)]
    assert all(800 < count < 1200 for count in eighths), eighths


def test_subjects_and_ids() -> None:
    assert (work_stream("r1"), outcome_stream("r1")) == ("W_r1", "O_r1")
    assert row_subject("r1", 7) == "q.r1._.7.0" == hop_subject("r1", LEASE_ROLE, 7, 0)
    assert hop_subject("r1", "judge", 7, 3) == "q.r1.judge.7.3"
    assert family("r1", 7) == "q.r1.*.7.*"
    assert outcome_subject("r1", 7, 1) == "out.r1.7.1"


@pytest.mark.parametrize("name", ["a", "_", "-", "A-z_09", "x" * 64])
def test_tokens(name: str) -> None:
    assert is_token(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "a.b", "a b", "a*", "a>", "ä", "a\n", "\n", "a\x00", "٣", "a/b", "a:b"])
def test_no_tokens(name: str) -> None:
    assert not is_token(name)


# --- outcomes that fit --------------------------------------------------------------------------------------


def sized(part: str, size: int) -> Raw:
    return Raw(msgspec.json.encode(part * size))


@settings(deadline=None)
@given(
    part=st.sampled_from(["x", "é", "\x01", "😀", '"']),
    calls=st.lists(st.integers(0, 60_000), max_size=6),
    state=st.integers(0, 300_000),
    given_input=st.integers(0, 300_000),
    identity=st.integers(0, 200_000),
    errors=st.lists(st.integers(0, 4000), max_size=40),
)
def test_an_outcome_fits(
    part: str, calls: list[int], state: int, given_input: int, identity: int, errors: list[int]
) -> None:
    record = msgspec.structs.replace(
        OUTCOME,
        id=part * identity,
        input=sized(part, given_input),
        state=sized(part, state),
        history=[sized(part, size) for size in calls],
        errors=[ErrorRecord("E", part * size, "solver", 1, 1, 0.0) for size in errors],
    )
    whole = encode(record)
    body = encode_fitting(record, LIMIT_BYTES)
    assert len(body) <= LIMIT_BYTES
    if len(whole) <= LIMIT_BYTES:
        assert body == whole
    found = decode_outcome(body)
    assert found.history_cut in (0, len(calls))
    assert len(found.history) + found.history_cut == len(calls)
    assert found.errors[-1:] == record.errors[-1:], "why it failed is never cut"
    assert (found.row, found.outcome, found.reason) == (record.row, record.outcome, record.reason)


def test_what_is_cut_first_is_the_history_then_the_state_then_the_input() -> None:
    small, large = sized("x", 10), sized("x", LIMIT_BYTES)

    def cut(**fields: Any) -> list[str]:
        record = msgspec.structs.replace(OUTCOME, **{"input": small, "state": small, "history": [small], **fields})
        found = decode_outcome(encode_fitting(record, LIMIT_BYTES))
        gone = ["history"] if not found.history else []
        return gone + [name for name in ("state", "input") if bytes(getattr(found, name)) == b"null"]

    assert cut() == []
    assert cut(history=[small, large]) == ["history"]
    assert cut(state=large) == ["history", "state"]
    assert cut(input=large) == ["history", "state", "input"]


HUGE = "x" * (2 * LIMIT_BYTES)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"reason": HUGE}, id="reason"),
        pytest.param({"errors": [ErrorRecord("E", HUGE, "solver", 1, 1, 0.0)]}, id="error message"),
        pytest.param({"errors": [ErrorRecord(HUGE, "", "solver", 1, 1, 0.0)]}, id="error type"),
    ],
)
def test_an_outcome_fits_whatever_a_handler_says(fields: dict[str, Any]) -> None:
    assert len(encode_fitting(msgspec.structs.replace(OUTCOME, **fields), LIMIT_BYTES)) <= LIMIT_BYTES


def test_text_that_is_no_unicode_can_be_reported() -> None:
    """Undecodable file names come with lone surrogates, which nothing can encode."""
    message = admit(ROW, "r", 7, "solver", b"{}", 0.0)
    message.errors = [describe(OSError("\udcff.txt"), message, 0.0)]
    outcome = finish(message, "w", 1, "failed", "no \udcff", 0.0)
    read = decode_outcome(encode_fitting(outcome, LIMIT_BYTES))
    assert (read.reason, read.errors[0].message) == ("no ?", "?.txt\n")
