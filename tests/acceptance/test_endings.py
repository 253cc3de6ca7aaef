"""Cancel and purge, as typed."""

from __future__ import annotations

import json

from matrix_bus.broker import Broker
from tests.acceptance.conftest import Shell


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
