"""Finished output files: written under other names, and given their own when all of them are whole."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zstandard
from msgspec import Struct

from ..errors import DatasetError
from .formats import suffix_of

_ROW_GROUP_BYTES = 16 << 20
"""Of the rows' JSON, roughly: what is held in memory until a row group of a Parquet file is written."""


class Part(Protocol):
    """One file under way."""

    def add(self, row: dict[str, Any], size: int) -> None:
        """Takes a row of so many bytes."""
        ...

    @property
    def size_bytes(self) -> int:
        """What is written so far, without what is still held back."""
        ...

    def close(self) -> None:
        """Writes the rest, to the disk."""
        ...


class LinesPart:
    """Rows as lines of JSON, compressed as the name says."""

    def __init__(self, path: Path, name: str) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._out: Any = self._file
        if name.endswith(".zst"):
            self._out = zstandard.ZstdCompressor(level=3).stream_writer(self._file, closefd=False)
        elif name.endswith(".gz"):
            self._out = gzip.GzipFile(fileobj=self._file, mode="wb", compresslevel=6, mtime=0)

    def add(self, row: dict[str, Any], size: int) -> None:
        self._out.write(msgspec.json.encode(row) + b"\n")

    @property
    def size_bytes(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        try:
            if self._out is not self._file:
                self._out.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


class TablePart:
    """Rows as a Parquet file of this Arrow schema."""

    def __init__(self, path: Path, schema: Any) -> None:
        from pyarrow import parquet

        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._writer = parquet.ParquetWriter(self._file, schema, compression="zstd")
        self._schema = schema
        self._held: list[dict[str, Any]] = []
        self._held_bytes = 0

    def add(self, row: dict[str, Any], size: int) -> None:
        self._held.append(row)
        self._held_bytes += size
        if self._held_bytes >= _ROW_GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        import pyarrow as arrow

        self._writer.write_table(arrow.Table.from_pylist(self._held, self._schema))
        self._held, self._held_bytes = [], 0

    @property
    def size_bytes(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        try:
            if self._held:
                self._write()
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


class Written(Struct):
    """What came of an output."""

    files: list[Path]
    rows: int = 0
    kept: Path | None = None
    """Where an earlier output of the same name was moved to."""


class Parts:
    """An output of one file, or, with `part_bytes`, a folder with as many as it takes.

    A part ends with the row that brings it to `part_bytes`. `label` tells apart the parts of writers that share a
    folder.
    """

    def __init__(
        self, target: Path, open_part: Callable[[Path, str], Part], part_bytes: int | None = None, label: str = ""
    ) -> None:
        self._target = target
        self._open = open_part
        self._part_bytes = part_bytes
        self._stem = f"part-{label}-" if label else "part-"
        self._part: Part | None = None
        self._begun: list[Path] = []
        """Scratch names, in order."""
        self.rows = 0

    @property
    def _many(self) -> bool:
        return self._part_bytes is not None

    def _name(self, index: int) -> str:
        ending = self._target.name[self._target.name.lower().rindex(suffix_of(self._target.name)) :]
        return f"{self._stem}{index:05}{ending}"

    def add(self, row: dict[str, Any], size: int) -> None:
        """Writes one more row of about so many bytes. Raises `DatasetError` if the disk does not take it."""
        with self._told():
            if self._part is not None and self._part_bytes is not None and self._part.size_bytes >= self._part_bytes:
                self._close()
            if self._part is None:
                self._begin()
            assert self._part is not None
            self._part.add(row, size)
        self.rows += 1

    def _begin(self) -> None:
        folder = self._target if self._many else self._target.parent
        folder.mkdir(parents=True, exist_ok=True)
        name = self._name(len(self._begun)) if self._many else self._target.name
        scratch = folder / f".{name}.tmp"
        self._begun.append(scratch)
        self._part = self._open(scratch, name)

    def _close(self) -> None:
        part, self._part = self._part, None
        if part is not None:
            part.close()

    def finish(self) -> list[Path]:
        """Gives the files their names, in place of older ones of this writer; returns them.

        There is always one, so that who reads it finds an empty output, and not none.
        """
        with self._told():
            if not self._begun:
                self._begin()
            self._close()
            if not self._many:
                self._begun[0].replace(self._target)
                return [self._target]
            names = [scratch.with_name(scratch.name[1:].removesuffix(".tmp")) for scratch in self._begun]
            files = [scratch.replace(name) for scratch, name in zip(self._begun, names, strict=True)]
            index = len(files)
            while (old := self._target / self._name(index)).exists():
                old.unlink()
                index += 1
        return files

    def abandon(self) -> None:
        """Leaves nothing behind."""
        with contextlib.suppress(Exception):
            self._close()
        for scratch in self._begun:
            scratch.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _told(self) -> Any:
        try:
            yield
        except OSError as error:  # Arrow's are among them
            raise DatasetError(f"cannot write {self._target}: {error}; nothing is lost, collect again") from None
