"""A row's state machine and its wire form. Pure: no I/O, no clock, no randomness of its own.

    row message ──admit──▶ hop 1 ──advance──▶ hop 2 ── … ──finish──▶ outcome
                            ▲ │ retry (same hop, attempt + 1)
                            └─┘

Three kinds of bytes travel. A row message and an outcome are JSON, so that any language can submit and read, and
so that collecting is copying lines. What hops between agents is this module's msgpack `Orchestrator`; inside it
everything that a user wrote or will read (input, state, history) is a JSON segment, carried along undecoded.

Evolution rules (docs/protocol.md has them with their reasons): fields are only ever added, at the end, with a default
that means "written by an older version"; what an older reader would get wrong raises `SCHEMA`.
"""

from __future__ import annotations

import builtins
import hashlib
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from .errors import RowError

SCHEMA = 1
LEASE_ROLE = "_"
"""The place of role names in the subjects of row messages; no role may have it."""

Kind = Literal["success", "filtered", "failed"]

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")


# --- names on the bus -------------------------------------------------------------------------------------------


def is_token(name: str) -> bool:
    """True if `name` may stand in a subject: 1 to 64 of A-Z a-z 0-9 _ -."""
    return _TOKEN.fullmatch(name) is not None


def work_stream(run: str) -> str:
    """Name of the work-queue stream that holds the run's rows and hops."""
    return f"W_{run}"


def outcome_stream(run: str) -> str:
    """Name of the stream that holds the run's outcomes, one per row and generation."""
    return f"O_{run}"


def row_subject(run: str, n: int) -> str:
    return f"q.{run}.{LEASE_ROLE}.{n}.0"


def hop_subject(run: str, role: str, n: int, hop: int) -> str:
    return f"q.{run}.{role}.{n}.{hop}"


def family(run: str, n: int) -> str:
    """All messages of one row: the fence is laid on the last of them."""
    return f"q.{run}.*.{n}.*"


def bucket(run: str) -> str:
    """Name of the object store that holds the run's large values."""
    return f"mb_{run}"


def outcome_subject(run: str, n: int, generation: int) -> str:
    return f"out.{run}.{n}.{generation}"


def message_id(run: str, n: int, generation: int, hop: int, attempt: int = 0) -> str:
    """Value of the `Nats-Msg-Id` header; readable when the body is not."""
    return f"{run}:{n}:{generation}:{hop}:{attempt}"


HEADER_LEASE = "Mb-Lease"
"""Ack subject of the row message: whoever finishes the row acks it."""


# --- wire structs -----------------------------------------------------------------------------------------------


class Usage(Struct, frozen=True, omit_defaults=True):
    """Tokens and calls. `cached_tokens` are those of `prompt_tokens` that the server had in its cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    calls: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.calls + other.calls,
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


def decode(body: bytes) -> Orchestrator:
    """A hop's message. Raises `RowError` if it is not one, or of a newer schema."""
    try:
        message = _unpack.decode(body)
    except UNREADABLE as error:
        raise RowError(f"the message is not an orchestrator: {error}") from None
    _check_schema(message.schema)
    return message


def decode_row(body: bytes) -> RowMessage:
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


# --- transitions ------------------------------------------------------------------------------------------------


def row_seed(seed: int, line: int, trial: int) -> int:
    """Seed of a row: 31 bits of blake2b over the run's seed, the line and the trial.

    31 bits because that is what every model server takes; the place decides, so a resumed run repeats it.
    """
    digest = hashlib.blake2b(f"{seed}:{line}:{trial}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1


def admit(row: RowMessage, run: str, n: int, role: str, state: bytes, now: float, hop: int = 1) -> Orchestrator:
    """Hop 1 of a row, at its first role; hop 0 for one that never gets there."""
    return Orchestrator(
        schema=SCHEMA,
        run=run,
        n=n,
        generation=row.generation,
        hop=hop,
        attempt=1,
        role=role,
        id=row.id,
        seed=row.seed,
        submitted_at=row.submitted_at,
        admitted_at=now,
        input=bytes(row.input),
        state=state,
        history=[],
        errors=[],
        visits={role: 1},
        usage={},
    )


def advance(message: Orchestrator, role: str) -> Orchestrator:
    """The next hop, at `role`. Shares the growing parts with `message`, which is not used again."""
    visits = dict(message.visits)
    visits[role] = visits.get(role, 0) + 1
    return msgspec.structs.replace(message, hop=message.hop + 1, attempt=1, role=role, visits=visits, not_before=0.0)


def retry(message: Orchestrator, error: ErrorRecord, not_before: float) -> Orchestrator:
    """The same hop again, one attempt on, with the error that made it necessary."""
    return msgspec.structs.replace(
        message, attempt=message.attempt + 1, errors=[*message.errors, error], not_before=not_before
    )


def finish(message: Orchestrator, workflow: str, trials: int, kind: Kind, reason: str, now: float) -> OutcomeRecord:
    """The row's outcome."""
    total = Usage()
    for usage in message.usage.values():
        total += usage
    return OutcomeRecord(
        run=message.run,
        workflow=workflow,
        id=message.id,
        row=message.n,
        line=message.n // trials,
        trial=message.n % trials,
        generation=message.generation,
        seed=message.seed,
        input=Raw(message.input) if message.input else _NULL,
        outcome=kind,
        reason=clean(reason),
        state=Raw(message.state) if message.state else _NULL,
        history=[Raw(call) for call in message.history],
        usage=total,
        usage_by_role=message.usage,
        errors=message.errors,
        hops=message.hop,
        attempts=message.calls,
        timings=Timings(message.submitted_at, message.admitted_at, now, message.handler_s),
    )


def encode_fitting(record: OutcomeRecord, limit_bytes: int) -> bytes:
    """The outcome's bytes, with what is largest left out until they fit: history, then state, then input.

    An outcome always fits, because a row that could not be reported would be a row that is lost.
    """
    body = encode(record)
    if len(body) > limit_bytes:
        record = msgspec.structs.replace(record, history=[], history_cut=len(record.history))
        body = encode(record)
    for field in ("state", "input"):
        if len(body) > limit_bytes:
            changes: dict[str, Any] = {field: _NULL}
            record = msgspec.structs.replace(record, **changes)
            body = encode(record)
    if len(body) > limit_bytes:
        record = msgspec.structs.replace(record, errors=record.errors[-1:], id=record.id[:1000])
        body = encode(record)
    if len(body) > limit_bytes:
        errors = [msgspec.structs.replace(e, type=e.type[:200], message=e.message[:1000]) for e in record.errors[-1:]]
        record = msgspec.structs.replace(record, errors=errors, reason=record.reason[:1000], usage_by_role={})
        body = encode(record)
    return body
