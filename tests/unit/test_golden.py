"""Bytes of each released schema: what lies in somebody's broker or output must stay readable for ever.

Never change what is here. A new field gets a new golden beside the old one.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from matrix_bus.errors import RowError
from matrix_bus.llm.history import Segment, read_call, read_segment
from matrix_bus.orchestrator import (
    SCHEMA,
    ErrorRecord,
    Orchestrator,
    OutcomeRecord,
    Ref,
    RowMessage,
    Usage,
    decode,
    decode_outcome,
    decode_row,
    encode,
    finish,
    read_ref,
    ref_json,
)

ROW_1 = b'{"input":{"x": 1},"id":"a","seed":7,"submitted_at":1.5,"generation":1}'
HOP_1 = bytes.fromhex(
    "dc001401a17205010302a56a75646765a16107cb3ff8000000000000cb4004000000000000c4087b2278223a20317dc4077b2278223a31"
    "7d91c4107b22726f6c65223a226a75646765227d9186a474797065a145a76d657373616765a16da4726f6c65a56a75646765a3686f7003"
    "a7617474656d707401a26174cb401000000000000082a56a7564676501a4706c616e0181a56a7564676583ad70726f6d70745f746f6b65"
    "6e7301b1636f6d706c6574696f6e5f746f6b656e7302a563616c6c7301cb4022000000000000cb3fd000000000000004"
)
OUTCOME_1 = (
    b'{"run":"r","workflow":"walk","id":"a","row":5,"line":2,"trial":1,"generation":1,"seed":7,"input":{"x": 1},'
    b'"outcome":"success","reason":"done","state":{"x":1},"history":[{"role":"judge"}],'
    b'"usage":{"prompt_tokens":1,"completion_tokens":2,"calls":1},'
    b'"usage_by_role":{"judge":{"prompt_tokens":1,"completion_tokens":2,"calls":1}},'
    b'"errors":[{"type":"E","message":"m","role":"judge","hop":3,"attempt":1,"at":4.0}],"hops":3,"attempts":4,'
    b'"timings":{"submitted_at":1.5,"admitted_at":2.5,"finished_at":6.0,"handler_s":0.25},"history_cut":0,"schema":1}'
)
REF_1 = b'{"$large":{"sha256":"ba2df4903a2c14e86dc3bcca58911b44ac1d2514b7227bf6eb08cfb978f55a1b","bytes":3}}'
SEGMENT_1 = (
    b'{"$calls":{"sha256":"4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945","bytes":2},"count":2,'
    b'"last":{"judge":[1,["YWJj"]]}}'
)
CALL_1 = (
    b'{"role":"judge","model":"m","endpoint":"http://h/v1","sampling":{"seed":3},"prefix":[0,2],'
    b'"messages":[{"role":"user","content":"hi"}],"text":"yes","finish_reason":"stop",'
    b'"usage":{"prompt_tokens":1,"calls":1},"started_at":1.5,"wait_s":0.5,"latency_s":2.0,"hop":3,"attempt":1}'
)


def message() -> Orchestrator:
    return Orchestrator(
        schema=1,
        run="r",
        n=5,
        generation=1,
        hop=3,
        attempt=2,
        role="judge",
        id="a",
        seed=7,
        submitted_at=1.5,
        admitted_at=2.5,
        input=b'{"x": 1}',
        state=b'{"x":1}',
        history=[b'{"role":"judge"}'],
        errors=[ErrorRecord("E", "m", "judge", 3, 1, 4.0)],
        visits={"judge": 1, "plan": 1},
        usage={"judge": Usage(1, 2, 0, 1)},
        not_before=9.0,
        handler_s=0.25,
        calls=4,
    )


def test_a_row_of_schema_1() -> None:
    row = decode_row(ROW_1)
    assert row == RowMessage(msgspec.Raw(b'{"x": 1}'), "a", 7, 1.5, generation=1)
    assert encode(row) == ROW_1


def test_a_hop_of_schema_1() -> None:
    assert decode(HOP_1) == message()
    assert encode(message()) == HOP_1


def test_an_outcome_of_schema_1() -> None:
    record = decode_outcome(OUTCOME_1)
    assert isinstance(record, OutcomeRecord)
    assert (record.kind, record.timings.handler_s, record.usage.completion_tokens) == ("success", 0.25, 2)
    assert encode(record) == encode(finish(message(), "walk", 2, "success", "done", 6.0)) == OUTCOME_1


def test_a_reference_of_schema_1() -> None:
    assert read_ref(REF_1) == Ref.of(b'"x"')
    assert ref_json(Ref.of(b'"x"')) == REF_1


def test_a_segment_of_schema_1() -> None:
    segment = Segment(Ref.of(b"[]"), 2, {"judge": (1, ["YWJj"])})
    assert read_segment(SEGMENT_1) == segment
    assert msgspec.json.encode(segment) == SEGMENT_1


def test_a_model_call_of_schema_1() -> None:
    call = read_call(CALL_1)
    assert (call.role, call.prefix, call.text, call.latency_s) == ("judge", (0, 2), "yes", 2.0)
    assert msgspec.json.encode(call) == CALL_1


# --- what the next version may add ----------------------------------------------------------------------------------


def with_field(body: bytes) -> bytes:
    return body[:-1] + b',"of_the_next_version":{"deep":[1]}}'


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (decode_row, ROW_1),
        (decode_outcome, OUTCOME_1),
        (read_call, CALL_1),
        (read_segment, SEGMENT_1),
    ],
)
def test_fields_of_a_later_version_are_passed_over(read: Any, body: bytes) -> None:
    assert read(with_field(body)) == read(body)


def test_a_hop_with_a_later_versions_fields_is_read() -> None:
    fields = msgspec.msgpack.decode(HOP_1)
    assert decode(msgspec.msgpack.encode([*fields, "of the next version", 5])) == message()


def test_a_hop_of_an_earlier_version_gets_the_defaults() -> None:
    fields = msgspec.msgpack.decode(HOP_1)
    older = decode(msgspec.msgpack.encode(fields[:-3]))
    assert (older.not_before, older.handler_s, older.calls) == (0.0, 0.0, 0)
    assert older.usage == message().usage


def test_a_later_schema_is_refused_by_name() -> None:
    fields = msgspec.msgpack.decode(HOP_1)
    with pytest.raises(RowError, match=f"schema {SCHEMA + 1}, this version reads up to {SCHEMA}"):
        decode(msgspec.msgpack.encode([SCHEMA + 1, *fields[1:]]))
    with pytest.raises(RowError, match="upgrade"):
        decode_row(ROW_1[:-1] + b',"schema":%d}' % (SCHEMA + 1))


def test_a_row_always_says_its_schema_when_it_is_not_the_first() -> None:
    row = RowMessage(msgspec.Raw(b"{}"), "a", 7, 1.5, schema=2)
    assert b'"schema":2' in encode(row)
