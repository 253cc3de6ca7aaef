"""Files in and out: lines of a dataset, and an output that continues where it was killed."""

from .files import difference, files_of, fingerprint, identity
from .formats import open_lines, suffix_of
from .lines import MAX_ID_CHARS, MAX_LINE_BYTES, Check, Intake, Line, Rejected
from .output import Output, free_name, write_atomically, write_json
from .parts import LinesPart, Part, Parts, TablePart, Written
from .reading import read, repeatable
from .selection import EVERYTHING, Mixer, Selection, Shard, at_path, mixed
from .threaded import in_thread

__all__ = (
    "EVERYTHING",
    "MAX_ID_CHARS",
    "MAX_LINE_BYTES",
    "Check",
    "Intake",
    "Line",
    "LinesPart",
    "Mixer",
    "Output",
    "Part",
    "Parts",
    "Rejected",
    "Selection",
    "Shard",
    "TablePart",
    "Written",
    "at_path",
    "difference",
    "files_of",
    "fingerprint",
    "free_name",
    "identity",
    "in_thread",
    "mixed",
    "open_lines",
    "read",
    "repeatable",
    "suffix_of",
    "write_atomically",
    "write_json",
)
