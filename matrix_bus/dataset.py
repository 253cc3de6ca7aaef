"""Files in and out: lines of a dataset, and an output that continues where it was killed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import zstandard
from msgspec import Raw, Struct

from .errors import DatasetError

MAX_LINE_BYTES = 64 << 20
"""Longer lines are rejected unread: one of them must not take the process down."""


class Line(Struct, frozen=True):
    """One line of a dataset that is not blank."""

    number: int
    """From 0, blank lines not counted: the row's place."""
    body: bytes
    """As it stands in the file, without the line end."""
    id: str
    """The `id` field if the line has one, else the number."""


class Rejected(Struct, frozen=True):
    """A line that cannot become a row."""

    line: int
    """As an editor counts: from 1, blank lines included."""
    reason: str
    text: str
    """The beginning of the line."""


class _Head(Struct):
    id: Raw | None = None


_decode_head = msgspec.json.Decoder(_Head)
_decode_id = msgspec.json.Decoder(str | int)


def read(path: str) -> Iterator[Line | Rejected]:
    """The lines of a JSONL file (`.zst` is decompressed, `-` is stdin), in order.

    Raises `DatasetError` if the file cannot be read at all.
    """
    number = 0
    try:
        with _open(path) as file:
            for at, raw in enumerate(_lines(file), start=1):
                body = raw.strip()
                if not body:
                    continue
                if len(body) >= MAX_LINE_BYTES:
                    yield Rejected(at, f"longer than {MAX_LINE_BYTES >> 20} MiB", _excerpt(body))
                else:
                    yield _parse(at, number, body)
                number += 1
    except (OSError, zstandard.ZstdError, EOFError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from None
    if number == 0:
        raise DatasetError(f"{path} has no rows: a dataset is one JSON object per line")


def _parse(at: int, number: int, body: bytes) -> Line | Rejected:
    try:
        body.decode()
        head = _decode_head.decode(body)
        identity = str(_decode_id.decode(head.id)) if head.id is not None else str(number)
    except UnicodeDecodeError as error:
        return Rejected(at, f"not UTF-8: {error.reason} at byte {error.start}", _excerpt(body))
    except RecursionError:
        return Rejected(at, "nested too deeply", _excerpt(body))
    except msgspec.DecodeError as error:
        return Rejected(at, f"not a JSON object: {error}", _excerpt(body))
    return Line(number, body, identity)


def _excerpt(body: bytes) -> str:
    return body[:200].decode("utf-8", "replace")


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of at most `MAX_LINE_BYTES`; the rest of a longer one is skipped."""
    while line := file.readline(MAX_LINE_BYTES):
        yield line
        while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        yield sys.stdin.buffer
        return
    if Path(path).is_dir():
        raise DatasetError(f"{path} is a folder: name a file")
    with open(path, "rb") as file:
        if path.endswith(".zst"):
            with zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
                yield io.BufferedReader(stream)
        else:
            yield file


def fingerprint(path: str) -> str:
    """16 hex digits that change when the file's size, beginning or end does; empty for stdin."""
    if path == "-":
        return ""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for at in (0, max(0, size - (1 << 20))):
                file.seek(at)
                digest.update(file.read(1 << 20))
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error}") from None
    return digest.hexdigest()[:16]


class _Mark(Struct):
    """How far an output is surely written."""

    run: str
    next_seq: int
    size_bytes: int
    lines: int


class Output:
    """An output file under way: what it holds beyond the last `flush` is cut off and written again after a crash.

    The mark beside the file (`<file>.progress`) says up to which byte it is whole, and from which message on to
    continue; it is removed by `finish`.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self._mark_path = path.with_name(path.name + ".progress")
        self._mark = self._read_mark(run)
        self.kept: Path | None = None
        """Where an earlier file of another run was moved to."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._mark.size_bytes == 0 and path.exists() and path.stat().st_size and not self._unfinished(run):
            self.kept = _free_name(path)
            path.rename(self.kept)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by finish() and close()
        self._file.truncate(self._mark.size_bytes)
        self._compressor = zstandard.ZstdCompressor(level=3) if path.name.endswith(".zst") else None
        self._buffer: list[bytes] = []
        self._write_mark()

    def _unfinished(self, run: str) -> bool:
        return self._mark_path.exists() and self._mark.run == run

    def _read_mark(self, run: str) -> _Mark:
        fresh = _Mark(run, 1, 0, 0)
        try:
            mark = msgspec.json.decode(self._mark_path.read_bytes(), type=_Mark)
            whole = self.path.stat().st_size >= mark.size_bytes
        except (OSError, msgspec.DecodeError):
            return fresh
        return mark if whole and mark.run == run else fresh

    @property
    def next_seq(self) -> int:
        """Sequence of the first outcome that is not surely in the file."""
        return self._mark.next_seq

    @property
    def lines(self) -> int:
        """Lines surely in the file."""
        return self._mark.lines

    def add(self, line: bytes, seq: int) -> None:
        """Takes the outcome with this stream sequence; written by the next `flush`."""
        self._buffer.append(line)
        self._mark.next_seq = seq + 1

    def flush(self) -> None:
        """Writes what was added, to the disk. Raises `DatasetError` if the disk does not take it."""
        if not self._buffer:
            return
        block = b"\n".join(self._buffer) + b"\n"
        try:
            self._file.write(self._compressor.compress(block) if self._compressor else block)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DatasetError(f"cannot write {self.path}: {error}; nothing is lost, collect again") from None
        self._mark.size_bytes = self._file.tell()
        self._mark.lines += len(self._buffer)
        self._buffer.clear()
        self._write_mark()

    def _write_mark(self) -> None:
        write_atomically(self._mark_path, msgspec.json.encode(self._mark))

    def close(self) -> None:
        """Leaves the file to be continued later."""
        self._file.close()

    def finish(self) -> None:
        """The file is complete: the mark is no longer needed."""
        self.flush()
        self._file.close()
        self._mark_path.unlink(missing_ok=True)


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate


def write_atomically(path: Path, body: bytes) -> None:
    """Replaces a file as a whole: a reader sees the old or the new one. Raises `DatasetError`."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise DatasetError(f"cannot write {path}: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
