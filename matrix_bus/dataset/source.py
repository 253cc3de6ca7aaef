"""Where rows came from: enough of a file to tell later whether it is the same, has grown, or is another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .reading import unreadable

_PROBE_BYTES = 1 << 20


def identity(path: str) -> str:
    """Path, size and fingerprint, so that a run is not continued with other data; `-` for stdin.

    Raises `DatasetError` if the file cannot be read.
    """
    if path == "-":
        return "-"
    size = _size(path)
    return f"{Path(path).resolve()}#{size}-{fingerprint(path, size)}"


def fingerprint(path: str, size: int) -> str:
    """16 hex digits that change when the beginning or the end of a file's first `size` bytes does."""
    digest = hashlib.sha256(str(size).encode())
    try:
        with open(path, "rb") as file:
            for at in (0, max(0, size - _PROBE_BYTES)):
                file.seek(at)
                digest.update(file.read(min(_PROBE_BYTES, size - at)))
    except OSError as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()[:16]


def difference(old: str, new: str) -> str:
    """Why the file with the identity `new` is not the one with `old`, or one that begins with it; empty if it is."""
    if old == new:
        return ""
    (old_path, old_size, old_print), (new_path, new_size, _) = _parts(old), _parts(new)
    if old_path != new_path:
        return f"was {old_path or 'given by a program'}, now {new_path or 'given by a program'}"
    if new_size < old_size:
        return f"{new_path} had {old_size} bytes, now it has {new_size}; lines may be added at its end, no more"
    if fingerprint(new_path, old_size) != old_print:
        return (
            f"the first {old_size} bytes of {new_path} are not what they were; lines may be added at its end, no more"
        )
    return ""


def _parts(identity: str) -> tuple[str, int, str]:
    path, _, rest = identity.rpartition("#")
    size, _, digest = rest.partition("-")
    return (path, int(size), digest) if path else (identity, 0, "")


def _size(path: str) -> int:
    try:
        with open(path, "rb") as file:
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise unreadable(path, error) from None
