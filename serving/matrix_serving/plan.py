"""How long a run would take, from the outcomes of a sample and a profile of the servers; no clock, no network.

The model calls of sampled rows are replayed through the simulator's engine, one engine per replica: a row makes its
calls one after the other, so many rows are under way at once, and a row's calls stay with one replica. What takes
time outside of the model is not in it. Rows are repeated if there are fewer than are needed; of a repeated row only
those blocks are found in the prefix cache that different rows have in common, such as a system prompt.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from msgspec import Struct

from matrix_bus.dataset import open_lines
from matrix_bus.errors import UsageError
from matrix_bus.llm.history import full_messages, read_call
from matrix_bus.orchestrator import decode_outcome

from .simulator.answers import content_text
from .simulator.engine import Engine, Sequence, block_keys, count_tokens
from .simulator.profiles import Profile

_ROUNDS = 6
"""Times the rows in flight are replaced before the rate counts as settled; the first and the last do not count."""


@dataclass(frozen=True)
class Call:
    """One model call of a sampled row."""

    prompt_tokens: int
    output_tokens: int
    keys: tuple[int, ...]


class Plan(Struct, kw_only=True):
    """The estimate. Tokens are counted as the simulator does: four characters each."""

    rows: int
    replicas: int
    in_flight: int
    hours: float
    replica_hours: float
    rows_per_s: float
    completion_tokens_per_s: float
    """Of all replicas together."""
    prompt_tokens_per_row: float
    completion_tokens_per_row: float
    calls_per_row: float
    prefix_hit_share: float
    """Of the prompt tokens."""
    call_s_mean: float
    """From a call's arrival at its replica to its last token."""
    preemptions: int
    simulated_rows: int
    sampled_rows: int
    profile: str
    source: str


def read_sample(path: Path) -> list[list[Call]]:
    """The calls of each row of an output file. Raises `UsageError` if there are none."""
    rows = []
    with open_lines(str(path)) as file:
        for line in file:
            history = [bytes(call) for call in decode_outcome(line).history]
            calls = []
            for index, recorded in enumerate(map(read_call, history)):
                if recorded.error is not None:
                    continue
                prompt = [content_text(message.content) for message in full_messages(history, index)]
                keys = block_keys([*prompt, recorded.text])
                tokens = sum(map(count_tokens, prompt)) or 1
                calls.append(Call(tokens, count_tokens(recorded.text) or 1, tuple(keys)))
            if calls:
                rows.append(calls)
    if not rows:
        raise UsageError(f"{path} has no model calls: plan needs the output of a run on a sample of the rows")
    return rows


@dataclass
class _Row:
    """A row under way."""

    calls: list[Call]
    replica: int
    next: int = 0
    sequence: Sequence | None = None
    began_at: float = 0.0


@dataclass
class _Run:
    """What came of it."""

    finished_at: list[float] = field(default_factory=list)
    tokens: int = 0
    calls: int = 0
    call_s: float = 0.0


def estimate(sample: list[list[Call]], profile: Profile, *, replicas: int, rows: int, in_flight: int) -> Plan:
    """The plan for `rows` rows like these. Raises `UsageError` for calls that the profile's context cannot hold."""
    longest = max(call.prompt_tokens + call.output_tokens for row in sample for call in row)
    if longest > profile.max_model_len:
        raise UsageError(
            f"the longest call of the sample has about {longest} tokens, and profile {profile.name!r} takes "
            f"{profile.max_model_len}: choose a profile with a longer max_model_len"
        )
    at_once = min(in_flight, rows)
    simulated = min(rows, _ROUNDS * at_once)
    engines = [Engine(profile) for _ in range(replicas)]
    run = _replay(engines, _repeated(sample, simulated), at_once)
    times = run.finished_at
    if simulated == rows:
        seconds = times[-1]
    else:
        # Rows may end in waves: the middle of the second round against that of the last but one.
        early, late = (fmean(times[at * at_once : (at + 1) * at_once]) for at in (1, _ROUNDS - 2))
        seconds = times[-1] + (rows - simulated) * (late - early) / ((_ROUNDS - 3) * at_once)
    per_row = len(sample)
    queries = sum(engine.prefix_queries for engine in engines)
    return Plan(
        rows=rows,
        replicas=replicas,
        in_flight=at_once,
        hours=round(seconds / 3600, 6),
        replica_hours=round(seconds / 3600 * replicas, 6),
        rows_per_s=round(rows / seconds, 3) if seconds else 0.0,
        completion_tokens_per_s=round(run.tokens / simulated * rows / seconds, 1) if seconds else 0.0,
        prompt_tokens_per_row=round(sum(call.prompt_tokens for row in sample for call in row) / per_row, 1),
        completion_tokens_per_row=round(sum(call.output_tokens for row in sample for call in row) / per_row, 1),
        calls_per_row=round(sum(map(len, sample)) / per_row, 2),
        prefix_hit_share=round(sum(engine.prefix_hits for engine in engines) / queries, 3) if queries else 0.0,
        call_s_mean=round(run.call_s / run.calls, 3),
        preemptions=sum(engine.preemptions for engine in engines),
        simulated_rows=simulated,
        sampled_rows=len(sample),
        profile=profile.name,
        source=profile.source,
    )


def _repeated(sample: list[list[Call]], count: int) -> Iterable[list[Call]]:
    """So many rows: the sample, over and over, with blocks of its own each time."""
    owners = Counter(key for row in sample for key in {key for call in row for key in call.keys})
    for number in range(count):
        copy, index = divmod(number, len(sample))
        yield [
            replace(call, keys=tuple(key if not copy or owners[key] > 1 else hash((key, copy)) for key in call.keys))
            for call in sample[index]
        ]


def _replay(engines: list[Engine], rows: Iterable[list[Call]], at_once: int) -> _Run:
    run = _Run()
    coming = iter(rows)
    steps: list[tuple[float, int]] = []
    idle = set(range(len(engines)))
    by_sequence: dict[int, _Row] = {}
    places = itertools.cycle(range(len(engines)))

    def send(row: _Row, now: float) -> None:
        call = row.calls[row.next]
        row.next += 1
        row.began_at = now
        row.sequence = Sequence(call.prompt_tokens, call.output_tokens, call.keys)
        by_sequence[id(row.sequence)] = row
        engines[row.replica].submit(row.sequence)
        wake(row.replica, now)

    def wake(replica: int, now: float) -> None:
        if replica in idle and (step_s := engines[replica].begin()) is not None:
            idle.discard(replica)
            heapq.heappush(steps, (now + step_s, replica))

    def begin_row(now: float) -> None:
        if (calls := next(coming, None)) is not None:
            send(_Row(calls, next(places)), now)

    for _ in range(at_once):
        begin_row(0.0)
    while steps:
        now, replica = heapq.heappop(steps)
        for sequence in engines[replica].end():
            if not sequence.finished:
                continue
            row = by_sequence.pop(id(sequence))
            run.calls += 1
            run.tokens += sequence.output_tokens
            run.call_s += now - row.began_at
            if row.next < len(row.calls):
                send(row, now)
            else:
                run.finished_at.append(now)
                begin_row(now)
        idle.add(replica)
        wake(replica, now)
    return run
