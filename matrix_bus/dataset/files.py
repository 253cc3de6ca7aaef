"""The files that a dataset consists of, and enough about them to tell later whether they are the same."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import DatasetError
from .formats import is_table_folder, known_suffixes, suffix_of

_PROBE_BYTES = 1 << 20
_SMALL_PROBE_BYTES = 1 << 12
"""Of each of many files."""
_OURS = (".rejected.jsonl", ".superseded.jsonl", ".outcomes.jsonl")
"""What we write beside an output is no data, if that was put into the folder of its dataset."""


def files_of(path: str) -> list[str]:
    """The files behind a path, a glob pattern or a folder, in the order of their names; `-` is stdin.

    A dataset that Hugging Face's library has saved is one, though it is a folder. Raises `DatasetError`.
    """
    if path == "-":
        return [path]
    if os.path.isdir(path):
        return [path] if is_table_folder(path) else _within(path)
    if not os.path.exists(path) and glob.has_magic(path):
        found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if not found:
            raise DatasetError(f"no file matches {path}")
        return found
    return [path]


def _within(folder: str) -> list[str]:
    """The data files of a folder and those in it; what begins with a dot or an underscore is somebody's own."""
    found = [
        os.path.join(at, name)
        for at, folders, names in os.walk(folder)
        if not _is_private(os.path.relpath(at, folder))
        for name in names
        if suffix_of(name) and not _is_private(name) and not name.endswith(_OURS)
    ]
    if not found:
        raise DatasetError(f"folder {folder} has no data file: none of them ends in {', '.join(known_suffixes())}")
    return sorted(found)


def _is_private(relative: str) -> bool:
    return any(part.startswith((".", "_")) and part != "." for part in Path(relative).parts)


def is_stream(path: str) -> bool:
    """Whether this is stdin (`-`), a pipe or the like, which can be read once."""
    return path == "-" or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path))


Stamp = tuple[int, int, int] | None


def stamp(file: str) -> Stamp:
    """What changes when a file is written to or replaced; None for what is no regular file."""
    if file == "-" or not os.path.isfile(file):
        return None
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def identity(path: str) -> str:
    """Path, size and fingerprint, so that a run is not continued with other data; of a pipe the name alone.

    Raises `DatasetError` if a file cannot be read.
    """
    files = files_of(path)
    if is_stream(path):
        return path
    if files == [path] and not os.path.isdir(path):
        size = _size(path)
        return f"{Path(path).resolve()}#{size}-{fingerprint(path, size)}"
    parts = _parts_of(files)
    return f"{Path(path).absolute()}#{sum(map(_size, parts))}-{_fingerprint_of(parts)}-{len(parts)}"


def fingerprint(path: str, size: int, probe_bytes: int = _PROBE_BYTES) -> str:
    """16 hex digits that change when the beginning or the end of a file's first `size` bytes does."""
    digest = hashlib.sha256(str(size).encode())
    try:
        with open(path, "rb") as file:
            for at in (0, max(0, size - probe_bytes)):
                file.seek(at)
                digest.update(file.read(min(probe_bytes, size - at)))
    except OSError as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()[:16]


def difference(old: str, new: str) -> str:
    """Why the data with the identity `new` is not that with `old`, or such that begins with it; empty if it is."""
    if old == new:
        return ""
    (old_path, old_size, old_print, old_count), (new_path, new_size, _, new_count) = _read(old), _read(new)
    if old_path != new_path:
        return f"was {old_path or 'given by a program'}, now {new_path or 'given by a program'}"
    if old_count != new_count and 0 in (old_count, new_count):
        return f"{new_path} was {_kind(old_count)}, now it is {_kind(new_count)}"
    if new_count:
        first = _parts_of(files_of(new_path))[:old_count]
        if new_count < old_count or _fingerprint_of(first) != old_print:
            return (
                f"the first {old_count} files of {new_path} are not what they were; files may be added that come "
                "after them by name, no more"
            )
        return ""
    if new_size < old_size:
        return f"{new_path} had {old_size} bytes, now it has {new_size}; lines may be added at its end, no more"
    if fingerprint(new_path, old_size) != old_print:
        return (
            f"the first {old_size} bytes of {new_path} are not what they were; lines may be added at its end, no more"
        )
    return ""


def _kind(count: int) -> str:
    return f"{count} files" if count else "one file"


def _parts_of(files: Sequence[str]) -> list[str]:
    """With the files of a folder that counts as one in its place."""
    return [
        part
        for file in files
        for part in (sorted(str(p) for p in Path(file).rglob("*") if p.is_file()) if os.path.isdir(file) else [file])
    ]


def _fingerprint_of(parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}:{fingerprint(part, _size(part), _SMALL_PROBE_BYTES)}\n".encode())
    return digest.hexdigest()[:16]


def _read(identity: str) -> tuple[str, int, str, int]:
    """(path, bytes, fingerprint, files if they are several else 0)."""
    path, _, rest = identity.rpartition("#")
    size, _, prints = rest.partition("-")
    digest, _, count = prints.partition("-")
    return (path, int(size), digest, int(count or 0)) if path else (identity, 0, "", 0)


def _size(path: str) -> int:
    try:
        with open(path, "rb") as file:
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: str, error: Exception) -> DatasetError:
    """What to raise for a file that could not be read."""
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    hint = ""
    if isinstance(error, FileNotFoundError):
        there = [file.name for file in Path(path).parent.glob("*")]
        near = difflib.get_close_matches(Path(path).name, there, n=1)
        hint = f"; did you mean {Path(path).with_name(near[0])}?" if near else ""
    return DatasetError(f"cannot read {path}: {why}{hint}")
