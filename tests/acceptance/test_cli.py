"""The command line as a user types it: what it says, what it returns, and that no mistake ends in a traceback."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import pytest

from matrix_bus.broker import Broker, local_broker
from matrix_bus.service import free_port
from tests.acceptance.conftest import HOPS, Shell
from tests.helpers import until_sync

pytestmark = pytest.mark.timeout(60)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_submit_without_a_worker_says_which_roles_have_none_and_goes_on_when_one_starts(
    shell: Shell, broker: Broker
) -> None:
    data = str(shell.dataset(5))
    submitter = shell.start("submit", data, "-w", str(shell.flow), "--server", broker.url)
    command = f"matrix-bus worker --workflow {shell.flow} --server {broker.url}"
    said = submitter.says(command)
    assert "no worker serves" in said
    for role in ("plan", "write", "judge", "close"):
        assert role in said
    shell.start("worker", "-w", str(shell.flow), "--server", broker.url)
    assert submitter.ends() == 0
    assert "5 in" in submitter.said
    assert len(lines(shell.directory / "out.jsonl")) == 5
    manifest = json.loads((shell.directory / "out.manifest.json").read_text())
    assert (manifest["rows"], manifest["hops"], manifest["outcomes"]) == (5, 5 * HOPS, {"success": 5})


def test_a_worker_of_one_role_serves_only_it(shell: Shell, broker: Broker) -> None:
    data = str(shell.dataset(4))
    words = ("-w", str(shell.flow), "--server", broker.url)
    one = shell.start("worker", "--role", "plan", "--role", "write", *words)
    one.says("worker of walk: plan, write")
    submitter = shell.start("submit", data, *words, "--run", "r")
    said = submitter.says("--role judge --role close")
    assert "no worker serves judge, close" in said
    until_sync(lambda: shell.calls.exists() and shell.calls.read_text().count("< ") == 8, "plan and write of four rows")
    assert {call.split()[2] for call in shell.calls.read_text().splitlines()} == {"1", "2"}
    shell.start("worker", "--role", "judge", "--role", "close", *words)
    assert submitter.ends() == 0
    wrong = shell.run("worker", "--role", "nobody", *words)
    assert wrong.returncode == 2
    assert "nobody" in wrong.stderr
    assert "plan" in wrong.stderr


def test_a_worker_started_before_its_broker_waits_for_it(shell: Shell, tmp_path: Path) -> None:
    broker = Broker(tmp_path / "later", free_port())
    worker = shell.start("worker", "-w", str(shell.flow), "--server", broker.url)
    worker.says("waiting for it")
    with broker:
        worker.says("worker of walk")
        done = shell.run("submit", str(shell.dataset(3)), "-w", str(shell.flow), "--server", broker.url)
        assert done.returncode == 0, done.stderr
        worker.signal(signal.SIGINT)
        assert worker.ends(10) == 0


def test_ctrl_c_in_submit_says_how_to_go_on_and_collect_does(shell: Shell, broker: Broker) -> None:
    words = ("-w", str(shell.flow), "--server", broker.url)
    submitter = shell.start("submit", str(shell.dataset(6)), *words, "--run", "r", "-o", "mine.jsonl")
    submitter.says("rows submitted in")
    submitter.says("0/6 rows")
    submitter.signal(signal.SIGINT)
    assert submitter.ends(10) != 0
    assert "matrix-bus collect r -o mine.jsonl --follow" in submitter.said
    assert "matrix-bus status r" in submitter.said
    assert "Traceback" not in submitter.said
    part = shell.run("collect", "r", "-o", "mine.jsonl", "--server", broker.url)
    assert part.returncode == 0
    assert "0 of 6" in part.stderr
    shell.start("worker", *words)
    whole = shell.run("collect", "r", "-o", "mine.jsonl", "--server", broker.url, "--follow")
    assert whole.returncode == 0
    assert "6 of 6" in whole.stderr
    assert len(lines(shell.directory / "mine.jsonl")) == 6


def test_detach_runs_status_and_collect(shell: Shell, broker: Broker) -> None:
    server = ("--server", broker.url)
    assert "no runs" in shell.run("status", *server).stderr
    assert shell.run("runs", *server).stdout == ""
    detached = shell.run("submit", str(shell.dataset(3)), "-w", str(shell.flow), *server, "--detach")
    assert detached.returncode == 0
    (run,) = detached.stdout.split()
    assert run.startswith("walk-")
    status = shell.run("status", run, *server)
    assert "outcomes 0 of 3" in status.stdout
    assert "no worker serves" in status.stdout
    row = shell.run("runs", *server).stdout.strip().split("\t")
    assert row[:4] == [run, "active", "walk", "3 rows"]
    shell.start("worker", "-w", str(shell.flow), *server)
    for _ in range(2):  # a second time it writes the same
        assert shell.run("collect", run, "--follow", *server).returncode == 0
        assert sorted(str(line["id"]) for line in lines(shell.directory / "out.jsonl")) == ["0", "1", "2"]
    assert "complete" in shell.run("status", run, *server).stdout


def test_rejected_lines_are_kept_beside_the_output(shell: Shell, broker: Broker) -> None:
    data = shell.directory / "mixed.jsonl"
    data.write_text('{"x": 0, "id": "zero"}\nnot json\n\n{"x": "one"}\n[1]\n{"x": 4}\n')
    shell.start("worker", "-w", str(shell.flow), "--server", broker.url)
    done = shell.run("submit", str(data), "-w", str(shell.flow), "--server", broker.url)
    assert done.returncode == 0, done.stderr
    assert "3 lines rejected" in done.stderr
    rejected = lines(shell.directory / "out.jsonl.rejected.jsonl")
    assert [line["line"] for line in rejected] == [2, 4, 5]
    assert [line["text"] for line in rejected] == ["not json", '{"x": "one"}', "[1]"]
    assert all(line["reason"] for line in rejected)
    written = lines(shell.directory / "out.jsonl")
    assert sorted((str(line["id"]), line["row"]) for line in written) == [("4", 4), ("zero", 0)]


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["submit", "no-such.jsonl", "-w", "walk.py"], ["no-such.jsonl"]),
        (["submit", "empty.jsonl", "-w", "walk.py"], ["empty.jsonl", "no rows"]),
        (["submit", "folder", "-w", "walk.py"], ["folder", "no data file"]),
        (["submit", "data.jsonl", "-w", "wolk"], ["wolk", "installed"]),
        (["submit", "data.jsonl", "-w", "wolk.py"], ["wolk.py"]),
        (["submit", "data.jsonl", "max_in_fligth=3", "-w", "walk.py"], ["max_in_fligth", "max_in_flight"]),
        (["submit", "data.jsonl", "max_in_flight=many", "-w", "walk.py"], ["max_in_flight", "int"]),
        (["submit", "data.jsonl", "trials=0", "-w", "walk.py"], ["trials"]),
        (["submit", "data.jsonl", "other.jsonl", "-w", "walk.py"], ["other.jsonl", "KEY=VALUE"]),
        (["submit", "data.jsonl", "roles.plam.max_attempts=2", "-w", "walk.py"], ["plam", "plan"]),
        (["submit", "data.jsonl", "-w", "walk.py", "--run", "a b"], ["a b"]),
        (["collect", "nothing"], ["nothing"]),
        (["status", "nothing"], ["nothing"]),
    ],
)
def test_a_mistake_is_one_message(shell: Shell, shared_broker: Broker, words: list[str], expected: list[str]) -> None:
    shell.dataset(2)
    (shell.directory / "empty.jsonl").write_text("\n")
    (shell.directory / "folder").mkdir()
    (shell.directory / "folder" / "out.jsonl.rejected.jsonl").write_text("{}\n")
    done = shell.run(*words, "--server", shared_broker.url)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in expected:
        assert word in done.stderr
    assert done.stderr.count("error:") == 1
    assert done.stdout == ""


def test_a_broker_that_does_not_answer_is_one_message(shell: Shell) -> None:
    shell.dataset(2)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for port in (free_port(), other.getsockname()[1]):
            url = f"nats://127.0.0.1:{port}"
            started = time.monotonic()
            for words in (["submit", "data.jsonl", "-w", "walk.py"], ["runs"]):
                done = shell.run(*words, "--server", url)
                assert (done.returncode, done.stdout) == (2, "")
                assert url in done.stderr
                assert "Traceback" not in done.stderr
            assert time.monotonic() - started < 15


# --- the local broker ---------------------------------------------------------------------------------------


def test_commands_started_at_once_share_one_local_broker(shell: Shell) -> None:
    assert shell.run("broker", "status").returncode == 2
    data = str(shell.dataset(3))
    worker = shell.start("worker", "-w", str(shell.flow))
    submitter = shell.start("submit", data, "-w", str(shell.flow))
    assert submitter.ends() == 0, submitter.said
    worker.says("worker of walk")
    assert (worker.said + submitter.said).count("started a local broker") == 1
    status = local_broker().status()
    assert status is not None
    said = shell.run("broker", "status")
    assert said.returncode == 0
    assert status.url in said.stdout
    assert f"pid {status.pid}" in said.stdout
    stopped = shell.run("broker", "stop")
    assert (stopped.returncode, local_broker().status()) == (0, None)
    assert "is stopped" in stopped.stdout
    assert worker.running  # it waits for the next one
    assert "was not running" in shell.run("broker", "stop").stdout
    assert str(status.url) in shell.run("broker", "start").stdout  # on its old port, with its data
    assert len(shell.run("runs").stdout.splitlines()) == 1
