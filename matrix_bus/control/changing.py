"""A run that goes on, held up or given other limits."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import msgspec

from .. import registry
from ..bus import Bus, patiently
from ..errors import ConfigError, RunError
from ..orchestrator import outcome_stream
from ..registry import Changed, RunRecord


async def pause(bus: Bus, run: str, why: str = "by hand") -> RunRecord:
    """No worker starts another hop or admits another row of the run; handlers at work finish, and store what they did.

    Rows may still be submitted. Raises `RunError` if there is no such run, or if it has ended.
    """
    record = await registry.require(bus, run)
    if record.state == "paused":
        return record
    if record.state != "active" or (await registry.progress(bus, record)).done:
        raise RunError(f"run {run!r} is {'complete' if record.state == 'active' else record.state}: nothing to pause")
    return await registry.update(bus, run, when="active", state="paused", why=why)


async def resume(bus: Bus, run: str) -> RunRecord:
    """Lets a paused run go on; the stop rule looks only at outcomes from now on. Raises `RunError`."""
    record = await registry.require(bus, run)
    if record.state == "active":
        return record
    if record.state != "paused":
        raise RunError(f"run {run!r} is {record.state}: it cannot go on")
    last = await patiently(bus, lambda: bus.last_sequence(outcome_stream(run)))
    return await registry.update(bus, run, when="paused", state="active", why="", watch_from=last)


async def change(
    bus: Bus,
    run: str,
    *,
    max_in_flight: int | None = None,
    slots: Mapping[str, int] | None = None,
    weight: float | None = None,
) -> RunRecord:
    """Other limits for a run that goes on: rows under way at once, hops per role and worker process, share of workers.

    Workers follow within seconds; what is under way goes on. Raises `ConfigError`, `RunError`.
    """
    record = await registry.require(bus, run)
    if record.state not in ("active", "paused"):
        raise RunError(f"run {run!r} is {record.state}: there is nothing left to change")
    for role, count in (slots or {}).items():
        if role not in record.roles:
            near = difflib.get_close_matches(role, record.roles, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(record.roles)}"
            raise ConfigError(f"workflow {record.workflow!r} has no role {role!r}{hint}")
        if count < 1:
            raise ConfigError(f"roles.{role}.slots={count} must be at least 1: pause the run to stop it")
    if max_in_flight is not None and not 1 <= max_in_flight <= 1_000_000:
        raise ConfigError(f"max_in_flight={max_in_flight} must be 1 to 1000000")
    if weight is not None and not 0 < weight <= 1000:
        raise ConfigError(f"weight={weight:g} must be above 0, and at most 1000")
    changed = Changed(
        max_in_flight=record.changed.max_in_flight if max_in_flight is None else max_in_flight,
        slots={**record.changed.slots, **(slots or {})},
        weight=record.changed.weight if weight is None else weight,
    )
    if max_in_flight is not None:
        await registry.admit_at_most(bus, msgspec.structs.replace(record, changed=changed))
    return await registry.update(bus, run, changed=changed)
