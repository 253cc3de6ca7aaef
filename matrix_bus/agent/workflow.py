"""A workflow and its roles: what is declared, and what is checked before any row travels."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import textwrap
import typing
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeVar, overload

import msgspec

from ..config import Sampling, parse
from ..errors import ConfigError, RowError, WorkflowError
from ..llm import LLM
from ..orchestrator import LEASE_ROLE, REF_MARK, OutcomeRecord, is_token
from .large import Store, decoding, lighten
from .row import S, to

H = TypeVar("H", bound=Callable[..., Any])
Mode = Literal["async", "thread", "process"]


class Role:
    """One role of a workflow: its handler, how it is run and what it asks for."""

    def __init__(self, name: str, handler: Callable[..., Any], *, model: str, sampling: Sampling, process: bool):
        if not is_token(name) or name == LEASE_ROLE:
            raise WorkflowError(f"role name {name!r} must be 1 to 64 of A-Z a-z 0-9 _ -, and not {LEASE_ROLE!r}")
        self.name = name
        self.handler = handler
        self.model = model
        self.sampling = sampling
        if not inspect.isfunction(handler):
            raise WorkflowError(f"role {name!r}: the handler must be a function, not {type(handler).__name__}")
        is_async = inspect.iscoroutinefunction(handler)
        if process and is_async:
            raise WorkflowError(f"role {name!r}: a process handler must be a plain def, not async def")
        self.mode: Mode = "async" if is_async else "process" if process else "thread"

    @functools.cached_property
    def parameters(self) -> tuple[tuple[str, Any], ...]:
        """Name and type of what the handler wants beside the row. Raises `WorkflowError`."""
        try:
            hints = typing.get_type_hints(self.handler)
        except NameError as error:
            raise WorkflowError(f"role {self.name!r}: {error}, in the handler's annotations") from None
        names = list(inspect.signature(self.handler).parameters)
        if not names:
            raise WorkflowError(f"role {self.name!r}: the handler must take the row as its first parameter")
        for name in names[1:]:
            if name not in hints:
                raise WorkflowError(f"role {self.name!r}: parameter {name!r} needs a type, such as {name}: LLM")
        return tuple((name, hints[name]) for name in names[1:])

    @property
    def wants_model(self) -> bool:
        """True if the handler takes an `LLM`."""
        return any(kind is LLM for _, kind in self.parameters)

    @functools.cached_property
    def routes(self) -> frozenset[str]:
        """The roles that appear in the handler's source as `to("name")`."""
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(self.handler)))
        except (OSError, SyntaxError):  # no source: routes are checked when they are taken
            return frozenset()
        return frozenset(
            node.args[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and self._is_to(node.func)
            and len(node.args) == 1
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        )

    def _is_to(self, function: ast.expr) -> bool:
        """True for `to` and `mb.to`, by what the names mean where the handler was written; not for `tensor.to`."""
        names = self.handler.__globals__
        if isinstance(function, ast.Name):
            return names.get(function.id) is to
        if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
            return False
        return function.attr == "to" and inspect.ismodule(module := names.get(function.value.id)) and module.to is to


class Workflow(Generic[S]):
    """A named set of roles around one state struct.

    `start` is the role that a new row goes to. `config` is the struct of the workflow's own parameters
    (`workflow.<name>=value` on the command line); a handler gets it by a parameter of that type. `quick` holds
    settings, by their dotted keys, with which a first try on the small embedded model ends soon.
    """

    def __init__(
        self,
        name: str,
        *,
        state: type[S],
        start: str,
        config: type[msgspec.Struct] | None = None,
        quick: Mapping[str, Any] | None = None,
    ) -> None:
        if not is_token(name):
            raise WorkflowError(f"workflow name {name!r} must be 1 to 64 of A-Z a-z 0-9 _ -")
        self.name = name
        self.state = state
        self.start = start
        self.config = config
        self.quick = {"max_in_flight": 4, **(quick or {})}
        self.roles: dict[str, Role] = {}
        self.spec = name
        """What `load_workflow` was given: another process loads the same from it."""
        self.code_hash = ""
        """sha256 of the source, 16 hex digits; set by `load_workflow`."""
        self._metrics: Callable[[S, Any], Mapping[str, float]] | None = None
        self._decoder = msgspec.json.Decoder(state, dec_hook=decoding(None))

    @overload
    def role(self, handler: H, /) -> H: ...
    @overload
    def role(
        self, /, *, name: str = "", model: str = "default", sampling: Sampling = ..., process: bool = False
    ) -> Callable[[H], H]: ...
    def role(
        self,
        handler: H | None = None,
        /,
        *,
        name: str = "",
        model: str = "default",
        sampling: Sampling = Sampling(),  # noqa: B008 - a frozen struct
        process: bool = False,
    ) -> H | Callable[[H], H]:
        """Declare a role; its name is the function's unless given.

        An `async def` handler runs on the event loop, a plain `def` in a thread, and with `process=True` in a
        process pool, for what burns CPU. `model` is an alias from the run's `llm.models`.
        """

        def register(function: H) -> H:
            role = Role(name or function.__name__, function, model=model, sampling=sampling, process=process)
            if role.name in self.roles:
                raise WorkflowError(f"workflow {self.name!r} has two roles named {role.name!r}")
            self.roles[role.name] = role
            return function

        return register(handler) if handler is not None else register

    def metrics(self, function: Callable[[S, Any], Mapping[str, float]]) -> Callable[..., Mapping[str, float]]:
        """Declare what to report of a run: (final state, input) of a row -> numbers, averaged over rows.

        A key that a row leaves out does not count for that row.
        """
        self._metrics = function
        return function

    def measure(self, record: OutcomeRecord) -> Mapping[str, float]:
        """The workflow's metrics of one finished row; empty where it has none."""
        if self._metrics is None or bytes(record.state) == b"null":
            return {}
        return self._metrics(self.decode_state(bytes(record.state)), msgspec.json.decode(bytes(record.input)))

    def begin(self, line: bytes) -> S:
        """The state of a new row, from its input line. Raises `RowError` if the line does not fit."""
        return self.decode_state(line)

    def decode_state(self, state: bytes, store: Store | None = None) -> S:
        """The state from its wire form; values that lie in the store are read from there when asked for.

        Raises `RowError`.
        """
        try:
            if REF_MARK in state:
                return msgspec.json.decode(state, type=self.state, dec_hook=decoding(store))
            return self._decoder.decode(state)
        except Exception as error:  # also what a struct's own __post_init__ raises
            raise RowError(f"the input does not fit workflow {self.name!r}: {error}") from None

    def lighten(self, state: bytes, least_bytes: int) -> tuple[bytes, list[bytes]]:
        """(wire form of a state with references for its `Large` values of `least_bytes` or more, their bodies).

        Raises `RowError`.
        """
        return lighten(self.decode_state(state), least_bytes)

    def parse_config(self, plain: Mapping[str, Any]) -> msgspec.Struct | None:
        """The workflow's parameters as its config struct. Raises `ConfigError`."""
        if self.config is None:
            if plain:
                raise ConfigError(f"workflow {self.name!r} has no parameters, got {', '.join(plain)}")
            return None
        known = [field.encode_name for field in msgspec.structs.fields(self.config)]
        for name in plain:
            if name not in known:  # a struct of the user's own lets unknown names pass, and with them every typo
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
                raise ConfigError(f"setting at workflow: workflow {self.name!r} has no {name!r}{hint}")
        return parse(dict(plain), self.config, at="workflow")

    def check(self) -> None:
        """Raises `WorkflowError` where a route or a handler cannot work."""
        if self.start not in self.roles:
            raise WorkflowError(f"workflow {self.name!r} starts at {self.start!r}, its roles are {self._names()}")
        for role in self.roles.values():
            for parameter, kind in role.parameters:
                if kind is not LLM and (self.config is None or kind is not self.config):
                    raise WorkflowError(
                        f"role {role.name!r} asks for {parameter!r} of type {kind!r}, which nothing provides"
                    )
                if role.mode != "async" and kind is LLM:
                    raise WorkflowError(
                        f"role {role.name!r} is a plain def, which cannot await {parameter!r}: make it async def"
                    )
            if missing := sorted(role.routes - self.roles.keys()):
                raise WorkflowError(f"role {role.name!r} sends rows to {missing[0]!r}, the roles are {self._names()}")

    def _names(self) -> str:
        return ", ".join(sorted(self.roles)) or "none"
