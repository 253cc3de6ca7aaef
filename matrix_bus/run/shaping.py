"""An output in another form than one line per outcome: chosen rows and fields, chats, tables, in order, in parts.

Outcomes are written as they come into a journal beside the output, which is continued after a crash like any output.
From it the files are made in one go, so that they are whole or not there, whatever their form.
"""

from __future__ import annotations

import importlib.util
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw, Struct

from ..agent import Workflow
from ..dataset import LinesPart, Part, Parts, Shard, TablePart, Written, at_path, free_name, suffix_of
from ..errors import DatasetError, RowError, UsageError
from ..llm import assistant, full_messages, read_call
from ..orchestrator import OutcomeRecord, decode_outcome
from .table import AnyColumn, Column, Conversation, Given, outcome_columns, schema_of

_RUN_MARK = "_run"
"""File of a folder of parts that says whose they are; readers of such folders pass over its name."""
_fields = msgspec.json.Decoder(dict[str, Raw])


class Shape(Struct, frozen=True, kw_only=True):
    """What an output is to be like, beside what its name says (`.jsonl`, also `.gz` and `.zst`, `.parquet`)."""

    success_only: bool = False
    fields: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(name in the output, path in an outcome line); empty: all."""
    messages: bool = False
    """Each row as a chat, `messages`, for training; beside it `id`, or the chosen fields."""
    messages_of: str = ""
    """The role whose last call is that chat; empty: what the workflow declares, else the row's last call."""
    ordered: bool = False
    """By row, not as they finished."""
    part_bytes: int | None = None
    """A folder with parts of about this size."""
    shard: Shard = Shard()
    """Only these rows: several collectors share a folder."""

    def is_plain(self, path: Path) -> bool:
        """Whether the output is the outcome lines themselves, as they come."""
        return self == Shape() and suffix_of(path.name) != ".parquet" and not path.name.endswith(".gz")

    def check(self, path: Path) -> None:
        """Raises `UsageError` if this cannot be written there."""
        if self == Shape() and not path.name.endswith(".parquet"):
            return
        if self.shard.count > 1 and self.part_bytes is None:
            raise UsageError("collectors that share an output each write parts of it: give a size with --part-mb")
        if suffix_of(path.name) not in (".jsonl", ".ndjson", ".parquet"):
            raise UsageError(f"{path} names no form of output: .jsonl, .jsonl.gz, .jsonl.zst or .parquet")
        if suffix_of(path.name) == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise UsageError(f"{path} needs pyarrow, which is not installed: pip install 'matrix-bus[parquet]'")


def parse_fields(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """From `id,question,answer=state.text`: the last word of a path is its name. Raises `UsageError`."""
    found: dict[str, tuple[str, ...]] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, given, path = word.partition("=")
        name, path = (name, path) if given else (word.rpartition(".")[2], word)
        if not name or not path:
            raise UsageError(f"{word!r} names no field: state.answer does, and answer=state.answer under another name")
        if name in found:
            raise UsageError(f"two fields are named {name!r}: give one another name, as in other={path}")
        found[name] = tuple(path.split("."))
    return tuple(found.items())


def journal_of(path: Path, shape: Shape) -> Path:
    """Where the outcomes of an output that is not plain are gathered first."""
    label = f".{_label(shape)}" if _label(shape) else ""
    return path.with_name(f"{path.name}{label}.outcomes.jsonl")


def _label(shape: Shape) -> str:
    return f"{shape.shard.index}of{shape.shard.count}" if shape.shard.count > 1 else ""


def claim(path: Path, run: str, shape: Shape) -> None:
    """Begins, or joins, the folder of parts that several collectors share.

    Raises `DatasetError` if it is another run's, or a folder where a file is to be.
    """
    if shape.part_bytes is None and path.is_dir():
        raise DatasetError(f"{path} is a folder: name a file for the output, or have parts in it with --part-mb")
    if shape.shard.count == 1:
        return
    mark = path / _RUN_MARK
    try:
        path.mkdir(parents=True, exist_ok=True)
        theirs = [there for there in path.iterdir() if not there.name.startswith(_RUN_MARK)]
        if theirs and not mark.exists():  # in this order: others may begin it at this moment
            raise DatasetError(f"{path} has files already that are not of run {run!r}: name another folder")
        if not mark.exists():
            whole = path / f"{_RUN_MARK}.{secrets.token_hex(4)}"
            whole.write_text(run)
            whole.replace(mark)
        if (other := mark.read_text()) != run:
            raise DatasetError(f"{path} has outcomes of run {other!r}: name another folder")
    except OSError as error:
        raise DatasetError(f"cannot write {path}: {error}") from None


def write_shaped(journal: Path, target: Path, shape: Shape, flow: Workflow[Any] | None, *, ours: bool) -> Written:
    """Makes the files of an output from its journal.

    What is there under their name is replaced if it is `ours`, else kept aside. Raises `DatasetError`.
    """
    rows = _Rows(journal, shape, flow)
    columns = _columns(rows, shape) if suffix_of(target.name) == ".parquet" else None
    schema = None if columns is None else schema_of(columns)

    def opened(scratch: Path, name: str) -> Part:
        return LinesPart(scratch, name) if schema is None else TablePart(scratch, schema)

    kept = None
    if target.exists() and not ours and shape.shard.count == 1:
        kept = free_name(target)
        target.rename(kept)
    parts = Parts(target, opened, shape.part_bytes, _label(shape))
    try:
        for size, row in rows:
            if columns is None:
                parts.add(row, size)
            else:
                plain = {name: _plain(row.get(name)) for name in columns}
                parts.add({name: column.cell(plain[name]) for name, column in columns.items()}, size)
        files = parts.finish()
    except BaseException:
        parts.abandon()
        raise
    return Written(files, parts.rows, kept)


def newest_lines(journal: Path, *, ordered: bool = False) -> Iterator[bytes]:
    """The outcome lines of a journal, of each row only the newest generation's."""
    with open(journal, "rb") as file:
        places = sqlite3.connect("", isolation_level=None)  # a private file: there may be more rows than memory
        try:
            if not _index(file, places) and not ordered:
                file.seek(0)
                yield from file
                return
            by = "row" if ordered else "at"
            for at, size in places.execute(f"SELECT at, size FROM places ORDER BY {by}"):  # noqa: S608 - one of two
                file.seek(at)
                yield file.read(size)
        finally:
            places.close()


class _Place(Struct):
    row: int
    generation: int


_place = msgspec.json.Decoder(_Place)


def _index(file: Any, places: sqlite3.Connection) -> bool:
    """Notes where each row's newest line is; whether any row has older ones."""
    places.execute("PRAGMA synchronous=OFF")
    places.execute("CREATE TABLE places (row INTEGER PRIMARY KEY, generation INTEGER, at INTEGER, size INTEGER)")
    places.execute("BEGIN")
    at, older = 0, False
    for line in file:
        found = _place.decode(line)
        older = older or found.generation > 0
        places.execute(
            "INSERT INTO places VALUES (?1, ?2, ?3, ?4) ON CONFLICT (row) DO UPDATE SET generation = ?2, at = ?3, "
            "size = ?4 WHERE ?2 > generation",
            (found.row, found.generation, at, len(line)),
        )
        at += len(line)
    return older


class _Rows:
    """The rows of a shaped output; can be gone through again."""

    def __init__(self, journal: Path, shape: Shape, flow: Workflow[Any] | None) -> None:
        self._journal = journal
        self._shape = shape
        self._flow = flow

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(bytes, row), the values as they stand in JSON."""
        shape = self._shape
        for line in newest_lines(self._journal, ordered=shape.ordered):
            found = _fields.decode(line)
            if shape.success_only and bytes(found["outcome"]) != b'"success"':
                continue
            row: dict[str, Any] = found
            if shape.fields:
                row = {name: at_path(found, list(path)) for name, path in shape.fields}
            elif shape.messages:
                row = {"id": found["id"]}
            if shape.messages:
                messages = conversation(decode_outcome(line), self._flow, shape.messages_of)
                if messages is None:
                    continue
                row = {**row, "messages": messages}
            yield len(line), row


def conversation(record: OutcomeRecord, flow: Workflow[Any] | None, role: str = "") -> list[dict[str, Any]] | None:
    """A row as a chat: that of the role's last call, else as its workflow says, else that of its last call.

    None if it has none.
    """
    if not role and flow is not None and flow.name == record.workflow:
        declared = flow.conversation(record)
        if declared is not None:
            return [msgspec.to_builtins(message) for message in declared] or None
    history = [bytes(line) for line in record.history]
    for index in range(len(history) - 1, -1, -1):
        try:
            call = read_call(history[index])
            if call.error is not None or (role and call.role != role):
                continue
            messages: list[dict[str, Any]] = [msgspec.to_builtins(m) for m in full_messages(history, index)]
        except RowError:  # its segment was lost
            continue
        reply: dict[str, Any] = msgspec.to_builtins(assistant(call.text, call.tool_calls or None))
        return [*messages, {**reply, "reasoning_content": call.reasoning} if call.reasoning else reply]
    return None


def _columns(rows: _Rows, shape: Shape) -> dict[str, AnyColumn]:
    """The columns of a table, typed by looking at all rows."""
    known = outcome_columns()
    columns: dict[str, AnyColumn] = known
    if shape.fields:
        columns = {
            name: known[path[0]] if len(path) == 1 and path[0] in known else Column() for name, path in shape.fields
        }
    elif shape.messages:
        columns = {"id": known["id"]}
    if shape.messages:
        columns["messages"] = Conversation()
    looked_at: dict[str, Callable[[Any], None]] = {
        name: column.see for name, column in columns.items() if not isinstance(column, Given)
    }
    if looked_at:
        for _, row in rows:
            for name, see in looked_at.items():
                see(_plain(row.get(name)))
    return columns


def _plain(value: Any) -> Any:
    return msgspec.json.decode(value) if isinstance(value, Raw) else value
