"""An outcome as a row of a table: typed columns for what all outcomes have, and what is found in a run's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

_INT64 = 1 << 63
_MOST_FIELDS = 500
"""A state with more names than that is a dictionary, and stays JSON."""

_encode = msgspec.json.Encoder()


class Column:
    """The type of the values of one column, found by looking at all of them.

    Texts, booleans, whole numbers and numbers have theirs; anything else, and any mixture, is a text of JSON.
    """

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def see(self, value: Any) -> None:
        """Looks at one more value."""
        if value is not None:
            self._kinds.add(_kind(value))

    def type(self) -> Any:
        """The Arrow type."""
        import pyarrow as pa

        match sorted(self._kinds):
            case ["bool"]:
                return pa.bool_()
            case ["int"]:
                return pa.int64()
            case ["float"] | ["float", "int"]:
                return pa.float64()
        return pa.string()

    def cell(self, value: Any) -> Any:
        """The value as the column has it."""
        if value is None or self._kinds in ({"bool"}, {"int"}, {"float"}, {"str"}):
            return value
        return float(value) if self._kinds == {"float", "int"} else _json(value)


def _kind(value: Any) -> str:
    if isinstance(value, bool | str | float):
        return type(value).__name__
    return "int" if isinstance(value, int) and -_INT64 <= value < _INT64 else "json"


def _json(value: Any) -> str:
    return _encode.encode(value).decode()


class Record:
    """The types of the values under each name of an object, such as a state."""

    def __init__(self) -> None:
        self._columns: dict[str, Column] = {}

    def see(self, value: Mapping[str, Any] | None) -> None:
        """Looks at one more object."""
        for name, inner in (value or {}).items():
            self._columns.setdefault(name, Column()).see(inner)

    @property
    def _is_open(self) -> bool:
        return not 0 < len(self._columns) <= _MOST_FIELDS

    def type(self) -> Any:
        """The Arrow type."""
        import pyarrow as pa

        if self._is_open:
            return pa.string()
        return pa.struct([(name, column.type()) for name, column in self._columns.items()])

    def cell(self, value: Mapping[str, Any] | None) -> Any:
        """The object as the column has it."""
        if value is None:
            return None
        if self._is_open:
            return _json(value)
        return {name: column.cell(value.get(name)) for name, column in self._columns.items()}


class Conversation:
    """A column of chat messages, with those fields that occur."""

    def __init__(self) -> None:
        self._fields = Record()

    def see(self, messages: Sequence[Mapping[str, Any]] | None) -> None:
        """Looks at one more conversation."""
        for message in messages or ():
            self._fields.see(message)

    def type(self) -> Any:
        """The Arrow type."""
        import pyarrow as pa

        return pa.list_(self._fields.type())

    def cell(self, messages: Sequence[Mapping[str, Any]] | None) -> Any:
        """The conversation as the column has it."""
        return None if messages is None else [self._fields.cell(message) for message in messages]


class Given:
    """A column whose type is known."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def see(self, value: Any) -> None:
        """Nothing to find out."""

    def type(self) -> Any:
        """The Arrow type."""
        return self._kind

    def cell(self, value: Any) -> Any:
        """The value, with JSON as text where the type says text."""
        return _fitted(value, self._kind)


def _fitted(value: Any, kind: Any) -> Any:
    """A value as Arrow takes it: lists and objects inside follow their types, what has none becomes JSON."""
    import pyarrow as pa

    if value is None:
        return 0 if kind == pa.int64() or kind == pa.float64() else None
    if pa.types.is_struct(kind):
        return {field.name: _fitted(value.get(field.name), field.type) for field in kind}
    if pa.types.is_map(kind):
        return [(name, _fitted(inner, kind.item_type)) for name, inner in value.items()]
    if pa.types.is_list(kind):
        return [_fitted(inner, kind.value_type) for inner in value]
    if pa.types.is_string(kind) and not isinstance(value, str):
        return _json(value)
    return value


AnyColumn = Column | Record | Conversation | Given


def outcome_columns() -> dict[str, AnyColumn]:
    """The columns of a table of outcomes, by the keys of an output line; see docs/output.md."""
    import pyarrow as pa

    text, whole, number = pa.string(), pa.int64(), pa.float64()
    tokens = ("prompt_tokens", "completion_tokens", "cached_tokens", "calls")
    usage = pa.struct([*((name, whole) for name in tokens), ("cost", number)])
    message = pa.struct([(name, text) for name in ("role", "content", "name", "tool_calls", "tool_call_id")])
    call = pa.struct(
        [
            *((name, text) for name in ("role", "model", "endpoint")),
            *((name, whole) for name in ("hop", "attempt")),
            ("sampling", text),
            ("prefix", pa.list_(pa.int32())),
            ("messages", pa.list_(message)),
            *((name, text) for name in ("text", "reasoning", "tool_calls")),
            ("choices", pa.list_(text)),
            ("finish_reason", text),
            ("usage", usage),
            *((name, number) for name in ("started_at", "wait_s", "latency_s", "first_s")),
            ("cached", pa.bool_()),
            ("error", pa.struct([("type", text), ("message", text)])),
        ]
    )
    error = pa.struct(
        [
            *((name, text) for name in ("type", "message", "role")),
            *((name, whole) for name in ("hop", "attempt")),
            ("at", number),
        ]
    )
    timings = [(name, number) for name in ("submitted_at", "admitted_at", "finished_at", "handler_s")]
    given: dict[str, Any] = {
        **dict.fromkeys(("run", "workflow", "id"), text),
        **dict.fromkeys(("row", "line", "trial", "generation", "seed"), whole),
        "input": text,
        "outcome": text,
        "reason": text,
        "state": None,
        "history": pa.list_(call),
        "usage": usage,
        "usage_by_role": pa.map_(text, usage),
        "errors": pa.list_(error),
        "hops": whole,
        "attempts": whole,
        "timings": pa.struct(timings),
        "history_cut": whole,
        "schema": whole,
    }
    return {name: Record() if kind is None else Given(kind) for name, kind in given.items()}


def schema_of(columns: Mapping[str, AnyColumn]) -> Any:
    """The Arrow schema of these columns."""
    import pyarrow as pa

    return pa.schema([(name, column.type()) for name, column in columns.items()])
