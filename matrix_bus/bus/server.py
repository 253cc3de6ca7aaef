"""What a broker must be to carry runs, and how its address is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import BusUnsuitable

OLDEST_SERVER = (2, 12)
"""Batched direct get and per-subject fences with wildcards need it; what is tested is 2.15."""
HEADROOM_BYTES = 2048
"""Left of the server's message limit for headers and subject."""
LEAST_PAYLOAD_BYTES = (128 << 10) + HEADROOM_BYTES
"""Of a message limit: large values are stored in chunks of 128 KiB, as the object stores of all clients do."""


def check_server(url: str, info: Mapping[str, Any]) -> None:
    """Raises `BusUnsuitable` if the broker that says so is too old, has no JetStream, or takes too small messages."""
    version = str(info.get("version", "0"))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_SERVER:
        raise BusUnsuitable(
            f"nats-server at {url} is {version}: matrix-bus needs {OLDEST_SERVER[0]}.{OLDEST_SERVER[1]} or later; "
            "upgrade it, or leave --server out for a local one"
        )
    if not info.get("jetstream"):
        raise BusUnsuitable(
            f"nats-server at {url} runs without JetStream: start it with `nats-server -js`, or with `jetstream {{}}` "
            "in its configuration"
        )
    if (most := info.get("max_payload", LEAST_PAYLOAD_BYTES)) < LEAST_PAYLOAD_BYTES:
        raise BusUnsuitable(
            f"nats-server at {url} takes messages of at most {most} bytes: matrix-bus needs {LEAST_PAYLOAD_BYTES}; "
            "raise max_payload in its configuration (1MB is the server's own default)"
        )


def without_password(url: str) -> str:
    """A broker's address as it may be shown."""
    return re.sub("//[^@/]*@", "//", url)
