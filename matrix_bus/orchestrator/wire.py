"""What travels, and its bytes."""

from __future__ import annotations

import builtins
import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from ..errors import RowError

SCHEMA = 1

Kind = Literal["success", "filtered", "failed"]


class Usage(Struct, frozen=True, omit_defaults=True):
    """Tokens and calls. `cached_tokens` are those of `prompt_tokens` that the server had in its cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    calls: int = 0
    cost: float = 0.0
    """By the prices in the run's settings."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.calls + other.calls,
            self.cost + other.cost if other.cost else self.cost,  # a new 0.0 would be written, the default is not
        )


class ErrorRecord(Struct):
    """One thing that went wrong with a row; transient ones stay on record after the retry that mended them."""

    type: str
    message: str
    role: str
    hop: int
    attempt: int
    at: float
    """Unix time in seconds."""


class Ref(Struct, frozen=True):
    """A value in the run's object store, by its content."""

    sha256: str
    """Of the value's JSON, in hex; also its name in the store."""
    bytes: int

    @classmethod
    def of(cls, body: builtins.bytes) -> Ref:
        """What refers to this JSON."""
        return cls(hashlib.sha256(body).hexdigest(), len(body))


class _RefSegment(Struct, frozen=True, forbid_unknown_fields=True):
    ref: Ref = msgspec.field(name="$large")


REF_MARK = b'{"$large":'
"""How the JSON of a reference begins, wherever a value may stand: input, state, or a part of the state."""


def ref_json(ref: Ref) -> bytes:
    """The reference as it stands in place of the value."""
    return _to_json.encode(_RefSegment(ref))


def read_ref(segment: bytes) -> Ref | None:
    """The reference that stands there; None if it is the value itself."""
    if not segment.startswith(REF_MARK):
        return None
    try:
        return _ref_from_json.decode(segment).ref
    except UNREADABLE:
        return None


class RowMessage(Struct, omit_defaults=True):
    """Hop 0, JSON: a row as submitted."""

    input: Raw
    """The line, or the reference to it."""
    id: str
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    submitted_at: float
    generation: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    schema: int = 1
    """Not `SCHEMA`: a default that is left out when writing must mean the same to every version."""


class Orchestrator(Struct, array_like=True):
    """Hops 1 and on, msgpack: the row under way. Run and row number are in the subject as well."""

    schema: int
    run: str
    n: int
    generation: int
    hop: int
    attempt: int
    """Handler calls of this hop, this one included; lost or handed-back deliveries do not count."""
    role: str
    id: str
    seed: int
    submitted_at: float
    admitted_at: float
    input: bytes
    """The line as submitted, JSON, or the reference to it."""
    state: bytes
    """The workflow's state struct, JSON, with references in it, or itself one."""
    history: list[bytes]
    """One JSON object per model call, oldest first; before them one for each segment that lies in the store."""
    errors: list[ErrorRecord]
    visits: dict[str, int]
    """How often each role was entered."""
    usage: dict[str, Usage]
    """Per role."""
    not_before: float = 0.0
    """Unix time before which a retry must not start; 0: at once."""
    handler_s: float = 0.0
    """Seconds spent inside handlers so far."""
    calls: int = 0
    """Handler calls so far, retries included."""


class Timings(Struct):
    """Unix times and durations, in seconds."""

    submitted_at: float
    admitted_at: float
    finished_at: float
    handler_s: float


class OutcomeRecord(Struct):
    """One line of the output, and the message on the outcome stream that it is a copy of."""

    run: str
    workflow: str
    id: str
    row: int
    """line * trials + trial."""
    line: int
    trial: int
    generation: int
    seed: int
    input: Raw
    outcome: Kind
    reason: str
    state: Raw
    history: list[Raw]
    usage: Usage
    usage_by_role: dict[str, Usage]
    errors: list[ErrorRecord]
    hops: int
    attempts: int
    timings: Timings
    history_cut: int = 0
    """Model calls left out of `history` because the line would not have fitted into a message."""
    schema: int = SCHEMA

    @property
    def kind(self) -> Kind:
        return self.outcome


_pack = msgspec.msgpack.Encoder()
_unpack = msgspec.msgpack.Decoder(Orchestrator)
_to_json = msgspec.json.Encoder()
_row_from_json = msgspec.json.Decoder(RowMessage)
_outcome_from_json = msgspec.json.Decoder(OutcomeRecord)
_ref_from_json = msgspec.json.Decoder(_RefSegment)

_NULL = Raw(b"null")

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises at bytes from outside; RecursionError at a bomb of brackets."""

TEXT_LIMIT = 4000
"""Longest reason or error message on record, in characters."""


def clean(text: str, limit: int = TEXT_LIMIT) -> str:
    """`text` as it can be encoded and stored: cut, and without the lone surrogates of undecodable file names."""
    return text[:limit].encode("utf-8", "replace").decode()


def encode(message: Orchestrator | RowMessage | OutcomeRecord) -> bytes:
    """The bytes that travel."""
    return _pack.encode(message) if isinstance(message, Orchestrator) else _to_json.encode(message)


def decode(body: bytes | memoryview) -> Orchestrator:
    """A hop's message. Raises `RowError` if it is not one, or of a newer schema."""
    try:
        message = _unpack.decode(body)
    except UNREADABLE as error:
        raise RowError(f"the message is not an orchestrator: {error}") from None
    _check_schema(message.schema)
    return message


def decode_row(body: bytes | memoryview) -> RowMessage:
    """A row message. Raises `RowError` if it is not one, or of a newer schema."""
    try:
        message = _row_from_json.decode(body)
    except UNREADABLE as error:
        raise RowError(f"the message is not a row: {error}") from None
    _check_schema(message.schema)
    return message


def decode_outcome(body: bytes) -> OutcomeRecord:
    """An outcome. Raises `RowError` if it is not one, or of a newer schema."""
    try:
        record = _outcome_from_json.decode(body)
    except UNREADABLE as error:
        raise RowError(f"the line is not an outcome: {error}") from None
    _check_schema(record.schema)
    return record


def _check_schema(schema: int) -> None:
    if schema > SCHEMA:
        raise RowError(f"the message has schema {schema}, this version reads up to {SCHEMA}: upgrade the worker")
