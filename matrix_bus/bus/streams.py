"""Creating streams: what may be there already, and what the broker cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BusUnsuitable, PublishRefused
from .jetstream import Bus
from .wire import STREAM_MADE_OTHERWISE, TOO_FEW_SERVERS

_OPERATORS_CHOICE = ("num_replicas", "storage")


async def create_stream(bus: Bus, config: Mapping[str, Any], *, shared: bool = False) -> None:
    """Creates a stream, if it is not there yet; a shared one may be there in another number of copies.

    Raises `PublishRefused`, `BusUnsuitable` where the broker has too few servers for the copies, or a shared stream
    that would not work.
    """
    name = config["name"]
    try:
        await bus.api(f"STREAM.CREATE.{name}", config)
    except PublishRefused as error:
        if error.code in TOO_FEW_SERVERS:
            copies = config["num_replicas"]
            raise BusUnsuitable(
                f"broker.replicas={copies} needs a cluster of at least {copies} JetStream servers, which {bus.url} is "
                f"not: {error.description}"
            ) from None
        if not (shared and error.code == STREAM_MADE_OTHERWISE):
            raise
        found = (await bus.api(f"STREAM.INFO.{name}"))["config"]
        wrong = [key for key in config if key not in _OPERATORS_CHOICE and found.get(key) != config[key]]
        if wrong:
            needed = ", ".join(f"{key}={config[key]!r}" for key in wrong)
            raise BusUnsuitable(
                f"the stream {name} at {bus.url} was made by somebody else and needs {needed}"
            ) from None


async def create_bucket(bus: Bus, bucket: str, replicas: int, *, max_age_s: float = 0) -> None:
    """Creates a key-value bucket of one value per key that all processes share, if it is not there yet (ADR-8).

    With `max_age_s` values expire.
    """
    config = {
        "name": f"KV_{bucket}",
        "subjects": [f"$KV.{bucket}.>"],
        "retention": "limits",
        "max_msgs_per_subject": 1,
        "discard": "new",
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "allow_direct": True,
        "storage": "file",
        "num_replicas": replicas,
        **({"max_age": int(max_age_s * 1e9)} if max_age_s else {}),
    }
    await create_stream(bus, config, shared=True)
