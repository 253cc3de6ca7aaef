"""Files in and out: lines of a dataset, and an output that continues where it was killed."""

from .output import Output, write_atomically, write_json
from .reading import (
    MAX_ID_CHARS,
    MAX_LINE_BYTES,
    Check,
    Intake,
    Line,
    Rejected,
    open_lines,
    read,
    repeatable,
)
from .source import difference, fingerprint, identity

__all__ = (
    "MAX_ID_CHARS",
    "MAX_LINE_BYTES",
    "Check",
    "Intake",
    "Line",
    "Output",
    "Rejected",
    "difference",
    "fingerprint",
    "identity",
    "open_lines",
    "read",
    "repeatable",
    "write_atomically",
    "write_json",
)
