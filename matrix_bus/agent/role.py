"""One role of a workflow: its handler, how it is run, what it asks for and where it sends rows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, get_args

from ..config import Sampling
from ..errors import HandlerError, WorkflowError
from ..llm import LLM
from ..orchestrator import LEASE_ROLE, Kind, is_token
from .routes import Routes, read_routes
from .row import Next, Outcome
from .signature import wanted

Mode = Literal["async", "thread", "process"]
_DECISIONS = (Next, Outcome)  # not `Next | Outcome`, which would be made anew for every hop
_KINDS = get_args(Kind)


class Role:
    """`declared` routes are what the user says of a handler whose source does not tell."""

    def __init__(
        self,
        name: str,
        handler: Callable[..., Any],
        *,
        model: str,
        sampling: Sampling,
        process: bool,
        declared: Sequence[str] | None = None,
    ) -> None:
        if not inspect.isfunction(handler):
            raise WorkflowError(f"role {name!r}: the handler must be a function, not {type(handler).__name__}")
        if not is_token(name) or name == LEASE_ROLE:
            raise WorkflowError(f"role name {name!r} must be 1 to 64 of A-Z a-z 0-9 _ -, and not {LEASE_ROLE!r}")
        self.name = name
        self.handler = handler
        self.model = model
        self.sampling = sampling
        self._declared = None if declared is None else tuple(declared)
        is_async = inspect.iscoroutinefunction(handler)
        if process and is_async:
            raise WorkflowError(f"role {name!r}: a process handler must be a plain def, not async def")
        self.mode: Mode = "async" if is_async else "process" if process else "thread"

    @functools.cached_property
    def parameters(self) -> tuple[tuple[str, Any], ...]:
        """Name and type of what the handler wants beside the row. Raises `WorkflowError`."""
        if not inspect.signature(self.handler).parameters:
            raise WorkflowError(f"role {self.name!r}: the handler must take the row as its first parameter")
        return wanted(self.handler, f"role {self.name!r}", skip=1)

    @property
    def wants_model(self) -> bool:
        """True if the handler takes an `LLM`."""
        return any(kind is LLM for _, kind in self.parameters)

    @functools.cached_property
    def routes(self) -> Routes:
        """Where rows go from here: as declared, else as the handler's source says."""
        read = read_routes(self.handler)
        return read if self._declared is None else Routes(self._declared, read.outcomes)

    def decided(self, result: Any, roles: Collection[str]) -> Next | Outcome:
        """What the handler returned, if it is a decision that holds among these `roles`; else `HandlerError`."""
        if not isinstance(result, _DECISIONS):
            raise HandlerError(
                f"role {self.name!r} returned {result!r:.100}: a handler returns to(role), success(), "
                "filtered(reason) or failed(reason)"
            )
        if isinstance(result, Next):
            if result.role not in roles:
                raise HandlerError(
                    f"role {self.name!r} sent the row to {result.role!r}; the roles are {', '.join(sorted(roles))}"
                )
            if self._declared is not None and result.role not in self._declared:
                raise HandlerError(
                    f"role {self.name!r} sent the row to {result.role!r}, which is not among the routes that it "
                    f"declares: {', '.join(self._declared) or 'none'}"
                )
        elif result.kind not in _KINDS:  # what nobody can read would stand in the way of every outcome behind it
            raise HandlerError(
                f"role {self.name!r} ended the row as {result.kind!r:.100}: an outcome is success, filtered or failed"
            )
        elif not isinstance(result.reason, str):
            raise HandlerError(
                f"role {self.name!r} ended the row with the reason {result.reason!r:.100}: a reason is a str; an error "
                "to tell about is raised"
            )
        return result
