"""The model pools of a worker process: one per model config, shared by all runs and roles that use it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping

import msgspec

from .. import endpoints
from ..bus import Bus
from ..config import ModelConfig, RunConfig, check_url
from ..endpoints import Replica
from ..errors import ConfigError
from ..llm import ModelPool
from ..quota import Quota
from ..telemetry import logger

_LOOK_AGAIN_S = 2.0

log = logger("worker")

EmbeddedModel = Callable[[], str]
"""Starts the embedded model if it does not run, and returns its URL. May take its time: called in a thread."""


class Models:
    """Pools by what they call, so that two runs do not open two sets of connections to one server."""

    def __init__(self, embedded: EmbeddedModel | None, bus: Bus | None = None) -> None:
        """`bus` is where servers announce themselves; `embedded` starts the model of that name."""
        self._embedded = embedded
        self._bus = bus
        self._pools: dict[bytes, ModelPool] = {}
        self._lock = asyncio.Lock()
        self._keepers: set[asyncio.Task[None]] = set()

    async def pool(self, config: ModelConfig) -> ModelPool:
        """The pool for a model config. Raises `ConfigError` where a key or a server is missing."""
        config = config.server
        key = msgspec.json.encode(config)
        async with self._lock:
            if key not in self._pools:
                self._pools[key] = await self._made(config)
            return self._pools[key]

    async def _made(self, config: ModelConfig) -> ModelPool:
        key = api_key(config)
        if config.urls:
            meter = Quota(self._bus, config) if config.is_metered and self._bus is not None else None
            return ModelPool(config, config.urls, key, meter)
        if config.is_embedded:
            pool = ModelPool(config, [await self._embedded_url(config)], key)
            keeping = self._keep_embedded(config, pool)
        else:
            pool = ModelPool(config, [], key)
            keeping = self._follow_announced(config, pool)
        self._keepers.add(asyncio.create_task(keeping, name=f"servers of {config.model}"))
        return pool

    async def _follow_announced(self, config: ModelConfig, pool: ModelPool) -> None:
        """Keeps to what serves the model, as it is announced on the bus."""
        assert self._bus is not None
        async with contextlib.aclosing(endpoints.watch(self._bus, config.model)) as changes:
            async for change in changes:
                if change.lost:
                    log.warning("worker.server_lost", model=config.model, urls=sorted(change.lost))
                if not change.up:
                    log.warning(
                        "worker.no_server",
                        model=config.model,
                        advice=f"calls wait: start one with matrix-bus serve {config.model}, or set llm.urls",
                    )
                pool.abandon(change.lost)
                try:
                    pool.set_urls(*_usable(change.up))
                except Exception:  # nobody waits for this task, which would end without a word
                    log.exception("worker.servers_not_followed", model=config.model)

    async def _keep_embedded(self, config: ModelConfig, pool: ModelPool) -> None:
        """Brings the embedded model back if it dies: rows retry meanwhile, and would run out of attempts."""
        while True:
            await asyncio.sleep(_LOOK_AGAIN_S)
            try:
                pool.set_urls([await self._embedded_url(config)])
            except Exception as error:  # a disk that is full, say: it may be better next time
                log.warning("worker.embedded_model_is_down", error=f"{type(error).__name__}: {error}")

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
            if alias in aliases or not config.llm.named(alias).is_embedded
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


def _usable(up: Mapping[str, Replica]) -> tuple[dict[str, float], dict[str, tuple[ModelConfig, str | None]]]:
    """What `ModelPool.set_urls` takes: a server that cannot be called from here keeps no other away."""
    capacities, others = {}, {}
    for url, replica in up.items():
        try:
            check_url(url)
            if replica.transport != "direct" or replica.api_key_env:
                others[url] = _called(replica)
        except ConfigError as error:
            log.warning("worker.server_unusable", model=replica.model, url=url, error=str(error))
        else:
            capacities[url] = replica.capacity
    return capacities, others


def _called(replica: Replica) -> tuple[ModelConfig, str | None]:
    """How a server is called that says so itself, and with which key. Raises `ConfigError`."""
    config = ModelConfig(model=replica.model, transport=replica.transport, api_key_env=replica.api_key_env)
    if replica.api_version:
        config = msgspec.structs.replace(config, api_version=replica.api_version)
    return config, api_key(config)


def api_key(config: ModelConfig) -> str | None:
    """The key that the config names. Raises `ConfigError` where it is not set."""
    if not config.api_key_env:
        return None
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(
            f"model {config.model!r} takes its key from the environment variable {config.api_key_env}, which is not "
            "set in the worker"
        )
    return key
