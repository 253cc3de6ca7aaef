"""Tasks at once, for whoever has many calls under way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def unwrapped_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error comes out as itself, with its own cause and context."""
    first: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
    if first is not None:
        raise first
