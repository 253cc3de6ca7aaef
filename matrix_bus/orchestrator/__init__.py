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

from .names import (
    HEADER_CRASHES,
    HEADER_GENERATION,
    HEADER_LEASE,
    LEASE_ROLE,
    bucket,
    family,
    hop_subject,
    is_token,
    outcome_stream,
    outcome_subject,
    outcome_subjects,
    row_in,
    row_of,
    row_subject,
    work_stream,
    work_subjects,
)
from .transitions import admit, advance, encode_fitting, finish, retry, row_seed
from .wire import (
    REF_MARK,
    SCHEMA,
    TEXT_LIMIT,
    UNREADABLE,
    ErrorRecord,
    Kind,
    Orchestrator,
    OutcomeRecord,
    Ref,
    RowMessage,
    Timings,
    Usage,
    clean,
    decode,
    decode_outcome,
    decode_row,
    encode,
    read_ref,
    ref_json,
)

__all__ = (
    "HEADER_CRASHES",
    "HEADER_GENERATION",
    "HEADER_LEASE",
    "LEASE_ROLE",
    "REF_MARK",
    "SCHEMA",
    "TEXT_LIMIT",
    "UNREADABLE",
    "ErrorRecord",
    "Kind",
    "Orchestrator",
    "OutcomeRecord",
    "Ref",
    "RowMessage",
    "Timings",
    "Usage",
    "admit",
    "advance",
    "bucket",
    "clean",
    "decode",
    "decode_outcome",
    "decode_row",
    "encode",
    "encode_fitting",
    "family",
    "finish",
    "hop_subject",
    "is_token",
    "outcome_stream",
    "outcome_subject",
    "outcome_subjects",
    "read_ref",
    "ref_json",
    "retry",
    "row_in",
    "row_of",
    "row_seed",
    "row_subject",
    "work_stream",
    "work_subjects",
)
