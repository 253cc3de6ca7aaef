"""What a broker must be to carry runs, and how its address is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import BusUnsuitable

OLDEST_SERVER = (2, 12)
"""Batched direct get and per-subject fences with wildcards need it; what is tested is 2.15."""


def check_server(url: str, info: Mapping[str, Any]) -> None:
    """Raises `BusUnsuitable` if the broker that says this of itself is too old or has no JetStream."""
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


def without_password(url: str) -> str:
    """A broker's address as it may be shown."""
    return re.sub("//[^@/]*@", "//", url)
