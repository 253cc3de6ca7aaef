"""The workflows on a bus: what their workers announce, for clients that do not have the code.

One key per workflow in a bucket of its own; the newest announcement wins. A worker that may not write here works
all the same, its workflow is then only known to those who have it.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from .agent import Large, Workflow
from .bus import STREAM_NOT_FOUND, Bus, Stored, create_bucket
from .errors import BusError, ConfigError, PublishRefused, RowError, RunError
from .orchestrator import is_token
from .telemetry import logger

BUCKET = "mb_workflows"
STREAM = f"KV_{BUCKET}"
SCHEMA = 1

log = logger("catalog")


class WorkflowInfo(Struct, frozen=True, kw_only=True):
    """A workflow as its workers announce it; the value of its key, as JSON."""

    name: str
    code_hash: str
    """Of the source that the announcing worker runs; a run is made for it."""
    roles: list[str]
    start: str
    input: dict[str, Any] | None = None
    """JSON schema of an input line; None where the state's types have none."""
    config: dict[str, Any] | None = None
    """JSON schema of the workflow's own parameters; None where their types have none."""
    schema: int = SCHEMA
    """Version of this struct: a reader refuses what is newer than itself."""

    @property
    def parsed_fields(self) -> frozenset[str]:
        """Fields of an input line that cannot be text: a table's cells in them have to be read."""
        fields = _properties(self.input) if self.input is not None else {}
        return frozenset(name for name, kind in fields.items() if not _admits_text(kind, self.input or {}))

    def row_check(self) -> Callable[[bytes], None]:
        """What raises `RowError` for a line that the input schema does not allow; compiled at each call."""
        if self.input is None:
            return lambda line: None
        explain = _compiled(self.input)

        def check(line: bytes) -> None:
            try:
                wrong = explain(msgspec.json.decode(line))
            except ValueError as error:  # an integer beyond what the validator takes, broken text
                wrong = str(error)
            if wrong:
                raise RowError(f"the input does not fit workflow {self.name!r}: {wrong}")

        return check

    def parse_config(self, plain: Mapping[str, Any]) -> None:
        """Raises `ConfigError` where the parameters do not fit their schema, or have names it does not know."""
        if self.config is None:
            return
        known = list(_properties(self.config))
        for name in plain:
            if name not in known:
                if not known:
                    raise ConfigError(f"workflow {self.name!r} has no parameters, got {', '.join(plain)}")
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
                raise ConfigError(f"setting at workflow: workflow {self.name!r} has no {name!r}{hint}")
        if wrong := _compiled(self.config)(dict(plain)):
            raise ConfigError(f"setting of workflow {self.name!r}: {wrong}")


_decode = msgspec.json.Decoder(WorkflowInfo)


def describe(flow: Workflow[Any]) -> WorkflowInfo:
    """What is announced of a workflow."""
    nothing: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    return WorkflowInfo(
        name=flow.name,
        code_hash=flow.code_hash,
        roles=list(flow.roles),
        start=flow.start,
        input=_json_schema(flow.state),
        config=nothing if flow.config is None else _json_schema(flow.config),
    )


def _json_schema(kind: type) -> dict[str, Any] | None:
    try:
        return msgspec.json.schema(_without_odd_defaults(kind), schema_hook=_large)
    except Exception as error:  # a type of the user's own, or a default that JSON has no form for
        log.info("catalog.no_schema", type=repr(kind), error=str(error).partition("\n")[0])
        return None


def _without_odd_defaults(kind: type[Struct]) -> type:
    """The struct without those defaults that a schema cannot show, such as `Large("")`: they stay optional."""
    fields = msgspec.structs.fields(kind)
    odd = set()
    for field in fields:
        try:
            msgspec.to_builtins(None if field.default is msgspec.NODEFAULT else field.default)
        except TypeError:
            odd.add(field.name)
    if not odd:
        return kind
    hints = typing.get_type_hints(kind, include_extras=True)
    unshown = {name: msgspec.field(default_factory=object) for name in odd}
    shown = [
        (field.encode_name, hints[field.name], unshown[field.name] if field.name in odd else _default(field))
        for field in fields
    ]
    strict = kind.__struct_config__.forbid_unknown_fields
    return msgspec.defstruct(kind.__name__, shown, kw_only=True, forbid_unknown_fields=strict)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default is not msgspec.NODEFAULT:
        return msgspec.field(default=field.default)
    if field.default_factory is not msgspec.NODEFAULT:
        return msgspec.field(default_factory=field.default_factory)
    return msgspec.field()


def _large(kind: type) -> dict[str, Any]:
    if kind is Large:
        return {"description": "of any size"}
    raise NotImplementedError


async def prepare(bus: Bus, replicas: int = 1) -> None:
    """Creates the bucket, if it is not there yet, on so many servers of a cluster."""
    await create_bucket(bus, BUCKET, replicas)


async def announce(bus: Bus, info: WorkflowInfo, *, replace: bool = True) -> bool:
    """Writes the workflow's description where it differs from what is there; False, and a log line, if it cannot.

    With `replace=False` only where there is none.
    """
    try:
        there, body = await _get(bus, info.name), msgspec.json.encode(info)
        if there is None:
            await prepare(bus)
        if there is None or (replace and there != body):
            await bus.publish(_key(info.name), body)
    except BusError as error:
        log.warning("catalog.not_announced", workflow=info.name, error=str(error))
        return False
    return True


async def find(bus: Bus, name: str) -> WorkflowInfo:
    """The workflow of this name. Raises `RunError` if nobody has announced it, naming those there are."""
    body = await _get(bus, name)
    if body is None:
        known = [info.name for info in await workflows(bus)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise RunError(
            f"no worker has announced a workflow {name!r} on this broker{hint}; announced are: "
            f"{', '.join(known) or 'none'}. Start `matrix-bus worker --workflow {name}.py` there once, or pass the "
            "Workflow object itself: bus.submit(flow, rows)"
        )
    try:
        info = _decode.decode(body)
    except msgspec.DecodeError as error:
        raise RunError(f"the announcement of workflow {name!r} cannot be read: {error}") from None
    if info.schema > SCHEMA:
        raise RunError(f"workflow {name!r} was announced by a newer matrix-bus: upgrade this one")
    return info


async def workflows(bus: Bus) -> list[WorkflowInfo]:
    """All workflows that were announced and can be read, by name. Raises `BusError`."""
    stored = [message async for message in bus.read_if_there(STREAM)]
    found = [info for message in stored if (info := _readable(message)) is not None]
    return sorted(found, key=lambda info: info.name)


def _readable(message: Stored) -> WorkflowInfo | None:
    try:
        return _decode.decode(message.data)
    except msgspec.DecodeError as error:
        log.warning("catalog.unreadable", key=message.subject, error=str(error))
        return None


async def _get(bus: Bus, name: str) -> bytes | None:
    if not is_token(name):
        return None
    try:
        stored = await bus.last(STREAM, _key(name))
    except PublishRefused as error:
        if error.code != STREAM_NOT_FOUND:
            raise
        return None  # nobody has announced anything here yet
    return stored.data if stored is not None else None


def _key(name: str) -> str:
    return f"$KV.{BUCKET}.{name}"


# --- errors in people's words -----------------------------------------------------------------------------------


def _compiled(schema: dict[str, Any]) -> Callable[[Any], str]:
    """What says why a value does not fit the schema, with its path; empty if it does."""
    import jsonschema_rs

    validator = jsonschema_rs.validator_for(schema)

    def explain(value: Any) -> str:
        return "" if validator.is_valid(value) else _explain(next(validator.iter_errors(value)))

    return explain


def _explain(error: Any) -> str:
    """One error as text. Of the branches of a union the one counts that was followed deepest."""
    kind = error.kind
    branches = [inner for branch in getattr(kind, "context", ()) for inner in branch]
    if branches:
        return _explain(max(branches, key=lambda inner: len(inner.instance_path)))
    path = "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
    text = error.message if len(error.message) < 300 else f"{error.message[:150]} … {error.message[-150:]}"
    hint = ""
    if kind.name == "required" and isinstance(error.instance, dict):
        near = difflib.get_close_matches(kind.property, list(error.instance), n=1)
        hint = f"; was it meant by {near[0]!r}?" if near else ""
    return f"{text} - at `{path}`{hint}"


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    """The fields of the object that a schema describes."""
    name = schema.get("$ref", "").rpartition("/")[2]
    properties: dict[str, Any] = (schema["$defs"][name] if name else schema).get("properties", {})
    return properties


def _admits_text(kind: dict[str, Any], schema: dict[str, Any]) -> bool:
    if "$ref" in kind:
        return _admits_text(schema["$defs"][kind["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in kind:
        return any(_admits_text(branch, schema) for branch in kind["anyOf"])
    if "enum" in kind:
        return any(isinstance(value, str) for value in kind["enum"])
    return bool(kind.get("type", "string") == "string")
