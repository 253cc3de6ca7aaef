"""From one message of a row to the next."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from msgspec import Raw

from .wire import SCHEMA, ErrorRecord, Kind, Orchestrator, OutcomeRecord, RowMessage, Timings, Usage, clean, encode

_NULL = Raw(b"null")


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
