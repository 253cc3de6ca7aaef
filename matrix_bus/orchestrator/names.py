"""Names on the bus: streams, subjects, ids, headers."""

from __future__ import annotations

import re

LEASE_ROLE = "_"
"""The place of role names in the subjects of row messages; no role may have it."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_token(name: str) -> bool:
    """True if `name` may stand in a subject: 1 to 64 of A-Z a-z 0-9 _ -."""
    return _TOKEN.fullmatch(name) is not None


def work_stream(run: str) -> str:
    """Name of the work-queue stream that holds the run's rows and hops."""
    return f"W_{run}"


def outcome_stream(run: str) -> str:
    """Name of the stream that holds the run's outcomes, one per row and generation."""
    return f"O_{run}"


def work_subjects(run: str) -> str:
    """All of the run's rows and hops."""
    return f"q.{run}.>"


def outcome_subjects(run: str) -> str:
    """All of the run's outcomes."""
    return f"out.{run}.>"


def row_subject(run: str, n: int) -> str:
    return f"q.{run}.{LEASE_ROLE}.{n}.0"


def hop_subject(run: str, role: str, n: int, hop: int) -> str:
    return f"q.{run}.{role}.{n}.{hop}"


def family(run: str, n: int) -> str:
    """All messages of one row: the fence is laid on the last of them."""
    return f"q.{run}.*.{n}.*"


def bucket(run: str) -> str:
    """Name of the object store that holds the run's large values."""
    return f"mb_{run}"


def outcome_subject(run: str, n: int, generation: int) -> str:
    return f"out.{run}.{n}.{generation}"


def row_in(subject: str) -> int:
    """The row number in the subject of a row's or a hop's message."""
    return int(subject.split(".")[3])


def row_of(subject: str) -> int:
    """The row number in an outcome's subject."""
    return int(subject.split(".")[2])


HEADER_CRASHES = "Mb-Crashes"
"""How many workers died with the hop in them, as far as is known; left out if none."""

HEADER_GENERATION = "Mb-Generation"
"""Of the row, readable where the body is not; left out if 0."""

HEADER_LEASE = "Mb-Lease"
"""Ack subject of the row message: whoever finishes the row acks it."""
