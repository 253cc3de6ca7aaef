"""A workflow and its roles: what is declared, and what is checked before any row travels."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import msgspec

from ..config import Sampling, parse
from ..errors import ConfigError, RowError, WorkflowError
from ..llm import LLM, Message
from ..orchestrator import REF_MARK, OutcomeRecord, is_token
from .large import Store, decoding, lighten
from .resource import Resource
from .role import Role
from .row import Row, S

if TYPE_CHECKING:
    from ..llm import Responder
    from .run_row import RowResult

H = TypeVar("H", bound=Callable[..., Any])


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
        self.resources: dict[Any, Resource] = {}
        """By the type that handlers ask for, in the order of their declaration."""
        self.spec = name
        """What `load_workflow` was given: another process loads the same from it."""
        self.code_hash = ""
        """sha256 of the source, 16 hex digits; set by `load_workflow`."""
        self._metrics: Callable[[S, Any], Mapping[str, float]] | None = None
        self._messages: Callable[[S, Any], Sequence[Message]] | None = None
        self._decoder = msgspec.json.Decoder(state, dec_hook=decoding(None))

    @overload
    def role(self, handler: H, /) -> H: ...
    @overload
    def role(
        self,
        /,
        *,
        name: str = "",
        model: str = "default",
        sampling: Sampling = ...,
        process: bool = False,
        routes: Sequence[str] | None = None,
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
        routes: Sequence[str] | None = None,
    ) -> H | Callable[[H], H]:
        """Declare a role; its name is the function's unless given.

        An `async def` handler runs on the event loop, a plain `def` in a thread, and with `process=True` in a
        process pool, for what burns CPU. `model` is an alias from the run's `llm.models`. `routes` are the roles
        that it may send rows to, for a handler that computes them; else they are read from its source.
        """

        def register(function: H) -> H:
            role = Role(
                name or getattr(function, "__name__", ""),
                function,
                model=model,
                sampling=sampling,
                process=process,
                declared=routes,
            )
            if role.name in self.roles:
                raise WorkflowError(f"workflow {self.name!r} has two roles named {role.name!r}")
            self.roles[role.name] = role
            return function

        return register(handler) if handler is not None else register

    def resource(self, function: H) -> H:
        """Declare what handlers share: a reward model, a database pool. They ask for it by its type.

        The function returns it, or yields it and tidies up afterwards; `async def` on the event loop, a plain `def`
        in a thread. It may take the workflow's config, and resources declared before it. A worker opens one when it
        begins to serve a run that needs it, shares it among the handlers of all runs with the same parameters, and
        closes it when it leaves the last of them. Each process of `process=True` handlers has its own.
        """
        made = Resource(function)
        if made.kind is LLM or made.kind is self.config or made.kind is Row:
            raise WorkflowError(f"resource {made.name!r} makes a {made.kind!r}, which handlers have already")
        if made.kind in self.resources:
            raise WorkflowError(
                f"workflow {self.name!r} has two resources of type {made.kind!r}: "
                f"{self.resources[made.kind].name} and {made.name}"
            )
        for parameter, kind in made.takes:
            if kind not in self.resources and (self.config is None or kind is not self.config):
                raise WorkflowError(
                    f"resource {made.name!r} asks for {parameter!r} of type {kind!r}: it can have the workflow's "
                    "config and resources declared before it"
                )
        self.resources[made.kind] = made
        return function

    def needed(self, kinds: Sequence[Any]) -> list[Resource]:
        """The resources of these types and what they need themselves, each after what it takes."""
        wanted = set(kinds)
        for made in reversed(self.resources.values()):
            if made.kind in wanted:
                wanted.update(kind for _, kind in made.takes)
        return [made for made in self.resources.values() if made.kind in wanted]

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

    def messages(self, function: Callable[[S, Any], Sequence[Message]]) -> Callable[..., Sequence[Message]]:
        """Declare what a row is as a chat to train on (`--messages`): (final state, input) -> its messages.

        None at all leaves the row out. Without this it is the row's last call of a model, with its answer.
        """
        self._messages = function
        return function

    def conversation(self, record: OutcomeRecord) -> Sequence[Message] | None:
        """A finished row as the chat that is declared; None where the workflow declares none."""
        if self._messages is None:
            return None
        if bytes(record.state) == b"null":
            return []
        return self._messages(self.decode_state(bytes(record.state)), msgspec.json.decode(bytes(record.input)))

    def begin(self, line: bytes) -> S:
        """The state of a new row, from its input line. Raises `RowError` if the line does not fit."""
        return self.decode_state(line)

    def decode_state(self, state: bytes, store: Store | None = None) -> S:
        """The state from its wire form; values that lie in the store are read from there when asked for.

        Raises `RowError`.
        """
        try:
            if b"$" in state and REF_MARK in state:  # the first is a tenth of the second, and seldom true
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
            raise WorkflowError(
                f"workflow {self.name!r} starts at {self.start!r}, its roles are {self._names()}"
                + self._near(self.start)
            )
        for role in self.roles.values():
            for problem in self._problems(role):
                raise WorkflowError(problem)

    def _problems(self, role: Role) -> Iterator[str]:
        for parameter, kind in role.parameters:
            resource = self.resources.get(kind)
            if kind is LLM:
                if role.mode != "async":
                    yield f"role {role.name!r} is a plain def, which cannot await {parameter!r}: make it async def"
            elif resource is not None:
                for made in self.needed([kind]) if role.mode == "process" else ():
                    if made.is_async:
                        yield (
                            f"role {role.name!r} runs in a process of its own, which has no event loop for the "
                            f"resource {made.name!r}: make that a plain def"
                        )
            elif self.config is None or kind is not self.config:
                offered = ", ".join(made.name for made in self.resources.values())
                yield (
                    f"role {role.name!r} asks for {parameter!r} of type {kind!r}, which nothing provides"
                    + (f"; the resources are {offered}" if offered else ": @flow.resource declares what does")
                )
        for missing in sorted(set(role.routes.roles) - self.roles.keys()):
            yield f"role {role.name!r} sends rows to {missing!r}, the roles are {self._names()}{self._near(missing)}"

    def _near(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.roles, n=1)
        return f"; did you mean {near[0]!r}?" if near else ""

    def _names(self) -> str:
        return ", ".join(sorted(self.roles)) or "none"

    async def run_row(
        self,
        row: Mapping[str, Any] | bytes,
        *,
        llm: Responder | None = None,
        config: msgspec.Struct | Mapping[str, Any] | None = None,
        resources: Mapping[Any, Any] | None = None,
        seed: int = 0,
        max_attempts: int = 3,
        max_hops: int = 100,
    ) -> RowResult[S]:
        """One row from its first role to its outcome, in this process, without a broker: for tests and notebooks.

        `row` is the input line. `llm` gives the models' answers: a list of them in the order of the calls, or a
        function of the `ChatRequest`, plain or async; an answer is a text, a `Reply`, or an exception to raise.
        `config` are the workflow's parameters; `resources` replaces some by their type, the others are opened.
        A transient error is retried at once, up to `max_attempts` calls of a hop. Raises what a handler raises,
        `RowError` if the line does not fit, `HandlerError` if the row is not done after `max_hops`.
        """
        from .run_row import run_row

        return await run_row(
            self,
            row,
            llm=llm,
            config=config,
            resources=resources or {},
            seed=seed,
            max_attempts=max_attempts,
            max_hops=max_hops,
        )
