"""What became of the rows, from the input, the output and the calls that handlers noted. Pure."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tests.chaos.content import LAST_HOP, PAGE_EVERY, page

_STORING_S = 1.0
"""How long an outcome may take from its handler's answer until it is stored, for which there is no later call."""


@dataclass(frozen=True)
class Call:
    """One execution of a hop's handler."""

    row: str
    hop: int
    attempt: int
    token: str
    parent: str
    """Token of the call that sent the row here."""
    pid: int
    started_at: float
    ended_at: float | None


@dataclass(frozen=True)
class Blow:
    """A strike as it was carried out."""

    action: str
    at: float
    """Unix time."""
    pids: tuple[int, ...] = ()
    """Workers that were killed, or stopped for longer than AckWait."""


class Verdict(msgspec.Struct, kw_only=True):
    """The last line of a chaos run; the first four faults must all be 0."""

    benchmark: str = "chaos"
    ok: bool = False
    rows: int
    outcomes: int
    lost: int
    duplicated: int
    torn_lines: int
    forks: int
    wrong: int
    """Outcomes that are no success, have the wrong content, or a history that no chain of calls explains."""
    kills: int
    kinds: dict[str, int]
    handler_calls: int
    repeated_calls: int
    """Beyond one for each hop of each row."""
    repeated_bound: int
    """Calls under way, or answered and not yet stored, in the workers that were killed or stopped."""
    costly_attempts: int
    """Calls that were counted as attempts of the row: none may be."""
    recovery_s_p50: float
    recovery_s_max: float
    seconds: float
    seed: int = 0
    cluster: bool = False


def read_calls(folder: Path) -> list[Call]:
    """The calls that were started; a line that is being written when its process dies is left out."""
    started: dict[str, Call] = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                mark, row, hop, attempt, token, parent, at = line.split()
                ended_at = float(at) if mark == "<" else None
                began_at = float(at) if ended_at is None else started[token].started_at
                started[token] = Call(row, int(hop), int(attempt), token, parent, int(file.name), began_at, ended_at)
    return list(started.values())


def judge(rows: int, output: Path, calls: Sequence[Call], blows: Sequence[Blow], seconds: float) -> Verdict:
    """Compares what went in with what came out."""
    records, torn = _records(output)
    seen = Counter(record["id"] for record in records)
    expected = {str(x) for x in range(rows)}
    by_hop: dict[tuple[str, int], list[Call]] = defaultdict(list)
    for call in calls:
        by_hop[call.row, call.hop].append(call)
    waits = [wait for blow in blows for wait in _recoveries(blow, calls, by_hop)]
    verdict = Verdict(
        rows=rows,
        outcomes=len(records),
        lost=len(expected - seen.keys()),
        duplicated=sum(count - 1 for count in seen.values()) + len(seen.keys() - expected),
        torn_lines=torn,
        # Whatever executions a hop had, they must all have been given the row by the same call.
        forks=sum(len({call.parent for call in group}) > 1 for group in by_hop.values()),
        wrong=sum(not _is_right(record, by_hop) for record in records),
        kills=len(blows),
        kinds=dict(Counter(blow.action for blow in blows)),
        handler_calls=len(calls),
        repeated_calls=len(calls) - len(by_hop),
        repeated_bound=sum(len(_held(blow, calls, by_hop)) for blow in blows),
        costly_attempts=sum(call.attempt > 1 for call in calls),
        recovery_s_p50=round(statistics.median(waits), 3) if waits else 0.0,
        recovery_s_max=round(max(waits, default=0.0), 3),
        seconds=round(seconds, 1),
    )
    faults = (verdict.lost, verdict.duplicated, verdict.torn_lines, verdict.forks, verdict.wrong)
    verdict.ok = not any(faults) and not verdict.costly_attempts and verdict.repeated_calls <= verdict.repeated_bound
    return verdict


def _records(output: Path) -> tuple[list[dict[str, Any]], int]:
    body = output.read_bytes() if output.exists() else b""
    records, torn = [], 0
    for line in body.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no end of line")
            records.append(json.loads(line))
        except ValueError:
            torn += 1
    return records, torn


def _is_right(record: dict[str, Any], by_hop: dict[tuple[str, int], list[Call]]) -> bool:
    """A success, with the content of its row, and a chain of calls from the last hop to the first."""
    x = int(record["id"])
    state = record["state"]
    if record["outcome"] != "success" or record["hops"] != LAST_HOP or record["errors"]:
        return False
    if state["x"] != x or state["page"] != (page(x, LAST_HOP) if x % PAGE_EVERY == 0 else ""):
        return False
    token = state["parent"]
    for hop in range(LAST_HOP, 0, -1):
        made = [call for call in by_hop.get((record["id"], hop), ()) if call.token == token]
        if len(made) != 1:
            return False
        token = made[0].parent
    return bool(token == "-")


def _held(blow: Blow, calls: Sequence[Call], by_hop: dict[tuple[str, int], list[Call]]) -> list[Call]:
    """What the victims had begun and nobody had been given the result of."""
    held = []
    for call in calls:
        if call.pid in blow.pids and call.started_at <= blow.at:
            if call.hop == LAST_HOP:
                settled = call.ended_at is not None and call.ended_at < blow.at - _STORING_S
            else:
                after = by_hop.get((call.row, call.hop + 1), ())
                settled = any(following.started_at <= blow.at for following in after)
            if not settled:
                held.append(call)
    return held


def _recoveries(blow: Blow, calls: Sequence[Call], by_hop: dict[tuple[str, int], list[Call]]) -> Iterable[float]:
    """Seconds from a blow until each hop that it caught in a worker was taken up again by another."""
    for call in _held(blow, calls, by_hop):
        again = [
            other.started_at
            for other in (*by_hop[call.row, call.hop], *by_hop.get((call.row, call.hop + 1), ()))
            if other.started_at > blow.at
        ]
        if again:
            yield min(again) - blow.at
