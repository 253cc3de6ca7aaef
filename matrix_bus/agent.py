"""What a user writes: a workflow, its state, and one handler per role.

class Draft(State):
    topic: str
    text: str = ""

flow = Workflow("draft", state=Draft, start="writer")

@flow.role
async def writer(row: Row[Draft], llm: LLM) -> Next | Outcome: ...
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import random
import sys
import textwrap
import typing
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import msgspec

from .config import Sampling, parse
from .errors import ConfigError, RowError, WorkflowError
from .llm import LLM
from .orchestrator import LEASE_ROLE, Kind, Orchestrator, OutcomeRecord, is_token

ENTRY_POINTS = "matrix_bus.workflows"

S = TypeVar("S", bound=msgspec.Struct)
H = TypeVar("H", bound=Callable[..., Any])


class State(msgspec.Struct, kw_only=True):
    """Base of a workflow's state: fields without a default are read from the input line by name.

    Handlers change it in place; it travels with the row as JSON.
    """


class Next(msgspec.Struct, frozen=True):
    """The row goes on to `role`."""

    role: str


class Outcome(msgspec.Struct, frozen=True):
    """The row ends here."""

    kind: Kind
    reason: str = ""


def to(role: str) -> Next:
    """Send the row to `role`."""
    return Next(role)


def success(reason: str = "") -> Outcome:
    """End the row as a success."""
    return Outcome("success", reason)


def filtered(reason: str) -> Outcome:
    """End the row early, on purpose, with a reason that is counted."""
    return Outcome("filtered", reason)


def failed(reason: str) -> Outcome:
    """End the row as failed; raise an exception instead where there is one to tell about."""
    return Outcome("failed", reason)


class Row(Generic[S]):
    """One row at one hop, as its handler sees it."""

    __slots__ = ("_message", "number", "run", "state", "trials")

    def __init__(self, message: Orchestrator, state: S, trials: int = 1) -> None:
        self._message = message
        self.run = message.run
        self.number = message.n
        self.state = state
        self.trials = trials

    @property
    def id(self) -> str:
        """The input's `id` field, else its line number."""
        return self._message.id

    @property
    def line(self) -> int:
        """Line of the dataset, from 0."""
        return self.number // self.trials

    @property
    def trial(self) -> int:
        """Which of the line's trials this is, from 0."""
        return self.number % self.trials

    @property
    def hop(self) -> int:
        """Handler deliveries of this row so far, this one included."""
        return self._message.hop

    @property
    def attempt(self) -> int:
        """Calls for this hop, this one included: above 1 after a transient error."""
        return self._message.attempt

    @property
    def turn(self) -> int:
        """How often the row has come to this role, this time included."""
        return self._message.visits.get(self._message.role, 0)

    @property
    def seed(self) -> int:
        """31 bits, from the run's seed and the row's place: the same in every repetition."""
        return self._message.seed

    @property
    def rng(self) -> random.Random:
        """A new generator, seeded by row and hop, so that a repeated handler call draws the same."""
        return random.Random(f"{self.seed}:{self.hop}")

    @property
    def input(self) -> Any:
        """The line as submitted."""
        return msgspec.json.decode(self._message.input)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The model calls so far, oldest first, as they will stand in the output. Decoded at each use."""
        return [msgspec.json.decode(call) for call in self._message.history]


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
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "to"
            and len(node.args) == 1
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        )


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
        self._decoder = msgspec.json.Decoder(state)

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
        try:
            return self._decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RowError(f"the input does not fit workflow {self.name!r}: {error}") from None

    def decode_state(self, state: bytes) -> S:
        """The state from its wire form. Raises `RowError`."""
        return self.begin(state)

    def parse_config(self, plain: Mapping[str, Any]) -> msgspec.Struct | None:
        """The workflow's parameters as its config struct. Raises `ConfigError`."""
        if self.config is None:
            if plain:
                raise ConfigError(f"workflow {self.name!r} has no parameters, got {', '.join(plain)}")
            return None
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


Handler = Callable[..., Awaitable[Next | Outcome]]


# --- finding workflows ------------------------------------------------------------------------------------------


def installed_workflows() -> list[str]:
    """Names of the workflows that installed packages offer."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)})


def load_workflow(spec: str) -> Workflow[Any]:
    """A workflow by name (an entry point), by file (`my_flow.py`) or as `module:attribute`.

    Raises `WorkflowError`; an exception of the workflow's own code comes through as its cause.
    """
    if spec.endswith(".py"):
        module = _import_file(Path(spec))
        found = [value for value in vars(module).values() if isinstance(value, Workflow)]
        if len(found) != 1:
            raise WorkflowError(f"{spec} must define one Workflow, it defines {len(found)}")
        flow = found[0]
    else:
        target = spec
        if ":" not in spec:
            points = {p.name: p.value for p in importlib.metadata.entry_points(group=ENTRY_POINTS)}
            if spec not in points:
                raise WorkflowError(
                    f"no workflow named {spec!r}: installed are {', '.join(sorted(points)) or 'none'}; "
                    "a file is given with its .py ending"
                )
            target = points[spec]
        name, _, attribute = target.partition(":")
        module = _import(name, spec)
        there = getattr(module, attribute, None)
        if not isinstance(there, Workflow):
            raise WorkflowError(f"{target} is not a Workflow")
        flow = there
    flow.spec = str(Path(spec).resolve()) if spec.endswith(".py") else spec
    flow.code_hash = _code_hash(module)
    flow.check()
    return flow


def _import(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise WorkflowError(f"workflow {spec!r} cannot be imported: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise WorkflowError(f"no such workflow file: {path}")
    name = f"matrix_bus_workflow_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module  # handlers' annotations and pickling look it up
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise WorkflowError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _code_hash(module: Any) -> str:
    """Over the module's file, or all files of the package that it is."""
    file = Path(module.__file__)
    files = sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]
    digest = hashlib.sha256()
    for source in files:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
