"""What a user's function asks for, read from its parameters."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

from ..errors import WorkflowError


def wanted(function: Callable[..., Any], what: str, skip: int = 0) -> tuple[tuple[str, Any], ...]:
    """Name and type of the parameters after the first `skip`. Raises `WorkflowError`; `what` begins its message."""
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise WorkflowError(f"{what}: {error}, in its annotations") from None
    names = list(inspect.signature(function).parameters)
    for name in names[skip:]:
        if name not in hints:
            raise WorkflowError(f"{what}: parameter {name!r} needs a type, such as {name}: LLM")
    return tuple((name, hints[name]) for name in names[skip:])
