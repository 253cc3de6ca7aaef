"""An output file that is whole after a crash at any byte."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zstandard
from msgspec import Struct

from ..errors import DatasetError
from .formats import open_lines


class _Place(Struct):
    """Which outcome a line of an output is."""

    row: int
    generation: int


_decode_place = msgspec.json.Decoder(_Place)


class _Mark(Struct):
    """How far an output is surely written."""

    run: str
    next_seq: int
    size_bytes: int
    lines: int
    passed: int = 0
    """Outcomes before `next_seq` that are for other collectors of a shared output."""


class Output:
    """An output file under way: what it holds beyond the last `flush` is cut off and written again after a crash.

    The mark beside the file (`<file>.progress`) says up to which byte it is whole, and from which message on to
    continue; it is removed by `finish`.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self._mark_path = path.with_name(path.name + ".progress")
        self.kept: Path | None = None
        """Where an earlier file of another run was moved to."""
        mark = self._read_mark()
        if path.is_dir():
            raise DatasetError(f"{path} is a folder: name a file for the output")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            size = path.stat().st_size if path.exists() else 0
            ours = mark is not None and mark.run == run
            if size and not ours:
                self.kept = free_name(path)
                path.rename(self.kept)
            # A file that is shorter than its mark was replaced by somebody: begin anew.
            self._mark = mark if mark is not None and ours and size >= mark.size_bytes else _Mark(run, 1, 0, 0)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by finish() and close()
            self._file.truncate(self._mark.size_bytes)
        except OSError as error:
            raise DatasetError(f"cannot write {path}: {error}") from None
        self.continued = self._mark.next_seq > 1
        """Whether it was begun before, by a collector that was interrupted."""
        self._compressor = zstandard.ZstdCompressor(level=3) if path.name.endswith(".zst") else None
        self._buffer: list[bytes] = []
        self._write_mark()

    def _read_mark(self) -> _Mark | None:
        try:
            return msgspec.json.decode(self._mark_path.read_bytes(), type=_Mark)
        except (OSError, ValueError, RecursionError):  # none, or not one of ours
            return None

    @property
    def next_seq(self) -> int:
        """Sequence of the first outcome that is not surely in the file."""
        return self._mark.next_seq

    @property
    def lines(self) -> int:
        """Lines surely in the file."""
        return self._mark.lines

    @property
    def seen(self) -> int:
        """Outcomes before `next_seq`, those that were passed over included."""
        return self._mark.lines + self._mark.passed

    def pass_over(self, seq: int) -> None:
        """The outcome with this stream sequence is for somebody else."""
        self._mark.passed += 1
        self._mark.next_seq = seq + 1

    def add(self, line: bytes, seq: int) -> None:
        """Takes the outcome with this stream sequence; written by the next `flush`."""
        self._buffer.append(line)
        self._mark.next_seq = seq + 1

    def flush(self) -> None:
        """Writes what was added, to the disk. Raises `DatasetError` if the disk does not take it."""
        if not self._buffer:
            return  # what was only passed over is passed over again
        block = b"\n".join(self._buffer) + b"\n"
        try:
            left = memoryview(self._compressor.compress(block) if self._compressor else block)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DatasetError(f"cannot write {self.path}: {error}; nothing is lost, collect again") from None
        self._mark.size_bytes = os.fstat(self._file.fileno()).st_size
        self._mark.lines += len(self._buffer)
        self._buffer.clear()
        self._write_mark()

    def _write_mark(self) -> None:
        write_atomically(self._mark_path, msgspec.json.encode(self._mark))

    def close(self) -> None:
        """Leaves the file to be continued later."""
        self._file.close()

    def finish(self, *, newest_only: bool = False) -> None:
        """The file is complete: the mark is no longer needed.

        With `newest_only` the lines of rows that were sent again, but for the last of each, are moved beside it, to
        `<file>.superseded.jsonl`.
        """
        self.flush()
        self._file.close()
        if newest_only:  # killed from here on, the file is shorter than its mark, and so written anew
            self._move_superseded()
        self._mark_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """The file has served: it and its mark go."""
        self._file.close()
        self.path.unlink(missing_ok=True)
        self._mark_path.unlink(missing_ok=True)

    def _move_superseded(self) -> None:
        newest: dict[int, int] = {}
        for line in self.read_lines():
            place = _decode_place.decode(line)
            if place.generation:
                newest[place.row] = max(newest.get(place.row, 0), place.generation)
        scratch, beside = (self.path.with_name(self.path.name + end) for end in (".tmp", ".superseded.jsonl"))
        try:
            with open(scratch, "wb") as file, open(beside, "wb") as old:
                kept = self._compressor.stream_writer(file, closefd=False) if self._compressor else file
                self._mark.lines = 0
                for line in self.read_lines():
                    place = _decode_place.decode(line)
                    self._mark.lines += place.generation == newest.get(place.row, 0)
                    (kept if place.generation == newest.get(place.row, 0) else old).write(line)
                if self._compressor:
                    kept.close()
                for written in (file, old):
                    written.flush()
                    os.fsync(written.fileno())
            scratch.replace(self.path)
        except OSError as error:
            raise DatasetError(f"cannot write {self.path}: {error}") from None

    def read_lines(self) -> Iterator[bytes]:
        """The lines of a finished file."""
        with open_lines(str(self.path)) as file:
            yield from file


def free_name(path: Path) -> Path:
    """The first of `<path>.1`, `<path>.2`, … that nothing has yet."""
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
