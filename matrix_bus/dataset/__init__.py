"""Files in and out: lines of a dataset, and an output that continues where it was killed."""

from .files import difference, files_of, fingerprint, identity
from .formats import open_lines
from .lines import MAX_ID_CHARS, MAX_LINE_BYTES, Check, Intake, Line, Rejected
from .output import Output, write_atomically, write_json
from .reading import read, repeatable
from .selection import EVERYTHING, Mixer, Selection, Shard, mixed

__all__ = (
    "EVERYTHING",
    "MAX_ID_CHARS",
    "MAX_LINE_BYTES",
    "Check",
    "Intake",
    "Line",
    "Mixer",
    "Output",
    "Rejected",
    "Selection",
    "Shard",
    "difference",
    "files_of",
    "fingerprint",
    "identity",
    "mixed",
    "open_lines",
    "read",
    "repeatable",
    "write_atomically",
    "write_json",
)
