"""The command line with one promise broken, as CHAOS_SABOTAGE says: what the verdict must notice."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from matrix_bus import registry
from matrix_bus.bus import Bus, Headers
from matrix_bus.bus import create_stream as _create_stream
from matrix_bus.cli import main
from matrix_bus.worker.delivery import Delivery
from matrix_bus.worker.moves import Moves

_publish = Bus.publish
_outcome = Moves.outcome


def _without_conditions(begin: str) -> None:
    """Publishes under these subjects are taken whatever is there already."""

    async def publish(self: Bus, subject: str, body: bytes, headers: Headers | None = None) -> Any:
        if headers and subject.startswith(begin) and "._." not in subject:
            lines = headers if isinstance(headers, str) else "".join(f"{n}: {v}\r\n" for n, v in headers.items())
            headers = "".join(line for line in lines.splitlines(keepends=True) if not line.startswith("Nats-"))
        return await _publish(self, subject, body, headers)

    setattr(Bus, "publish", publish)  # noqa: B010 - mypy would object to a plain assignment


def _without_fence() -> None:
    async def yes(self: Moves, *_: Any) -> bool:
        return True

    _without_conditions("q.")
    setattr(Moves, "is_current", yes)  # noqa: B010 - mypy would object to a plain assignment


def _without_guard() -> None:
    async def no(self: Moves, *_: Any) -> bool:
        return False

    async def yes(self: Moves, *_: Any) -> bool:
        return True

    async def create_stream(bus: Bus, config: Mapping[str, Any], **more: Any) -> None:
        loose = {k: v for k, v in config.items() if k not in ("max_msgs_per_subject", "discard_new_per_subject")}
        await _create_stream(bus, loose if config["name"].startswith("O_") else config, **more)

    _without_conditions("out.")
    setattr(Moves, "has_outcome", no)  # noqa: B010 - mypy would object to a plain assignment
    setattr(Moves, "is_last", yes)  # noqa: B010 - mypy would object to a plain assignment
    setattr(registry, "create_stream", create_stream)  # noqa: B010 - mypy would object to a plain assignment


def _ack_before_publish() -> None:
    async def outcome(self: Moves, delivery: Delivery, generation: int, body: bytes, lease: str) -> bool:
        await self.free(delivery, lease)
        await asyncio.sleep(0.1)
        return await _outcome(self, delivery, generation, body, "")

    async def yes(self: Moves, *_: Any) -> bool:
        return True

    setattr(Moves, "outcome", outcome)  # noqa: B010 - mypy would object to a plain assignment
    setattr(Moves, "is_last", yes)  # noqa: B010 - mypy would object to a plain assignment


match os.environ["CHAOS_SABOTAGE"]:
    case "no fence":
        _without_fence()
    case "no guard":
        _without_guard()
    case "ack before publish":
        _ack_before_publish()

if __name__ == "__main__":
    main()
