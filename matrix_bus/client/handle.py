"""One run, as a program that embeds matrix-bus follows it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping

import msgspec
from msgspec import Struct

from .. import control, registry, run
from ..bus import Bus, patiently
from ..dataset import Rejected
from ..orchestrator import OutcomeRecord, decode_outcome
from ..payload import Payloads, whole
from ..registry import Progress, RunRecord, RunState

_KEPT_REJECTED = 100
_FIRST_POLL_S, _LONGEST_POLL_S = 0.1, 1.0


class Status(Progress, kw_only=True):
    """Where a run stands at one moment."""

    state: RunState


class Rejections(Struct):
    """Rows that could not become part of the run in this submission."""

    count: int = 0
    first: list[Rejected] = []
    """The first hundred of them."""

    def add(self, rejected: Rejected) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.first) < _KEPT_REJECTED:
            self.first.append(rejected)


class Run:
    """A run on the bus; it goes on whether or not anybody holds this."""

    def __init__(self, bus: Bus, record: RunRecord, rejected: Rejections | None = None) -> None:
        self._bus = bus
        self.id = record.id
        self.workflow = record.workflow
        self.rejected = rejected or Rejections()

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    async def status(self) -> Status:
        """Counts and state. Waits while the broker is away; raises `RunError` if the run was deleted."""

        async def ask() -> Status:
            record = await registry.require(self._bus, self.id)
            progress = await registry.progress(self._bus, record)
            return Status(**msgspec.structs.asdict(progress), state=record.state)

        return await patiently(self._bus, ask)

    async def outcomes(self) -> AsyncGenerator[OutcomeRecord, None]:
        """Every outcome of the run once, the first first, as they come; ends when the run is sealed and complete.

        Can be called again, and by many at once; goes on where it was when the broker comes back. Raises `RunError`
        if the run is deleted meanwhile, `BusUnavailable` if the client is closed.
        """
        payloads = Payloads(self._bus, self.id)
        async with contextlib.aclosing(run.outcomes(self._bus, self.id)) as stream:
            async for message in stream:
                if message is not None:
                    yield decode_outcome(await whole(message.data, payloads))

    async def wait(self) -> Status:
        """Returns when the run is sealed and every row has its outcome. Raises as `outcomes` does."""
        wait_s = _FIRST_POLL_S
        while not (status := await self.status()).done:
            await asyncio.sleep(wait_s)
            wait_s = min(_LONGEST_POLL_S, wait_s * 1.5)
        return status

    async def pause(self) -> None:
        """Holds the run up: workers start nothing more of it until `resume`. Raises `RunError` if it has ended."""
        await control.pause(self._bus, self.id)

    async def resume(self) -> None:
        """Lets a paused run go on. Raises `RunError` if it has ended."""
        await control.resume(self._bus, self.id)

    async def change(
        self,
        *,
        max_in_flight: int | None = None,
        slots: Mapping[str, int] | None = None,
        weight: float | None = None,
    ) -> None:
        """Other limits while it goes on: rows under way at once, slots by role, share of the workers.

        Workers follow within seconds. Raises `ConfigError`, and `RunError` if the run has ended.
        """
        await control.change(self._bus, self.id, max_in_flight=max_in_flight, slots=slots, weight=weight)

    async def retry_failed(self, *, reason: str = "") -> int:
        """Sends its failed rows again, or those with this reason; returns how many.

        `outcomes` gives the new ones too: an outcome of a higher `generation` takes the place of a row's earlier ones.
        """
        return await control.retry_failed(self._bus, self.id, reason=reason)

    async def cancel(self) -> int:
        """Ends the run now: rows without an outcome get `filtered: cancelled`. Returns how many those were.

        Raises `RunError` if the run is complete.
        """
        return await control.cancel(self._bus, self.id)
