"""The lines of a dataset: numbered, checked, and rejected with their place where they cannot become rows."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import difflib
import io
import reprlib
import shutil
import sqlite3
import sys
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec
import zstandard
from msgspec import Raw, Struct

from ..errors import DatasetError, RowError

MAX_LINE_BYTES = 64 << 20
"""Longer lines are rejected unread: one of them must not take the process down."""
MAX_ID_CHARS = 1000
"""An id stands in every message of its row."""


class Line(Struct, frozen=True):
    """One line of a dataset that is not blank."""

    number: int
    """From 0, blank lines not counted: the row's place."""
    body: bytes
    """JSON, as it stands in the file, without the line end."""
    id: str
    """The `id` field if the line has one, else the number."""


class Rejected(Struct, frozen=True):
    """A line that cannot become a row."""

    line: int
    """As an editor counts: from 1, blank lines included; of an iterable, the item's place from 1."""
    reason: str
    text: str
    """The beginning of the line, or of the item's repr."""


class _Head(Struct):
    id: Raw = Raw(b"null")


_decode_head = msgspec.json.Decoder(_Head)
_decode_id = msgspec.json.Decoder(str | int | None)


Check = Callable[[bytes], object]
"""Raises `RowError` for a line that the workflow cannot take."""


class Intake:
    """Numbers and checks the lines of one dataset; what comes from a file and from a program goes through here."""

    def __init__(self, check: Check = lambda _: None) -> None:
        self._check = check
        self._at = 0
        self._ids = _Ids()
        self.count = 0
        """Lines so far that are not blank."""

    def take_line(self, raw: bytes) -> Line | Rejected | None:
        """The next line; None if it is blank."""
        self._at += 1
        body = (raw.removeprefix(codecs.BOM_UTF8) if self._at == 1 else raw).strip()
        return self._examine(body) if body else None

    def take(self, item: object) -> Line | Rejected | None:
        """The next item of an iterable: a JSON object as text, or what msgspec writes as one."""
        if isinstance(item, bytes):
            return self.take_line(item)
        self._at += 1
        try:
            body = _as_json(item)
        except RecursionError:
            return self._reject("nested too deeply", item)
        except (TypeError, ValueError, OverflowError) as error:
            return self._reject(str(error), item)
        return self._examine(body) if body else None

    def _examine(self, body: bytes) -> Line | Rejected:
        if len(body) >= MAX_LINE_BYTES:
            return self._reject(f"longer than {MAX_LINE_BYTES >> 20} MiB", body)
        try:
            body.decode()
            head = _decode_head.decode(body)
        except UnicodeDecodeError as error:
            return self._reject(f"not UTF-8: {error.reason} at byte {error.start}", body)
        except RecursionError:
            return self._reject("nested too deeply", body)
        except msgspec.DecodeError as error:
            return self._reject(f"not a JSON object: {error}", body)
        try:
            identity = _decode_id.decode(head.id)
        except msgspec.DecodeError as error:
            return self._reject(f"the id must be a text or a whole number: {error}", body)
        try:
            self._check(body)
        except RowError as error:
            return self._reject(str(error), body)
        if identity is not None:
            if len(str(identity)) > MAX_ID_CHARS:
                return self._reject(f"the id is longer than {MAX_ID_CHARS} characters", body)
            if (first := self._ids.first(str(identity), self._at)) != self._at:
                return self._reject(f"the id {identity!r} was taken before, by line {first}", body)
        self.count += 1
        return Line(self.count - 1, body, str(self.count - 1 if identity is None else identity))

    def _reject(self, reason: str, found: object) -> Rejected:
        self.count += 1
        text = found[:200].decode("utf-8", "replace") if isinstance(found, bytes) else reprlib.repr(found)[:200]
        return Rejected(self._at, reason, text)


class _Ids:
    """The ids of a dataset so far. In sqlite's private file, not in memory: a dataset may be larger than that."""

    def __init__(self) -> None:
        self._database: sqlite3.Connection | None = None

    def first(self, identity: str, at: int) -> int:
        """Where this id was first seen: here, if never before."""
        if self._database is None:
            # One thread at a time, but not always the same: iterables are pulled by a pool.
            self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            weakref.finalize(self, self._database.close)
            self._database.execute("PRAGMA synchronous=OFF")
            self._database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, at INTEGER) WITHOUT ROWID")
            self._database.execute("BEGIN")
        taken = self._database.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (identity, at)).rowcount == 1
        if taken:
            return at
        (first,) = self._database.execute("SELECT at FROM ids WHERE id = ?", (identity,)).fetchone()
        return int(first)


def read(path: str, check: Check = lambda _: None) -> Generator[Line | Rejected, None, None]:
    """The lines of a JSONL file (`.zst` is decompressed, `-` is stdin), in order.

    Raises `DatasetError` if the file cannot be read at all, or only in part.
    """
    intake = Intake(check)
    try:
        with open_lines(path) as file:
            for raw in _lines(file):
                if (line := intake.take_line(raw)) is not None:
                    yield line
    except (OSError, zstandard.ZstdError, EOFError) as error:
        raise unreadable(path, error) from None
    if intake.count == 0:
        raise DatasetError(f"{path} has no rows: a dataset is one JSON object per line")


@contextlib.contextmanager
def repeatable(path: str, *, twice: bool) -> Iterator[str]:
    """The path of the same lines, to be read `twice` perhaps: stdin is copied into a file for that time."""
    if path != "-" or not twice:
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="matrix-bus-", suffix=".jsonl") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.flush()
        yield copy.name


def _as_json(item: object) -> bytes:
    if isinstance(item, str):
        return item.strip().encode()
    is_instance = not isinstance(item, type)
    if is_instance and (isinstance(item, Mapping | Struct) or dataclasses.is_dataclass(item)):
        return msgspec.json.encode(dict(item) if isinstance(item, Mapping) else item)
    kind = item.__name__ if isinstance(item, type) else type(item).__name__
    raise TypeError(f"a row is a mapping, a msgspec struct, a dataclass or a JSON object as text, not {kind}")


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of at most `MAX_LINE_BYTES`; the rest of a longer one is skipped."""
    while line := file.readline(MAX_LINE_BYTES):
        yield line
        while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)


@contextlib.contextmanager
def open_lines(path: str) -> Iterator[IO[bytes]]:
    """A file of lines, decompressed; `-` is stdin."""
    if path == "-":
        yield sys.stdin.buffer
        return
    with open(path, "rb") as file:
        if path.endswith(".zst"):
            yield io.BufferedReader(_Zstd(file), 1 << 20)
        else:
            yield file


def unreadable(path: str, error: Exception) -> DatasetError:
    """What to raise for a file that could not be read."""
    if isinstance(error, IsADirectoryError):
        return DatasetError(f"{path} is a folder: name a file")
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    hint = ""
    if isinstance(error, FileNotFoundError):
        there = [file.name for file in Path(path).parent.glob("*")]
        near = difflib.get_close_matches(Path(path).name, there, n=1)
        hint = f"; did you mean {Path(path).with_name(near[0])}?" if near else ""
    return DatasetError(f"cannot read {path}: {why}{hint}")


class _Zstd(io.RawIOBase):
    """Decompressed frames of a file. zstandard's own reader takes a file that is cut off for one that has ended."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            block = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = zstandard.ZstdDecompressor().decompressobj(), False
            block = block or self._file.read(1 << 18)
            if not block:
                if self._begun:
                    raise EOFError("the file ends inside a zstd frame: it is cut off")
                return 0
            self._begun = True
            self._ready = self._frame.decompress(block)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
