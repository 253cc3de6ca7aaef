"""What is done to a run from outside, as typed."""

from __future__ import annotations

import json

from matrix_bus.broker import Broker
from tests.acceptance.conftest import Shell
from tests.helpers import server_with


def test_pause_set_resume_and_retry(shell: Shell, broker: Broker) -> None:
    server = ("--server", broker.url)
    luck = "if os.path.exists('broken') and int(row.id) % 2:\n        raise ValueError('no luck')\n    "
    flow = shell.flow.read_text().replace("row.state.path.append", f"{luck}row.state.path.append")
    shell.flow.write_text(flow)
    (shell.directory / "broken").touch()
    shell.run("submit", str(shell.dataset(6)), "-w", str(shell.flow), *server, "--detach", "--run", "r")
    paused = shell.run("pause", "r", *server)
    assert (paused.returncode, "matrix-bus resume r" in paused.stderr) == (0, True), paused.stderr
    shell.start("worker", "-w", str(shell.flow), *server)
    status = shell.run("status", "r", *server).stdout
    assert "run r is paused: by hand" in status
    assert f"matrix-bus resume r --server {broker.url}" in status
    for words, said in (
        (("max_in_flight=many",), "'many' is not a number"),
        (("max_inflight=3",), "can be set while a run goes on"),
        (("roles.plann.slots=3",), "did you mean 'plan'"),
    ):
        wrong = shell.run("set", "r", *words, *server)
        assert (wrong.returncode, said in wrong.stderr) == (2, True), wrong.stderr
    assert shell.run("set", "r", "max_in_flight=2", "roles.plan.slots=1", "weight=2", *server).returncode == 0
    assert shell.run("resume", "r", *server).returncode == 0
    assert shell.run("collect", "r", *server, "--follow").returncode == 0
    assert shell.run("retry", "r", *server).returncode == 2, "it does not say which"
    none = shell.run("retry", "r", "--failed", "--reason", "limit", *server)
    assert "no failed rows with reason 'limit'" in none.stderr
    (shell.directory / "broken").unlink()
    again = shell.run("retry", "r", "--failed", *server)
    assert "3 failed rows of run r are sent again" in again.stderr
    collected = shell.run("collect", "r", *server, "--follow", "-o", "new.jsonl")
    assert collected.returncode == 0, collected.stderr
    written = [json.loads(line) for line in (shell.directory / "new.jsonl").read_text().splitlines()]
    assert sorted((line["row"], line["outcome"], line["generation"]) for line in written) == [
        (n, "success", n % 2) for n in range(6)
    ]
    assert len((shell.directory / "new.jsonl.superseded.jsonl").read_text().splitlines()) == 3
    manifest = json.loads((shell.directory / "new.manifest.json").read_text())
    assert (manifest["rows"], manifest["outcomes"]) == (6, {"success": 6})
    assert shell.run("dead", "list", *server).stdout == ""
    assert "no dead letter 3" in shell.run("dead", "show", "3", *server).stderr


def test_a_run_that_pauses_itself_tells_whoever_waits_for_it(shell: Shell, broker: Broker) -> None:
    luck = "raise ValueError('no luck')\n    "
    shell.flow.write_text(shell.flow.read_text().replace("row.state.path.append", f"{luck}row.state.path.append"))
    words = ("-w", str(shell.flow), "--server", broker.url)
    submitter = shell.start(
        "submit", str(shell.dataset(400)), *words, "--run", "r", "limits.failed_window=20", "max_in_flight=5"
    )
    shell.start("worker", *words)
    said = submitter.says("to let it go on: matrix-bus resume r")
    assert "run r is paused: 20 of the last 20 outcomes failed: 20 error: ValueError" in said
    assert "no luck" in said
    assert "no worker serves" not in said
    assert shell.run("cancel", "r", "--server", broker.url).returncode == 0
    assert submitter.ends() == 0, submitter.said
    assert "run r is complete" in submitter.said


def test_cancel_then_collect_then_purge(shell: Shell, broker: Broker) -> None:
    server = ("--server", broker.url)
    shell.run("submit", str(shell.dataset(5)), "-w", str(shell.flow), *server, "--detach", "--run", "r")
    assert shell.run("purge", "r", *server).returncode == 2, "nobody is there to be asked"
    cancelled = shell.run("cancel", "r", *server)
    assert cancelled.returncode == 0, cancelled.stderr
    assert "5 rows ended as filtered: cancelled" in cancelled.stderr
    assert "matrix-bus collect r" in cancelled.stderr
    assert "complete" in shell.run("status", "r", *server).stdout
    collected = shell.run("collect", "r", *server, "--follow")
    assert collected.returncode == 0, collected.stderr
    written = [json.loads(line) for line in (shell.directory / "out.jsonl").read_text().splitlines()]
    assert [(line["outcome"], line["reason"]) for line in written] == [("filtered", "cancelled")] * 5
    again = shell.run("submit", "data.jsonl", "-w", str(shell.flow), *server, "--run", "r")
    assert again.returncode == 2
    assert "is cancelled: choose another --run" in again.stderr
    assert shell.run("purge", "r", "--unreferenced", *server).returncode == 0
    purged = shell.run("purge", "r", "--yes", *server)
    assert (purged.returncode, "is deleted" in purged.stderr) == (0, True)
    assert shell.run("runs", *server).stdout == ""
    assert shell.run("collect", "r", *server).returncode == 2


def test_a_worker_whose_connection_the_broker_ends_says_why_and_ends(shell: Shell) -> None:
    with server_with(shell.directory / "broker", "max_subscriptions: 7") as url:
        words = ("-w", str(shell.flow), "--server", url)
        submitted = shell.run("submit", str(shell.dataset(100)), *words, "--detach", "--run", "r")
        assert submitted.returncode == 0, submitted.stderr
        worker = shell.start("worker", *words, SECONDS="60")
        assert worker.ends() == 2
    assert f"error: the broker at {url} ended the connection (nats: maximum subscriptions exceeded)" in worker.said
    assert "Traceback" not in worker.said
