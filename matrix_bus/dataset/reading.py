"""A dataset from its first line to its last, whatever files it is in."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zlib
from collections.abc import Generator, Iterator

import zstandard

from ..errors import DatasetError
from .files import files_of, is_stream, stamp, unreadable
from .formats import open_lines, reader_of
from .lines import Check, Intake, Line, Rejected
from .selection import EVERYTHING, Selection


def read(
    path: str, check: Check = lambda _: None, select: Selection = EVERYTHING
) -> Generator[Line | Rejected, None, None]:
    """The selected rows of a file, a glob pattern, a folder, or `-` for stdin, in order.

    Lines of JSON and CSV, also `.gz` and `.zst`; Parquet; datasets as Hugging Face's library saves them. Raises
    `DatasetError` if a file cannot be read at all, or only in part, or is changed meanwhile.
    """
    intake = Intake(check, select)
    files = files_of(path)
    for file in files:
        before = stamp(file)
        intake.begin(file if len(files) > 1 else "")
        try:
            for line in reader_of(file)(file, intake, select.columns, select.parsed):
                if line is not None:
                    yield line
                if intake.is_full:
                    break
        except (OSError, zstandard.ZstdError, zlib.error, EOFError) as error:
            raise unreadable(file, error) from None
        if stamp(file) != before:
            raise DatasetError(
                f"{file} was changed while it was being read: what was read of it stays, and the same command again "
                "goes on if no more was done than adding to its end"
            )
        if intake.is_full:
            break
    if intake.count == 0:
        raise DatasetError(f"{path} has no rows: a dataset is one JSON object per line, or a table with a row each")


@contextlib.contextmanager
def repeatable(path: str, *, twice: bool) -> Iterator[str]:
    """The path of the same lines, to be read `twice` perhaps: a stream is copied into a file for that time."""
    if not twice or not is_stream(path):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="matrix-bus-", suffix=".jsonl") as copy:
        with open_lines(path) as lines:
            shutil.copyfileobj(lines, copy)
        copy.flush()
        yield copy.name
