"""One row of a workflow by itself: the same hops, messages and model calls as on a bus, and no bus."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic

import msgspec
from msgspec import Raw, Struct

from ..errors import HandlerError, RowError, decisive, is_transient
from ..llm import LLM, Responder, ScriptedModels
from ..orchestrator import (
    ErrorRecord,
    Kind,
    Orchestrator,
    OutcomeRecord,
    RowMessage,
    Usage,
    admit,
    advance,
    clean,
    decode,
    encode,
    finish,
    retry,
    row_seed,
)
from .large import encode_state
from .row import Next, Row, S

if TYPE_CHECKING:
    from .role import Role
    from .workflow import Workflow

_RUN = "run_row"


class RowResult(Struct, Generic[S], frozen=True, kw_only=True):
    """How a row ended, and how it came there."""

    kind: Kind
    reason: str
    state: S
    path: list[str]
    """The roles it was at, in order; one that was retried stands there once."""
    history: list[dict[str, Any]]
    """The model calls, oldest first, as they stand in an output line."""
    usage: Usage
    metrics: Mapping[str, float]
    """The workflow's metrics of this row."""
    record: OutcomeRecord
    """The output line."""


async def run_row(
    flow: Workflow[S],
    row: Mapping[str, Any] | bytes,
    *,
    llm: Responder | None,
    config: Struct | Mapping[str, Any] | None,
    resources: Mapping[Any, Any],
    seed: int,
    max_attempts: int,
    max_hops: int,
) -> RowResult[S]:
    """See `Workflow.run_row`."""
    flow.check()
    line = row if isinstance(row, bytes) else _line(row)
    parameters = config if isinstance(config, Struct) else flow.parse_config(config or {})
    for kind in resources:
        if kind not in flow.resources:
            raise HandlerError(f"workflow {flow.name!r} has no resource of type {kind!r} to replace")
    models = ScriptedModels(llm)
    now = time.time()
    first = RowMessage(Raw(line), _id_of(line), row_seed(seed, 0, 0), now)
    message = admit(first, _RUN, 0, flow.start, encode_state(flow.begin(line)), now)
    path = [flow.start]
    async with contextlib.AsyncExitStack() as stack:
        available: dict[Any, Any] = {flow.config: parameters, **resources}
        for made in flow.needed([kind for role in flow.roles.values() for _, kind in role.parameters]):
            if made.kind not in available:
                available[made.kind] = await stack.enter_async_context(made.open(available))
        while True:
            message = decode(encode(message))  # what does not survive the journey shows here too
            try:
                decision, message = await _hop(flow, message, available, models)
            except Exception as error:
                cause = decisive(error)
                if not is_transient(cause) or message.attempt >= max_attempts:
                    raise
                what = ErrorRecord(
                    type(cause).__name__, clean(str(cause)), message.role, message.hop, message.attempt, now
                )
                message = retry(message, what, 0.0)
                continue
            if not isinstance(decision, Next):
                break
            if message.hop >= max_hops:
                raise HandlerError(f"the row is not done after {max_hops} hops: {' → '.join(path)} → …")
            message = advance(message, decision.role)
            path.append(decision.role)
    record = finish(message, flow.name, 1, decision.kind, decision.reason, time.time())
    return RowResult(
        kind=decision.kind,
        reason=decision.reason,
        state=flow.decode_state(message.state),
        path=path,
        history=[msgspec.json.decode(call) for call in message.history],
        usage=record.usage,
        metrics=flow.measure(record),
        record=record,
    )


async def _hop(
    flow: Workflow[S], message: Orchestrator, available: Mapping[Any, Any], models: ScriptedModels
) -> tuple[Any, Orchestrator]:
    """(what the handler decided, the message with the state as it left it)."""
    role: Role = flow.roles[message.role]
    row: Row[S] = Row(message, flow.decode_state(message.state))
    llm = LLM(
        models.named,
        role.model,
        role.sampling,
        message.history,
        role=role.name,
        hop=message.hop,
        attempt=message.attempt,
        seed=message.seed,
    )
    arguments = {name: llm if kind is LLM else available[kind] for name, kind in role.parameters}
    message.calls += 1
    try:
        if role.mode == "async":
            result = await role.handler(row, **arguments)
        else:
            result = await asyncio.to_thread(role.handler, row, **arguments)
    finally:
        message.usage = {**message.usage, role.name: message.usage.get(role.name, Usage()) + llm.usage}
    decision = role.decided(result, flow.roles)
    return decision, msgspec.structs.replace(message, state=encode_state(row.state))


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(row)
    except (TypeError, ValueError) as error:
        raise RowError(f"the row has no form in JSON: {error}") from None


def _id_of(line: bytes) -> str:
    found = msgspec.json.decode(line)
    return str(found["id"]) if isinstance(found, dict) and found.get("id") is not None else "0"
