"""Kill anything, at any moment: nothing is lost, nothing appears twice, little is done again."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard

from matrix_bus.broker import Broker
from tests.acceptance.conftest import HOPS, Command, Shell
from tests.helpers import until_sync

ROWS = 400
ACK_WAIT = "ack_wait_s=2"
PATH = [str(hop) for hop in range(1, HOPS + 1)]

pytestmark = pytest.mark.timeout(120)


class Calls:
    """The handler calls so far, from the file that handlers write to."""

    def __init__(self, path: Path) -> None:
        started: list[tuple[str, ...]] = []
        ended: list[tuple[str, ...]] = []
        for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith("\n"):
                break  # being written
            mark, *call = line.split()
            (started if mark == ">" else ended).append(tuple(call))
        self.count = len(started)
        self.cut = Counter(started) - Counter(ended)
        """Calls that never came to their end, by (row, hop, attempt, pid)."""
        self.hops = Counter(call[:2] for call in started)
        self.attempts = {call[2] for call in started}

    @property
    def repeated(self) -> int:
        """Handler calls beyond one for each hop of each row."""
        return sum(self.hops.values()) - len(self.hops)

    def cut_in(self, pids: set[int]) -> int:
        return sum(count for call, count in self.cut.items() if int(call[3]) in pids)


def workers(shell: Shell, broker: Broker, count: int = 2, **environment: str) -> list[Command]:
    words = ("worker", "-w", str(shell.flow), "--server", broker.url)
    started = [shell.start(*words, **environment) for _ in range(count)]
    for worker in started:
        worker.says("worker of walk")
    return started


def page(x: int) -> str:
    """What some rows have to carry: too much for a message."""
    return f"{x:06}" * 20_000 if x % 8 == 0 else ""


def submit_words(shell: Shell, broker: Broker, *more: str) -> tuple[str, ...]:
    data = str(shell.dataset(ROWS, page=page))
    return ("submit", data, "-w", str(shell.flow), "--server", broker.url, "--run", "r", ACK_WAIT, *more)


def ended_by(command: Command, number: int) -> bool:
    if command.running:
        command.signal(number)
    return not command.running


def called(shell: Shell, share: float) -> None:
    """Waits until this share of the run's handler calls was made."""
    wanted = int(share * ROWS * HOPS)
    until_sync(
        lambda: Calls(shell.calls).count >= wanted, f"{wanted} handler calls, {Calls(shell.calls).count} made", 60
    )


def check_output(path: Path) -> None:
    """Every row exactly once, whole lines, each with the one path that the workflow has."""
    body = path.read_bytes()
    assert body.endswith(b"\n")
    records: list[dict[str, Any]] = [json.loads(line) for line in body.splitlines()]
    assert Counter(record["id"] for record in records) == Counter(str(x) for x in range(ROWS))
    assert {record["outcome"] for record in records} == {"success"}
    for record in records:
        assert record["state"]["path"] == PATH
        assert record["hops"] == HOPS
        assert record["errors"] == []
        assert record["state"]["x"] == record["row"] == int(record["id"])
        assert record["state"]["page"] == page(record["row"])[::-1]
        assert record["input"].get("page", "") == page(record["row"])


def finish(submitter: Command, shell: Shell, output: str = "out.jsonl", timeout_s: float = 90.0) -> None:
    assert submitter.ends(timeout_s) == 0, submitter.said
    check_output(shell.directory / output)
    assert not (shell.directory / f"{output}.progress").exists()


@pytest.mark.parametrize("seed", [1, 2])
def test_workers_killed_again_and_again(shell: Shell, broker: Broker, seed: int) -> None:
    chance = random.Random(seed)
    alive = workers(shell, broker)
    submitter = shell.start(*submit_words(shell, broker, "max_in_flight=60"))
    killed: set[int] = set()
    for share in sorted(chance.uniform(0.05, 0.85) for _ in range(4)):
        called(shell, share)
        victim = alive.pop(chance.randrange(len(alive)))
        victim.kill()
        killed.add(victim.pid)
        alive += workers(shell, broker, 1)
    finish(submitter, shell, timeout_s=25)
    calls = Calls(shell.calls)
    # A call that had ended, but whose answer was not out yet, is in flight as well: at most all that a process held.
    assert calls.repeated <= 4 * 60
    assert calls.cut_in(killed) <= calls.repeated + len(calls.hops)
    assert sum(calls.cut.values()) == calls.cut_in(killed)
    assert calls.attempts == {"1"}


@pytest.mark.parametrize("seed", [1, 2])
def test_the_broker_killed_twice(shell: Shell, broker: Broker, seed: int) -> None:
    chance = random.Random(seed)
    workers(shell, broker)
    submitter = shell.start(*submit_words(shell, broker))
    for share in sorted(chance.uniform(0.05, 0.9) for _ in range(2)):
        called(shell, share)
        broker.kill()
        broker.start()
    finish(submitter, shell)
    calls = Calls(shell.calls)
    assert calls.attempts == {"1"}
    assert calls.repeated == 0  # no process with a handler in it was killed


def test_sigterm_finishes_or_hands_back_at_no_cost(shell: Shell, broker: Broker) -> None:
    leaving, staying = workers(shell, broker)
    submitter = shell.start(*submit_words(shell, broker))
    called(shell, 0.3)
    before = time.monotonic()
    leaving.signal(15)
    assert leaving.ends(10) == 0
    assert time.monotonic() - before < 5
    finish(submitter, shell, timeout_s=30)
    calls = Calls(shell.calls)
    assert calls.repeated == 0
    assert calls.cut == Counter()
    assert calls.attempts == {"1"}
    assert staying.running


def test_sigterm_in_the_middle_of_admission_delays_no_row(shell: Shell, broker: Broker) -> None:
    assert shell.run(*submit_words(shell, broker, "--detach")).returncode == 0
    (leaving,) = workers(shell, broker, 1)
    called(shell, 0.0005)
    leaving.signal(15)
    assert leaving.ends(15) == 0
    workers(shell, broker, 1)
    finish(shell.start("collect", "r", "--server", broker.url, "--follow"), shell, timeout_s=12)


def test_a_worker_killed_in_the_middle_of_admission_delays_no_row(shell: Shell, broker: Broker) -> None:
    assert shell.run(*submit_words(shell, broker, "--detach")).returncode == 0
    (victim,) = workers(shell, broker, 1)
    called(shell, 0.0005)
    victim.kill()
    workers(shell, broker, 1)
    finish(shell.start("collect", "r", "--server", broker.url, "--follow"), shell, timeout_s=12)


def test_a_second_sigterm_hands_back_what_still_runs(shell: Shell, broker: Broker) -> None:
    (slow,) = workers(shell, broker, 1, SECONDS="60")
    submitter = shell.start(*submit_words(shell, broker, "max_in_flight=50"))
    until_sync(lambda: Calls(shell.calls).count >= 50, "the handlers to start")
    asked_at = time.monotonic()
    until_sync(partial(ended_by, slow, 15), "the end", 5)  # two at once would arrive as one
    assert slow.ends() == 0, slow.said
    assert time.monotonic() - asked_at < 3
    workers(shell, broker, 1)
    finish(submitter, shell, timeout_s=40)
    calls = Calls(shell.calls)
    assert calls.repeated == calls.cut_in({slow.pid}) == 50
    assert calls.attempts == {"1"}


def test_a_hop_that_kills_its_workers_ends_and_takes_no_other_with_it(shell: Shell, broker: Broker) -> None:
    submitter = shell.start(
        *submit_words(shell, broker, "limits.crashes=5", "max_in_flight=60"), "--run", "r", "ack_wait_s=1"
    )
    dead: set[int] = set()
    alive = workers(shell, broker, 2, POISON="7")
    while submitter.running and len(dead) < 10:
        for worker in [worker for worker in alive if not worker.running]:
            alive.remove(worker)
            dead.add(worker.pid)
            alive += workers(shell, broker, 1, POISON="7")
        time.sleep(0.05)
    assert submitter.ends(60) == 0, submitter.said
    assert len(dead) == 5
    records = [json.loads(line) for line in (shell.directory / "out.jsonl").read_bytes().splitlines()]
    assert Counter(record["id"] for record in records) == Counter(str(x) for x in range(ROWS))
    (poisonous,) = [record for record in records if record["outcome"] != "success"]
    assert (poisonous["id"], poisonous["outcome"], poisonous["reason"]) == ("7", "failed", "WorkerCrashed")
    assert poisonous["errors"][-1]["message"].startswith("5 workers died while they executed this hop of role 'write'")
    assert Calls(shell.calls).hops["7", "2"] == 5


def test_what_reached_a_stopped_worker_and_was_done_by_others_is_not_done_again(shell: Shell, broker: Broker) -> None:
    """It lies unread in the socket, looks like a first delivery, and is read when the process is woken up."""
    (stopped,) = workers(shell, broker, 1)
    submitter = shell.start(*submit_words(shell, broker, "max_in_flight=60"))
    called(shell, 0.05)
    stopped.signal(signal.SIGSTOP)
    time.sleep(0.2)
    workers(shell, broker, 1)
    finish(submitter, shell)
    stopped.signal(signal.SIGCONT)
    stopped.signal(signal.SIGTERM)
    assert stopped.ends(15) == 0
    assert Calls(shell.calls).repeated <= 60, "what it was working on when it was stopped"


@pytest.mark.parametrize("seed", [1])
def test_a_submitter_killed_half_way_is_run_again(shell: Shell, broker: Broker, seed: int) -> None:
    chance = random.Random(seed)
    words = submit_words(shell, broker, "--detach")
    workers(shell, broker)
    first = shell.start(*words)
    called(shell, 0.0005)
    pause = time.monotonic() + chance.uniform(0, 0.05)
    until_sync(lambda: time.monotonic() > pause, "the moment")
    first.kill()
    second = shell.start(*words)
    assert second.ends() == 0, second.said
    assert second.said.splitlines()[-1] == "r"
    finish(shell.start("collect", "r", "--server", broker.url, "--follow"), shell)
    assert Calls(shell.calls).repeated == 0


@pytest.mark.parametrize("output", ["out.jsonl", "out.jsonl.zst"])
def test_a_collector_killed_in_mid_write_is_continued(shell: Shell, broker: Broker, output: str) -> None:
    chance = random.Random(output)
    assert shell.run(*submit_words(shell, broker, "--detach", "max_in_flight=40")).returncode == 0
    words = ("collect", "r", "--server", broker.url, "-o", output, "--follow")
    workers(shell, broker, SECONDS="0.08")
    path = shell.directory / output
    size = 0
    for _ in range(3):
        collector = shell.start(*words)
        until_sync(lambda: path.exists() and path.stat().st_size > size, "the file to grow")  # noqa: B023
        pause = time.monotonic() + chance.uniform(0, 0.2)
        until_sync(lambda: time.monotonic() > pause, "the moment")  # noqa: B023
        collector.kill()
        size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"torn": ')  # as a crash in mid-write leaves it
    assert shell.start(*words).ends() == 0
    if output.endswith(".zst"):
        packed = zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True)
        path = shell.directory / "plain"
        path.write_bytes(packed.read())
    check_output(path)
    assert os.listdir(shell.directory).count(f"{output}.progress") == 0
