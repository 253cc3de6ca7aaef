"""Commands as a user types them: real processes, in a directory and with a state directory of the test's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from matrix_bus.broker import local_broker
from tests.helpers import until_sync

FLOW = '''
"""Eight hops through four roles; every handler call leaves a line when it starts and one when it ends."""

import asyncio
import os

from matrix_bus import Large, Next, Outcome, Row, State, Workflow, success, to

CALLS = os.open(os.environ["CALLS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
SECONDS = float(os.environ.get("SECONDS", "0.003"))
POISON = os.environ.get("POISON")
"""Id of a row that kills whoever works on its second hop."""


class Walk(State):
    x: int
    path: list[str] = []
    page: Large[str] = Large("")


flow = Workflow("walk", state=Walk, start="plan")


async def step(row: Row[Walk]) -> None:
    call = f"{row.id} {row.hop} {row.attempt} {os.getpid()}\\n"
    os.write(CALLS, b"> " + call.encode())
    if row.id == POISON and row.hop == 2:
        os.kill(os.getpid(), 9)
    await asyncio.sleep(SECONDS)
    row.state.path.append(f"{row.hop}")
    os.write(CALLS, b"< " + call.encode())


@flow.role
async def plan(row: Row[Walk]) -> Next:
    await step(row)
    return to("write")


@flow.role
async def write(row: Row[Walk]) -> Next:
    if page := await row.state.page.get():
        row.state.page = Large(page[::-1])
    await step(row)
    return to("judge")


@flow.role
async def judge(row: Row[Walk]) -> Next:
    await step(row)
    return to("write") if row.turn < 3 else to("close")


@flow.role
async def close(row: Row[Walk]) -> Outcome:
    await step(row)
    return success("walked")
'''
HOPS = 8
"""plan, three times write and judge, close."""


class Command:
    """A running command, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        """Its stdout and stderr."""
        return self.log.read_text()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def says(self, text: str, timeout_s: float = 30.0) -> str:
        """Waits until it has said so."""

        def heard() -> bool:
            assert text in self.said or self.running, f"ended with {self.process.returncode}:\n{self.said}"
            return text in self.said

        until_sync(heard, f"{text!r}, said was:\n{self.said}", timeout_s)
        return self.said

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and reap."""
        self.process.kill()
        self.process.wait()

    def ends(self, timeout_s: float = 60.0) -> int:
        """Its exit code, once it has ended."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s; it said:\n{self.said}") from None


class Shell:
    """A user at a terminal in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.flow = directory / "walk.py"
        self.flow.write_text(FLOW)
        self.calls = directory / "calls"
        self.environment = {
            **os.environ,
            "MATRIX_BUS_HOME": str(directory / "home"),
            "CALLS": str(self.calls),
            "PYTHONUNBUFFERED": "1",
        }
        self.environment.pop("MATRIX_BUS_SERVER", None)
        self._started: list[Command] = []

    def start(self, *words: str, **environment: str) -> Command:
        """Starts `matrix-bus WORDS`."""
        log = self.directory / f"said.{len(self._started)}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "matrix_bus", *words],
                cwd=self.directory,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # whoever runs the tests in the background may have Ctrl-C ignored, and children inherit that
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
            )
        self._started.append(Command(process, log))
        return self._started[-1]

    def run(self, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Runs `matrix-bus WORDS` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "matrix_bus", *words],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def dataset(self, rows: int, name: str = "data.jsonl", page: Callable[[int], str] = lambda _: "") -> Path:
        """Rows of this name; `page` is what each row has to carry."""
        path = self.directory / name
        with path.open("w") as file:
            for x in range(rows):
                file.write(json.dumps({"x": x, **({"page": page(x)} if page(x) else {})}) + "\n")
        return path

    def end(self) -> None:
        """Kills what is left of this shell's own processes."""
        for command in self._started:
            if command.running:
                command.kill()


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """A user whose state is in `tmp_path`; the local broker, if one was started, is stopped at the end."""
    user = Shell(tmp_path)
    monkeypatch.setenv("MATRIX_BUS_HOME", user.environment["MATRIX_BUS_HOME"])
    yield user
    user.end()
    local_broker().stop()
