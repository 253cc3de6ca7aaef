"""The resources of a worker process: opened with the first run that needs them, closed with the last."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from ..agent import Resource, Workflow
from ..telemetry import logger

log = logger("worker")

_Key = tuple[str, str, bytes]


class _Shared:
    """One open resource, and how many use it. Lives in a task: what it opens may have to be closed where it was."""

    def __init__(self, resource: Resource, available: Mapping[Any, Any]) -> None:
        self.users = 0
        self._unused = asyncio.Event()
        self._opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(resource, dict(available)), name=f"resource {resource.name}")

    async def value(self) -> Any:
        """What was opened. Raises `ResourceError`."""
        return await asyncio.shield(self._opened)

    async def close(self) -> None:
        self._unused.set()
        if not self._opened.done():
            self._task.cancel()
        await asyncio.wait([self._task])

    async def _live(self, resource: Resource, available: Mapping[Any, Any]) -> None:
        try:
            async with resource.open(available) as made:
                log.info("worker.resource_opened", resource=resource.name)
                self._opened.set_result(made)
                await self._unused.wait()
            log.info("worker.resource_closed", resource=resource.name)
        except BaseException as error:
            if not self._opened.done():
                self._opened.set_exception(error)
                self._opened.exception()  # it was told to all who wait
            else:  # nobody is left whom it could be told: its runs are done, or it broke by itself
                log.warning("worker.resource_failed", resource=resource.name, error=f"{type(error).__name__}: {error}")
            if not isinstance(error, Exception):
                raise


class Resources:
    """Shared by workflow, code and parameters; a resource that does not take the parameters by the rest."""

    def __init__(self) -> None:
        self._shared: dict[_Key, _Shared] = {}

    @contextlib.asynccontextmanager
    async def of(
        self, flow: Workflow[Any], config: msgspec.Struct | None, kinds: Sequence[Any]
    ) -> AsyncIterator[dict[Any, Any]]:
        """The values of these types, for the length of the context. Raises `ResourceError`."""
        available: dict[Any, Any] = {flow.config: config}
        configured: set[Any] = {flow.config}
        async with contextlib.AsyncExitStack() as stack:
            for resource in flow.needed(kinds):
                parameters = b""
                if any(kind in configured for _, kind in resource.takes):
                    configured.add(resource.kind)
                    parameters = msgspec.json.encode(config)
                key = (f"{flow.name} {flow.code_hash}", resource.name, parameters)
                shared = self._shared.get(key)
                if shared is None:
                    shared = self._shared[key] = _Shared(resource, available)
                shared.users += 1
                stack.push_async_callback(self._leave, key, shared)
                available[resource.kind] = await shared.value()
            yield available

    async def _leave(self, key: _Key, shared: _Shared) -> None:
        shared.users -= 1
        if not shared.users:
            if self._shared.get(key) is shared:
                del self._shared[key]
            await shared.close()
