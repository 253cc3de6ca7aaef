"""How the rows of one file are read: lines of JSON, CSV, Parquet, and datasets as Hugging Face's library saves them.

Each reader hands what it finds to an `Intake`, a row at a time, so that no file has to fit into memory.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import zstandard

from ..errors import DatasetError
from .lines import MAX_LINE_BYTES, Intake, Line, Rejected

Reader = Callable[[str, Intake, frozenset[str] | None, frozenset[str]], Iterator[Line | Rejected | None]]
"""(file, intake, columns that are wanted, fields that are no text) -> what the intake says of each row."""

_READ_BYTES = 1 << 20
_BATCH_ROWS = 256
_COMPRESSED = (".gz", ".zst")


def known_suffixes() -> tuple[str, ...]:
    """What data files end in; lines and CSV may be compressed with gzip or zstandard besides."""
    return tuple(_READERS)


def suffix_of(name: str) -> str:
    """The file's suffix without that of a compression; empty if it is none that we know."""
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    found = Path(name).suffix.lower()
    return found if found in _READERS else ""


def is_table_folder(path: str) -> bool:
    """Whether Hugging Face's library has saved a dataset in this folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def reader_of(file: str) -> Reader:
    """What reads this file. One with an unknown suffix, such as a pipe's, has lines of JSON."""
    if os.path.isdir(file):
        return _saved
    return _READERS.get(suffix_of(file), _json_lines)


@contextlib.contextmanager
def open_lines(path: str) -> Iterator[IO[bytes]]:
    """A file of lines, decompressed; `-` is stdin."""
    if path == "-":
        yield sys.stdin.buffer
        return
    with open(path, "rb", buffering=_READ_BYTES) as file:
        if path.endswith(".zst"):
            yield io.BufferedReader(_Zstd(file), _READ_BYTES)
        elif path.endswith(".gz"):
            with gzip.open(file, "rb") as lines:
                yield lines  # type: ignore[misc]  # a BufferedIOBase
        else:
            yield file


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


def _json_lines(
    path: str, intake: Intake, _columns: frozenset[str] | None, _parsed: frozenset[str]
) -> Iterator[Line | Rejected | None]:
    with open_lines(path) as file:
        for raw in _lines(file):
            yield intake.take_line(raw)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of at most `MAX_LINE_BYTES`; the rest of a longer one is skipped."""
    while line := file.readline(MAX_LINE_BYTES):
        yield line
        while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)


def _csv(
    path: str, intake: Intake, _columns: frozenset[str] | None, parsed: frozenset[str]
) -> Iterator[Line | Rejected | None]:
    """One row per record, fields by the names in the first."""
    csv.field_size_limit(MAX_LINE_BYTES)
    # Bytes that are no UTF-8 become surrogates, which no JSON takes: that rejects their row and no other.
    with open_lines(path) as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        records = csv.reader(text, delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)
        try:
            names = next(records, [])
        except csv.Error as error:
            raise DatasetError(f"cannot read {path}: its first line names no fields: {error}") from None
        if doubled := {name for name in names if names.count(name) > 1}:
            raise DatasetError(f"{path} has several columns named {', '.join(sorted(doubled))}")
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                yield intake.reject(f"not CSV: {error}", "", at=records.line_num)
                continue
            if not record:
                continue
            if len(record) != len(names):
                reason = f"{len(record)} fields, where the first line names {len(names)}"
                yield intake.reject(reason, ",".join(record), at=records.line_num)
                continue
            cells = {name: _parse(cell) if name in parsed else cell for name, cell in zip(names, record, strict=True)}
            yield intake.take(cells, at=records.line_num)


def _parse(cell: str) -> Any:
    """A cell of a field that is no text: what it says as JSON, nothing if it is empty."""
    try:
        return msgspec.json.decode(cell) if cell else None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return cell  # the workflow's check says what is wrong with it


def _parquet(
    path: str, intake: Intake, columns: frozenset[str] | None, _parsed: frozenset[str]
) -> Iterator[Line | Rejected | None]:
    arrow, parquet = _arrow(path)
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:  # else all of it is cached
            names = [name for name in file.schema_arrow.names if columns is None or name in columns]
            for batch in file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
                yield from _rows(batch, intake)
    except arrow.ArrowException as error:
        raise OSError(f"not a whole Parquet file: {str(error).partition(chr(10))[0]}") from None


def _saved(
    path: str, intake: Intake, columns: frozenset[str] | None, _parsed: frozenset[str]
) -> Iterator[Line | Rejected | None]:
    """A folder made by `Dataset.save_to_disk`."""
    try:
        import datasets
    except ImportError:
        raise DatasetError(
            f"{path} is a dataset of Hugging Face's library, which is not installed: pip install 'matrix-bus[hf]'"
        ) from None
    try:
        found = datasets.load_from_disk(path)
    except Exception as error:  # whatever the library raises about what it finds there
        raise OSError(f"not a whole saved dataset: {error}") from None
    if isinstance(found, datasets.DatasetDict):
        splits = ", ".join(os.path.join(path, name) for name in found)
        raise DatasetError(f"{path} has several splits: name one of {splits}")
    if columns is not None:
        found = found.select_columns([name for name in found.column_names if name in columns])
    for batch in found.with_format("arrow").iter(_BATCH_ROWS):
        yield from _rows(batch, intake)


def _rows(batch: Any, intake: Intake) -> Iterator[Line | Rejected | None]:
    """The rows of an Arrow table; one with a value that is no text, where it says so, is rejected alone."""
    try:
        rows = batch.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):
        for at in range(batch.num_rows):
            try:
                (row,) = batch.slice(at, 1).to_pylist()
            except (UnicodeDecodeError, ValueError, OverflowError) as error:
                yield intake.reject(f"a value cannot be read: {error}", "")
            else:
                yield intake.take(row)
        return
    for row in rows:
        yield intake.take(row)


def _arrow(path: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DatasetError(f"{path} needs pyarrow, which is not installed: pip install 'matrix-bus[parquet]'") from None
    return pyarrow, pyarrow.parquet


_READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
