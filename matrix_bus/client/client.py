"""The async client: a connection, and what can be asked of a bus through it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from .. import catalog, dataset, registry
from ..agent import Workflow, identify
from ..bus import Bus, patiently
from ..catalog import WorkflowInfo
from ..config import RunConfig, check_run, parse_run
from ..dataset import Rejected
from ..errors import ConfigError
from ..run import new_record, open_run
from ..run import submit as submit_lines
from .handle import Rejections, Run
from .rows import Lines, Rows, lines_of, path_of


@contextlib.asynccontextmanager
async def connect(
    url: str | None = None, *, name: str = "matrix-bus client", start_broker: bool = False
) -> AsyncIterator[Client]:
    """A client, connected until the end of the `async with`.

    `url` is the broker, `nats://host:4222`; without it the environment variable MATRIX_BUS_SERVER names it. Only
    with `start_broker=True`, where neither does, the user's local shared broker is used, and started where needed.
    `name` is how the broker lists the connection. Raises `ConfigError` without an address, `BusUnavailable` if no
    broker answers there, `BusUnsuitable` if it is too old or has no JetStream.
    """
    url = url or os.environ.get("MATRIX_BUS_SERVER", "")
    if not url and start_broker:
        from ..broker import local_broker

        url = (await asyncio.to_thread(local_broker().ensure)).url
    if not url:
        raise ConfigError(
            "no broker is named: give connect() its address, as in nats://host:4222, set MATRIX_BUS_SERVER, or let "
            "start_broker=True use a local one"
        )
    async with await Bus.connect(url, name=name) as bus:
        yield Client(bus)


class Client:
    """A connection to the bus, made by `connect`. Belongs to one event loop; its methods may run at the same time.

    It survives restarts of the broker: calls wait while the broker is away (limit them with `asyncio.timeout`).
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def submit(
        self,
        workflow: str | Workflow[Any],
        rows: Rows,
        *,
        run: str = "",
        config: Mapping[str, Any] | Struct | None = None,
        settings: RunConfig | Mapping[str, Any] | None = None,
        on_reject: Callable[[Rejected], None] | None = None,
        shard: str = "",
    ) -> Run:
        """Submits rows as a run, and seals it; returns when the broker has all of them.

        `workflow` is a name that workers have announced, or the Workflow itself. `rows` is a path (JSON lines and
        CSV, also `.gz` and `.zst`, Parquet, a folder or pattern of such files, a saved Hugging Face dataset), an
        iterable or an async iterable; it is asked for more only as the broker confirms, and a
        plain iterable is pulled in one thread of its own. `run` is the id; submitting again under it, after an
        interruption, continues it; what was added to the end of a file is added to the run, and a run that is
        sealed is left as it is otherwise. `config` is the workflow's own
        parameters, `settings` everything else. Rows that cannot be taken are given to `on_reject` and counted in
        `Run.rejected`. With `shard="2/4"` only the second of four parts is submitted, by line number, and the run is
        sealed when all four are: each submitter gives the same rows, and the same `run`.

        Raises `RunError` (nobody has announced the workflow, the id belongs to another run, the run was ended),
        `ConfigError` before anything is published, `DatasetError` for a file that cannot be read, `BusError`; and
        what the caller's iterator raises, as it is: the run stays unsealed then.
        """
        path = path_of(rows)
        part = dataset.Shard.parse(shard)
        if part.count > 1 and not run:
            raise ConfigError("a shard needs run=ID: all shards go into one run")
        parsed = _run_config(config, settings)
        flow, info, check = await self._flow(workflow)
        source = await asyncio.to_thread(dataset.identity, path) if path else ""
        record = new_record(flow, parsed, run=run, source=source, shards=part.count)
        select = dataset.Selection(parsed.input, part, info.parsed_fields)
        rejected = Rejections()

        def reject(line: Rejected) -> None:
            rejected.add(line)
            if on_reject is not None:
                on_reject(line)

        async with contextlib.aclosing(lines_of(rows, check, select, (parsed.input.shuffle, parsed.seed))) as lines:
            # An unreadable file must not leave an empty run behind.
            first = [line async for line in _first(lines)] if path else []
            record = await patiently(self._bus, lambda: open_run(self._bus, record))
            if record.total is None and part.index not in record.sealed:
                await submit_lines(self._bus, record, _chain(first, lines), on_reject=reject, shard=part.index)
        return Run(self._bus, record, rejected)

    async def run(self, run: str) -> Run:
        """A run by its id. Raises `RunError` if there is none, naming those there are."""
        return Run(self._bus, await registry.require(self._bus, run))

    async def runs(self) -> list[Run]:
        """All runs on the bus that are not deleted, oldest first."""
        return [Run(self._bus, record) for record in await registry.runs(self._bus)]

    async def workflows(self) -> list[WorkflowInfo]:
        """What workers have announced, by name."""
        return await catalog.workflows(self._bus)

    async def _flow(
        self, workflow: str | Workflow[Any]
    ) -> tuple[Workflow[Any] | WorkflowInfo, WorkflowInfo, dataset.Check]:
        if isinstance(workflow, str):
            info = await catalog.find(self._bus, workflow)
            return info, info, info.row_check()
        await asyncio.to_thread(identify, workflow)
        return workflow, catalog.describe(workflow), workflow.begin


async def _first(lines: Lines) -> Lines:
    async for line in lines:
        yield line
        return


async def _chain(first: list[dataset.Line | Rejected], rest: Lines) -> Lines:
    for line in first:
        yield line
    async for line in rest:
        yield line


def _run_config(config: Mapping[str, Any] | Struct | None, settings: RunConfig | Mapping[str, Any] | None) -> RunConfig:
    base = settings if isinstance(settings, RunConfig) else parse_run(_plain(settings or {}))
    if config is not None:
        if base.workflow:
            raise ConfigError("the workflow's parameters stand in `config` and in `settings`: give them once")
        base = msgspec.structs.replace(base, workflow=_plain(config))
    check_run(base)
    return base


def _plain(values: Any) -> dict[str, Any]:
    """A mapping, struct or dataclass as builtin types. Raises `ConfigError`."""
    try:
        plain = msgspec.to_builtins(dict(values) if isinstance(values, Mapping) else values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"these settings cannot be stored: {error}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"settings must be a mapping or a struct, not {type(values).__name__}")
    return plain
