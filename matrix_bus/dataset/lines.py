"""The lines of a dataset: numbered, checked, and rejected with their place where they cannot become rows."""

from __future__ import annotations

import codecs
import dataclasses
import reprlib
import sqlite3
import weakref
from collections.abc import Callable, Mapping

import msgspec
from msgspec import Raw, Struct

from ..errors import RowError
from .selection import EVERYTHING, Selection

MAX_LINE_BYTES = 64 << 20
"""Longer lines are rejected unread: one of them must not take the process down."""
MAX_ID_CHARS = 1000
"""An id stands in every message of its row."""


class Line(Struct, frozen=True):
    """One line of a dataset that is not blank."""

    number: int
    """From 0 through all files, blank lines not counted: the row's place."""
    body: bytes
    """JSON, as it stands in the file, without the line end; made anew only where fields are chosen or renamed."""
    id: str
    """The `id` field if the line has one, else the number."""


class Rejected(Struct, frozen=True, omit_defaults=True):
    """A line that cannot become a row."""

    line: int
    """As an editor counts: from 1, blank lines included; of a table or an iterable, the row's place from 1."""
    reason: str
    text: str
    """The beginning of the line, or of the item's repr."""
    file: str = ""
    """Which one, where the dataset has several."""


class _Head(Struct):
    id: str | int | None = None


_head = msgspec.json.Decoder(_Head)
_object = msgspec.json.Decoder(dict[str, Raw])


Check = Callable[[bytes], object]
"""Raises `RowError` for a line that the workflow cannot take."""


class Intake:
    """Numbers and checks the lines of one dataset; what comes from files and from programs goes through here."""

    def __init__(self, check: Check = lambda _: None, select: Selection = EVERYTHING) -> None:
        self._check = check
        self._select = select
        self._at = 0
        self._file = ""
        self._ids = _Ids()
        self.count = 0
        """Lines so far that are not blank."""

    def begin(self, file: str) -> None:
        """What comes now is from the beginning of this file, one of several."""
        self._at, self._file = 0, file

    @property
    def is_full(self) -> bool:
        """Whether no later line is wanted."""
        return self._select.stop is not None and self.count >= self._select.stop

    def take_line(self, raw: bytes) -> Line | Rejected | None:
        """The next line; None if it is blank, or not selected."""
        self._at += 1
        body = (raw.removeprefix(codecs.BOM_UTF8) if self._at == 1 else raw).strip()
        return self._next(body) if body else None

    def take(self, item: object, at: int = 0) -> Line | Rejected | None:
        """The next item of a table or an iterable: a JSON object as text, or what msgspec writes as one.

        `at` is its place, where that is not one after the last.
        """
        if isinstance(item, bytes):
            return self.take_line(item)
        self._at = at or self._at + 1
        try:
            body = _as_json(item)
        except RecursionError:
            return self.reject("nested too deeply", item, at=self._at)
        except (TypeError, ValueError, OverflowError) as error:
            return self.reject(str(error), item, at=self._at)
        return self._next(body) if body else None

    def reject(self, reason: str, found: object, at: int = 0) -> Rejected | None:
        """Counts the next line as one that cannot become a row; None if it was not selected."""
        self._at = at or self._at + 1
        number = self.count
        self.count += 1
        return self._rejected(reason, found) if self._select.has(number) else None

    def _next(self, body: bytes) -> Line | Rejected | None:
        number = self.count
        self.count += 1
        if not self._select.in_window(number):
            return None
        # Lines of other shards are looked at as well, so that every shard sees the same ids as taken.
        line = self._examine(number, body)
        return line if self._select.has(number) else None

    def _examine(self, number: int, body: bytes) -> Line | Rejected:
        if len(body) >= MAX_LINE_BYTES:
            return self._rejected(f"longer than {MAX_LINE_BYTES >> 20} MiB", body)
        try:
            body.decode()
            shaped = self._select.reshape(body)
            identity = _id_of(shaped)
        except UnicodeDecodeError as error:
            return self._rejected(f"not UTF-8: {error.reason} at byte {error.start}", body)
        except RecursionError:
            return self._rejected("nested too deeply", body)
        except msgspec.DecodeError as error:
            return self._rejected(f"not a JSON object: {error}", body)
        except RowError as error:
            return self._rejected(str(error), body)
        try:
            self._check(shaped)
        except RowError as error:
            return self._rejected(str(error), body)
        if identity is None:
            return Line(number, shaped, str(number))
        name = str(identity)
        if len(name) > MAX_ID_CHARS:
            return self._rejected(f"the id is longer than {MAX_ID_CHARS} characters", body)
        place = f"{self._file}:{self._at}" if self._file else str(self._at)
        if (first := self._ids.first(name, place)) != place:
            return self._rejected(f"the id {identity!r} was taken before, by line {first}", body)
        return Line(number, shaped, name)

    def _rejected(self, reason: str, found: object) -> Rejected:
        text = found[:200].decode("utf-8", "replace") if isinstance(found, bytes) else reprlib.repr(found)[:200]
        return Rejected(self._at, reason, text, self._file)


def _id_of(body: bytes) -> str | int | None:
    """The `id` of a JSON object. Raises `msgspec.DecodeError` if it is none, `RowError` if the id cannot be one."""
    try:
        return _head.decode(body).id
    except msgspec.ValidationError as error:
        _object.decode(body)  # raises if it is not the id
        raise RowError(f"the id must be a text or a whole number: {error}") from None


class _Ids:
    """The ids of a dataset so far. In sqlite's private file, not in memory: a dataset may be larger than that."""

    def __init__(self) -> None:
        self._cursor: sqlite3.Cursor | None = None

    def first(self, identity: str, place: str) -> str:
        """Where this id was first seen: here, if never before."""
        cursor = self._cursor or self._open()
        if cursor.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (identity, place)).rowcount == 1:
            return place
        (first,) = cursor.execute("SELECT place FROM ids WHERE id = ?", (identity,)).fetchone()
        return str(first)

    def _open(self) -> sqlite3.Cursor:
        # One thread at a time, but not always the same: iterables are pulled by a pool.
        database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        weakref.finalize(self, database.close)
        database.execute("PRAGMA journal_mode=OFF")  # nobody reads it after a crash
        database.execute("PRAGMA synchronous=OFF")
        database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID")
        database.execute("BEGIN")
        self._cursor = database.cursor()
        return self._cursor


def _as_json(item: object) -> bytes:
    if isinstance(item, str):
        return item.strip().encode()
    is_instance = not isinstance(item, type)
    if is_instance and (isinstance(item, Mapping | Struct) or dataclasses.is_dataclass(item)):
        return msgspec.json.encode(dict(item) if isinstance(item, Mapping) else item)
    kind = item.__name__ if isinstance(item, type) else type(item).__name__
    raise TypeError(f"a row is a mapping, a msgspec struct, a dataclass or a JSON object as text, not {kind}")
