"""The model pools of a worker process: one per model config, shared by all runs and roles that use it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import msgspec

from ..config import ModelConfig, RunConfig
from ..errors import ConfigError, MatrixBusError
from ..llm import ModelPool
from ..telemetry import logger

_LOOK_AGAIN_S = 2.0

log = logger("worker")

EmbeddedModel = Callable[[], str]
"""Starts the embedded model if it does not run, and returns its URL. May take its time: called in a thread."""


class Models:
    """Pools by what they call, so that two runs do not open two sets of connections to one server."""

    def __init__(self, embedded: EmbeddedModel | None) -> None:
        self._embedded = embedded
        self._pools: dict[bytes, ModelPool] = {}
        self._lock = asyncio.Lock()
        self._keepers: set[asyncio.Task[None]] = set()

    async def pool(self, config: ModelConfig) -> ModelPool:
        """The pool for a model config. Raises `ConfigError` where a key or a server is missing."""
        config = config.server
        key = msgspec.json.encode(config)
        async with self._lock:
            if key not in self._pools:
                urls = config.urls or [await self._embedded_url(config)]
                pool = self._pools[key] = ModelPool(config, urls, _api_key(config))
                if not config.urls:
                    self._keepers.add(asyncio.create_task(self._keep_embedded(config, pool), name="embedded model"))
            return self._pools[key]

    async def _keep_embedded(self, config: ModelConfig, pool: ModelPool) -> None:
        """Brings the embedded model back if it dies: rows retry meanwhile, and would run out of attempts."""
        while True:
            await asyncio.sleep(_LOOK_AGAIN_S)
            try:
                pool.set_urls([await self._embedded_url(config)])
            except MatrixBusError as error:
                log.warning("worker.embedded_model_is_down", error=str(error))

    async def _embedded_url(self, config: ModelConfig) -> str:
        if self._embedded is None:
            raise ConfigError(
                f"model {config.model!r} has no urls and this worker has no embedded model: set "
                "llm.urls=http://host:8000/v1"
            )
        return await asyncio.to_thread(self._embedded)

    async def resolver(self, config: RunConfig, aliases: set[str]) -> Callable[[str | None], ModelPool]:
        """What turns a run's alias into a pool. Pools of `aliases` are made now, so a mistake shows early."""
        # A handler may choose any alias by itself; models that nobody declared to use start nothing by themselves.
        pools = {
            alias: await self.pool(config.llm.named(alias))
            for alias in {*aliases, *config.llm.aliases}
            if alias in aliases or config.llm.named(alias).urls
        }

        def resolve(alias: str | None) -> ModelPool:
            if (pool := pools.get(alias or "default")) is None:
                raise ConfigError(f"no model {alias!r}: there are {', '.join(sorted(pools))}")
            return pool

        return resolve

    async def close(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        for pool in self._pools.values():
            await pool.close()


def _api_key(config: ModelConfig) -> str | None:
    if not config.api_key_env:
        return None
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(
            f"model {config.model!r} takes its key from the environment variable {config.api_key_env}, which is not "
            "set in the worker"
        )
    return key
