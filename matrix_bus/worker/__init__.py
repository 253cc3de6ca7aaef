"""A worker process: serves roles of every active run whose workflow it has loaded.

    lane (pull) ──▶ slots ──▶ handler ──▶ settle: advance · retry · outcome · hand back

Start-up binds to what submitters created; the worker needs no config file and no right to create anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

from .. import catalog, registry, telemetry
from ..agent import Workflow
from ..bus import Bus, unwrapped_group
from ..errors import BusError, MatrixBusError, ResourceError, user_frames
from ..orchestrator import LEASE_ROLE, SCHEMA
from ..registry import RunRecord
from .handlers import Executors
from .models import EmbeddedModel, Models
from .pulling import Pool, Pump
from .resources import Resources
from .session import Session
from .watchdog import Watchdog

__all__ = ("Worker",)

DEFAULT_SLOTS = 256
_ADMISSION_SLOTS = 256
_FINISHED_CHECK_S = 15.0

log = telemetry.logger("worker")


class Worker:
    """Serves runs from `run()` until `stop()`.

    `roles` limits which roles it serves (all by default); rows are admitted by every worker. `slots` is how many
    hops of one role may be in flight in this process.
    """

    def __init__(
        self,
        bus: Bus,
        workflows: Sequence[Workflow[Any]],
        *,
        roles: Sequence[str] = (),
        slots: int = DEFAULT_SLOTS,
        grace_s: float = 10.0,
        embedded_model: EmbeddedModel | None = None,
    ) -> None:
        self._bus = bus
        self._flows = {flow.name: flow for flow in workflows}
        self._roles = frozenset(roles)
        self._grace_s = grace_s
        self._slots = slots
        self._pools: dict[str, Pool] = {LEASE_ROLE: Pool(_ADMISSION_SLOTS)}
        self._own_pools: dict[tuple[str, str], Pool] = {}
        """Of runs that limit a role for themselves."""
        self._pump = Pump()
        self._executors = Executors(threads=min(64, slots), processes=os.cpu_count() or 1)
        self._models = Models(embedded_model, bus)
        self._resources = Resources()
        self._sessions: dict[str, Session] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        """Runs whose sessions are being made: a resource may take minutes, and other runs go on meanwhile."""
        self._refused: dict[str, str] = {}
        """Why a run is not served, so that it is said once."""
        self._finished: dict[str, tuple[int | None, int]] = {}
        """Runs that were complete when last looked at, with the rows that they had then."""
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        codes: dict[CodeType, str] = {}
        for flow in workflows:
            codes.update({role.handler.__code__: role.name for role in flow.roles.values()})
        self.watchdog = Watchdog(codes)

    @property
    def serving(self) -> list[str]:
        """Ids of the runs that are being served."""
        return sorted(self._sessions)

    @property
    def holds(self) -> int:
        """Deliveries that are not settled yet, of all runs."""
        return sum(session.holds for session in self._sessions.values())

    def stop(self) -> None:
        """First call: pull no more, finish what fits into the grace period. Second call: hand back now."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def run(self) -> None:
        """Serves until `stop()`; returns when everything is settled or handed back.

        Raises `BusUnavailable` if the broker ends the connection for good.
        """
        async with unwrapped_group() as group:
            beside = [
                group.create_task(self._pump.run(), name="pump"),
                group.create_task(self.watchdog.run(), name="watchdog"),
                group.create_task(self._follow_runs(group), name="runs"),
                group.create_task(self._retire_finished(), name="retire"),
                group.create_task(self._announce(), name="announce"),
            ]
            await self._stopping.wait()
            self._pump.stop()
            for task in (*beside[2:], *self._opening.values()):
                task.cancel()
            await asyncio.gather(*self._opening.values(), return_exceptions=True)
            closing = asyncio.gather(*(session.close(self._grace_s) for session in self._sessions.values()))
            hurry = asyncio.create_task(self._hurry.wait())
            waits: list[asyncio.Future[Any]] = [closing, hurry]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not closing.done():
                await asyncio.gather(*(session.close(0) for session in self._sessions.values()))
            hurry.cancel()
            await asyncio.gather(closing, return_exceptions=True)
            for task in beside:
                task.cancel()
        self._executors.close()
        await self._models.close()

    async def _announce(self) -> None:
        """Tells the bus what is served here, once; after a reconnect where it could not, or where it is gone."""
        reconnected = asyncio.Event()

        async def wake() -> None:
            reconnected.set()

        forget = self._bus.on_reconnect(wake)
        announced: set[str] = set()
        try:
            while True:
                reconnected.clear()
                for flow in self._flows.values():
                    if await catalog.announce(self._bus, catalog.describe(flow), replace=flow.name not in announced):
                        announced.add(flow.name)
                await reconnected.wait()
        finally:
            forget()

    async def _follow_runs(self, group: asyncio.TaskGroup) -> None:
        async for records in registry.watch(self._bus):
            wanted = {record.id: record for record in records}
            for run in self._opening.keys() - wanted:
                self._opening[run].cancel()
            for unwanted in [s for s in self._sessions.values() if s.record.id not in wanted or s.gone]:
                await self._close(unwanted)
            for record in records:
                if (session := self._sessions.get(record.id)) is not None:
                    await self._follow(session, record)
                elif record.state == "active" and self._is_wanted(record):
                    task = group.create_task(self._open(record), name=f"open {record.id}")
                    self._opening[record.id] = task
                    task.add_done_callback(functools.partial(self._opening.pop, record.id))

    async def _open(self, record: RunRecord) -> None:
        flow = self._flows.get(record.workflow)
        if flow is None:
            # A worker serves what it was started for; `submit` and `status` say what nobody serves.
            self._refuse(record, f"workflow {record.workflow!r} is not loaded in this worker", log.info)
            return
        if record.schema > SCHEMA:
            self._refuse(record, f"the run speaks schema {record.schema}, this worker up to {SCHEMA}: upgrade it")
            return
        if record.code_hash != flow.code_hash:
            self._refuse(
                record,
                f"the run was made with code {record.code_hash} of workflow {flow.name!r}, this worker has "
                f"{flow.code_hash}: start the worker from the same source, or submit again",
            )
            return
        served = [role for name, role in flow.roles.items() if not self._roles or name in self._roles]
        pools = {name: self._pool(record, name) for name in [LEASE_ROLE, *(role.name for role in served)]}
        try:
            if _is_over(await registry.progress(self._bus, record)):
                self._finished[record.id] = _rows_of(record)
                return
            aliases = {record.config.alias_of(role.name, role.model) for role in served if role.wants_model}
            resolve = await self._models.resolver(record.config, aliases)
            parameters = flow.parse_config(record.config.workflow)
            kinds = [kind for role in served if role.mode != "process" for _, kind in role.parameters]
            async with contextlib.AsyncExitStack() as stack:
                available = await stack.enter_async_context(self._resources.of(flow, parameters, kinds))
                rest = stack.pop_all()
            session = Session(self._bus, record, flow, pools, self._pump, self._executors, resolve, available, rest)
            try:
                await session.open()
            except BaseException:
                await session.close(0)
                raise
        except ResourceError as error:  # what it connects to may come back: the runs are looked at again soon
            self._refuse(record, f"{error}\n{user_frames(error.__cause__ or error)}".rstrip())
        except BusError as error:
            log.warning("worker.run_not_opened", run=record.id, error=str(error))
        except MatrixBusError as error:
            self._refuse(record, str(error))
        except Exception as error:  # whatever is odd about one run must not end those beside it
            self._refuse(record, f"{type(error).__name__}: {error}", log.exception)
        else:
            self._refused.pop(record.id, None)
            self._sessions[record.id] = session
            log.info("worker.serving", run=record.id, roles=[role.name for role in served])

    def _is_wanted(self, record: RunRecord) -> bool:
        return record.id not in self._opening and self._finished.get(record.id) != _rows_of(record)

    async def _follow(self, session: Session, record: RunRecord) -> None:
        before = session.record
        if (record.state, record.changed, _rows_of(record)) == (before.state, before.changed, _rows_of(before)):
            return
        pools = {role: self._pool(record, role) for role in session.roles}
        try:
            await session.follow(record, pools)
        except BusError as error:
            log.warning("worker.run_not_followed", run=record.id, error=str(error))

    def _pool(self, record: RunRecord, role: str) -> Pool:
        """The slots of a role: shared by all runs, or of the run's own where it limits them."""
        slots = record.slots(role)
        if slots is None:
            return self._pools.setdefault(role, Pool(self._slots))
        pool = self._own_pools.setdefault((record.id, role), Pool(0))
        pool.capacity = min(slots, self._slots)
        return pool

    def _refuse(self, record: RunRecord, reason: str, say: Callable[..., None] = log.warning) -> None:
        if self._refused.get(record.id) != reason:
            self._refused[record.id] = reason
            say("worker.run_refused", run=record.id, reason=reason)

    async def _close(self, session: Session) -> None:
        run = session.record.id
        if self._sessions.get(run) is not session:
            return  # it was left meanwhile, and may be served anew
        del self._sessions[run]
        for role in session.roles:
            self._own_pools.pop((run, role), None)
        with contextlib.suppress(BusError):
            await session.close(0)
        log.info("worker.left", run=run)

    async def _retire_finished(self) -> None:
        """Leaves runs that are complete: nothing says so on the bus, since nobody must be alive to say it."""
        while True:
            await asyncio.sleep(_FINISHED_CHECK_S)
            for run, session in list(self._sessions.items()):
                if session.holds or time.monotonic() - session.touched_at < _FINISHED_CHECK_S:
                    continue
                try:
                    over = _is_over(await registry.progress(self._bus, session.record))
                except BusError:
                    continue
                if over:
                    self._finished[run] = _rows_of(session.record)
                    await self._close(session)


def _is_over(progress: registry.Progress) -> bool:
    """Every row has its outcome, and what the dead have left in the queue is freed."""
    return progress.done and not progress.queued


def _rows_of(record: RunRecord) -> tuple[int | None, int]:
    """What changes when rows are added to a run, or sent again."""
    return record.total, record.retried
