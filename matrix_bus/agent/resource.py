"""What a workflow's handlers share beside the models: declared with a lifespan, asked for by its type."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import typing
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping
from typing import Any

from ..errors import ResourceError, WorkflowError
from .signature import wanted

_YIELDING = (AsyncIterator, AsyncGenerator, Iterator, Generator)


class Resource:
    """A function that makes something, and, if it is a generator, tidies up after its `yield`.

    What it returns or yields is given to every handler with a parameter of that type. `takes` are the parameters
    it wants itself: the workflow's config, and resources declared before it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = getattr(function, "__name__", repr(function))
        if not inspect.isfunction(function):
            raise WorkflowError(f"resource {self.name!r} must be a function, not {type(function).__name__}")
        self.function = function
        self.is_async = inspect.isasyncgenfunction(function) or inspect.iscoroutinefunction(function)
        self.yields = inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function)
        self.takes = wanted(function, f"resource {self.name!r}")
        self.kind = self._kind()

    def _kind(self) -> Any:
        declared = typing.get_type_hints(self.function).get("return")
        if self.yields and declared is not None:
            origin, inner = typing.get_origin(declared), typing.get_args(declared)
            declared = inner[0] if origin in _YIELDING and inner else None
        if declared is None or declared is type(None):
            example = f"{'Async' if self.is_async else ''}Iterator[Pool]" if self.yields else "Pool"
            raise WorkflowError(f"resource {self.name!r} must say the type that handlers ask for, such as -> {example}")
        return declared

    def _failed(self, error: Exception) -> ResourceError:
        return ResourceError(f"resource {self.name!r} cannot be opened: {type(error).__name__}: {error}")

    @contextlib.asynccontextmanager
    async def open(self, available: Mapping[Any, Any]) -> AsyncIterator[Any]:
        """What it makes, for the length of the context. A plain `def` runs in a thread: it may take its time.

        Raises `ResourceError` where the function raises.
        """
        arguments = {name: available[kind] for name, kind in self.takes}
        async with contextlib.AsyncExitStack() as stack:
            try:
                if self.is_async and self.yields:
                    made = await stack.enter_async_context(contextlib.asynccontextmanager(self.function)(**arguments))
                elif self.is_async:
                    made = await self.function(**arguments)
                elif self.yields:
                    manager = contextlib.contextmanager(self.function)(**arguments)
                    made = await asyncio.to_thread(manager.__enter__)
                    stack.push_async_callback(asyncio.to_thread, manager.__exit__, None, None, None)
                else:
                    made = await asyncio.to_thread(self.function, **arguments)
            except Exception as error:
                raise ResourceError(
                    f"resource {self.name!r} cannot be opened: {type(error).__name__}: {error}"
                ) from error
            yield made

    @contextlib.contextmanager
    def open_here(self, available: Mapping[Any, Any]) -> Iterator[Any]:
        """The same in this thread, for what is made without await. Raises `ResourceError`."""
        arguments = {name: available[kind] for name, kind in self.takes}
        with contextlib.ExitStack() as stack:
            try:
                if self.yields:
                    made = stack.enter_context(contextlib.contextmanager(self.function)(**arguments))
                else:
                    made = self.function(**arguments)
            except Exception as error:
                raise ResourceError(
                    f"resource {self.name!r} cannot be opened: {type(error).__name__}: {error}"
                ) from error
            yield made
