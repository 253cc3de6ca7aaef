"""What runs inside worker processes: every kind of handler, on uvloop, with logs and metrics to look at."""

from __future__ import annotations

import json
import signal
import urllib.request
from pathlib import Path

import psutil
import pytest

from matrix_bus.broker import Broker
from matrix_bus.service import free_port
from tests.acceptance.conftest import Shell
from tests.helpers import until_sync

KINDS = """
import asyncio
import os
import threading
import time

from matrix_bus import Next, Outcome, Row, State, Workflow, success, to


class Seen(State):
    x: int
    loop: str = ""
    thread: str = ""
    process: int = 0
    worker: int = 0


flow = Workflow("kinds", state=Seen, start="on_loop")


@flow.role
async def on_loop(row: Row[Seen]) -> Next:
    row.state.loop = type(asyncio.get_running_loop()).__module__
    row.state.worker = os.getpid()
    return to("in_thread")


@flow.role
def in_thread(row: Row[Seen]) -> Next:
    row.state.thread = threading.current_thread().name
    return to("in_process")


@flow.role(process=True)
def in_process(row: Row[Seen]) -> Next:
    row.state.process = os.getpid()
    return to("blocks")


@flow.role
async def blocks(row: Row[Seen]) -> Outcome:
    if row.state.x == 0:
        time.sleep(2.2)
    if row.state.x == 1:
        raise KeyError("no such thing")
    return success()
"""


def test_handlers_of_every_kind_with_logs_and_metrics(shell: Shell, broker: Broker) -> None:
    (shell.directory / "kinds.py").write_text(KINDS)
    port = free_port()
    server = ("--server", broker.url)
    shown = ("--metrics-port", str(port), "--log-json", "--log-level", "info")
    worker = shell.start("worker", "-w", "kinds.py", *server, *shown)
    done = shell.run("submit", str(shell.dataset(5)), "-w", "kinds.py", *server)
    assert done.returncode == 0, done.stderr
    rows = {row["row"]: row for row in map(json.loads, Path(shell.directory, "out.jsonl").read_text().splitlines())}
    for row in rows.values():
        state = row["state"]
        assert state["loop"].startswith("uvloop")
        assert state["thread"].startswith("matrix-bus-handler")
        assert state["process"] not in (0, state["worker"])
    assert [rows[n]["outcome"] for n in range(5)] == ["success", "failed", "success", "success", "success"]
    assert rows[1]["reason"] == "error: KeyError"
    assert 'raise KeyError("no such thing")' in rows[1]["errors"][0]["message"]
    assert "matrix_bus/worker" not in rows[1]["errors"][0]["message"]

    lines = [json.loads(line) for line in worker.said.splitlines() if line.startswith("{")]
    (blocked,) = [line for line in lines if line["event"] == "worker.loop_blocked"]
    assert blocked["role"] == "blocks"
    assert "kinds.py" in blocked["where"]
    (raised,) = [line for line in lines if line["event"] == "worker.handler_raised"]
    assert (raised["row"], raised["role"], raised["hop"]) == (1, "blocks", 4)
    assert raised["run"].startswith("kinds-")

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        metrics = answer.read().decode()
    assert 'matrix_bus_hops_total{role="in_thread",settled="advance",workflow="kinds"} 5.0' in metrics
    assert 'matrix_bus_hops_total{role="blocks",settled="outcome",workflow="kinds"} 5.0' in metrics
    assert 'matrix_bus_outcomes_total{outcome="failed",workflow="kinds"} 1.0' in metrics
    assert 'matrix_bus_handler_seconds_count{role="blocks",workflow="kinds"} 5.0' in metrics


HANGS = """
import os
import time

from matrix_bus import Next, Outcome, Row, State, Workflow, success, to


class Work(State):
    x: int


def work(name: str) -> None:
    if os.environ.get("HANGS"):
        open(f"{name} works", "x").close()
        time.sleep(600)


flow = Workflow("hangs", state=Work, start="pick")


@flow.role
async def pick(row: Row[Work]) -> Next:
    return to("in_thread" if row.state.x else "in_process")


@flow.role
def in_thread(row: Row[Work]) -> Outcome:
    work("thread")
    return success()


@flow.role(process=True)
def in_process(row: Row[Work]) -> Outcome:
    work("process")
    return success()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_worker_ends_with_its_processes_although_handlers_hang(
    shell: Shell, broker: Broker, number: int, code: int
) -> None:
    (shell.directory / "hangs.py").write_text(HANGS)
    words = ("-w", "hangs.py", "--server", broker.url)
    submitter = shell.start("submit", str(shell.dataset(2)), *words, "ack_wait_s=2")
    worker = shell.start("worker", *words, "--grace-s", "0.2", HANGS="yes")
    for name in ("thread", "process"):
        until_sync((shell.directory / f"{name} works").exists, f"the handler in a {name} to be at work")
    children = psutil.Process(worker.pid).children(recursive=True)
    assert children
    worker.signal(number)
    assert worker.ends(20) == code, worker.said
    assert "Traceback" not in worker.said
    until_sync(lambda: not any(child.is_running() for child in children), "its processes to be gone")
    shell.start("worker", *words)
    assert submitter.ends(20) == 0, submitter.said
    rows = [json.loads(line) for line in (shell.directory / "out.jsonl").read_text().splitlines()]
    assert [(row["outcome"], row["errors"]) for row in rows] == [("success", [])] * 2
