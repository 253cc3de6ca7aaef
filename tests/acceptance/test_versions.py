"""A worker of the next version and one of this version share a queue, as in a rolling upgrade."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

from matrix_bus.broker import Broker
from tests.acceptance.conftest import HOPS, Shell

ROWS = 150

NEXT_VERSION = """
import sys
import msgspec
from matrix_bus import orchestrator
from matrix_bus.orchestrator import transitions, wire


class Orchestrator(wire.Orchestrator, array_like=True):
    note: str = ""
    weights: dict[str, float] = {}


class OutcomeRecord(wire.OutcomeRecord):
    note: str = "next"


made = transitions.admit


def admit(*args, **named):
    message = made(*args, **named)
    message.note, message.weights = "next", {"a": 0.5}
    return message


wire._unpack = msgspec.msgpack.Decoder(Orchestrator)
wire._outcome_from_json = msgspec.json.Decoder(OutcomeRecord)
for module in (orchestrator, transitions, wire):
    module.Orchestrator, module.OutcomeRecord = Orchestrator, OutcomeRecord
orchestrator.admit = admit
from matrix_bus.cli import main

sys.argv[1:] = WORDS
main()
"""


def test_a_worker_of_the_next_version_shares_the_queue(shell: Shell, broker: Broker) -> None:
    words = ["-w", str(shell.flow), "--server", broker.url, "--slots", "4"]
    script = NEXT_VERSION.replace("WORDS", repr(["worker", *words]))
    log = (shell.directory / "next.log").open("wb")
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=shell.directory, env=shell.environment, stdout=log, stderr=log
    ) as newer:
        try:
            older = shell.start("worker", *words)
            done = shell.run("submit", str(shell.dataset(ROWS)), "-w", str(shell.flow), "--server", broker.url)
        finally:
            newer.terminate()
    log.close()
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for line in (shell.directory / "out.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in written) == list(range(ROWS))
    assert {(line["outcome"], line["hops"]) for line in written} == {("success", HOPS)}
    assert {line.get("note") for line in written} == {None, "next"}, "both have written outcomes"
    calls: dict[str, set[str]] = {}
    for call in shell.calls.read_text().splitlines():
        row, pid = call.split()[1], call.split()[-1]
        calls.setdefault(row, set()).add(pid)
    mixed = Counter(len(pids) for pids in calls.values())
    assert mixed[2] > 0, "rows went from one version to the other"
    assert older.running
