"""Keeps the messages of a run small: what is large in a row goes to the object store before the row moves on.

What never changes goes first (the input), then what was declared to be large, then the closed part of the history.
The state as a whole goes only where the message would otherwise be larger than the broker takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..agent import Role, Workflow
from ..bus import Bus
from ..errors import PublishRefused, RowError
from ..llm import read_segment, segment_body, with_segment
from ..orchestrator import (
    REF_MARK,
    Orchestrator,
    OutcomeRecord,
    RowMessage,
    encode,
    encode_fitting,
    read_ref,
    ref_json,
)
from ..payload import Payloads, inlined
from ..telemetry import logger

LEAST_BYTES = 4096
"""Smaller values stay: a look-up costs more than carrying them."""
OUTCOME_BYTES = 1 << 20
"""An outcome is written once and read once, so it keeps its parts up to the message limit of a stock server."""

log = logger("worker")


class Offload:
    """Packs and unpacks the messages of one run."""

    def __init__(self, bus: Bus, payloads: Payloads, flow: Workflow[Any], above_bytes: int) -> None:
        self.store = payloads
        self._bus = bus
        self._flow = flow
        self._above = above_bytes

    def fits(self, body: bytes) -> bool:
        """Whether a message's bytes may travel as they are."""
        return len(body) <= self._above and len(body) <= self._bus.max_body

    async def pack(self, message: Orchestrator) -> bytes:
        """The bytes of a message that does not fit. Raises `RowError` if there is no way to make it fit."""
        limit = self._bus.max_body
        await self._lighten(message)
        body = encode(message)
        if len(body) > limit:
            message.state = await self._out(message.state)
            body = encode(message)
        if len(body) > limit:
            raise RowError(f"the row's message has grown to {len(body)} bytes, the broker takes {limit}")
        return body

    async def pack_outcome(self, message: Orchestrator, finish: Callable[[], OutcomeRecord]) -> bytes:
        """The bytes of the outcome that `finish` makes of the message; they always fit."""
        limit = min(OUTCOME_BYTES, self._bus.max_body)
        body = encode(finish())
        if len(body) <= limit:
            return body
        try:
            await self._lighten(message)
            if len(encode(finish())) > limit:
                message.state = await self._out(message.state)
        except (RowError, PublishRefused) as error:  # a store that is gone must not cost the outcome
            log.warning("worker.not_offloaded", error=str(error))
        return encode_fitting(finish(), limit)

    def is_packed(self, message: Orchestrator, role: Role) -> bool:
        """Whether a handler of `role` has to wait for `unpack`."""
        return message.state.startswith(REF_MARK) or role.mode != "async"

    async def unpack(self, message: Orchestrator, role: Role) -> None:
        """Makes the state ready for a handler of `role`. Raises `RowError` if a value is lost."""
        if (ref := read_ref(message.state)) is not None:
            message.state = await self.store.get(ref)
        if role.mode != "async":  # it cannot wait for a value when it finds out that it needs it
            message.state = await inlined(message.state, self.store)

    async def line(self, row: RowMessage) -> bytes:
        """The input line of a row. Raises `RowError` if it is lost."""
        ref = read_ref(bytes(row.input))
        return bytes(row.input) if ref is None else await self.store.get(ref)

    async def _lighten(self, message: Orchestrator) -> None:
        if len(message.input) >= LEAST_BYTES:
            message.input = await self._out(message.input)
        try:
            message.state, bodies = self._flow.lighten(message.state, LEAST_BYTES)
        except RowError:  # a row that fails because its state cannot be read
            bodies = []
        for body in bodies:
            await self.store.put(body)
        calls = [line for line in message.history if read_segment(line) is None]
        if sum(map(len, calls)) >= max(LEAST_BYTES, self._above // 4):
            ref = await self.store.put(segment_body(message.history))
            message.history = with_segment(message.history, ref)

    async def _out(self, value: bytes) -> bytes:
        return value if read_ref(value) is not None else ref_json(await self.store.put(value))
