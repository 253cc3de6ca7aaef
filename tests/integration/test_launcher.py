"""Model servers as child processes: real ones that crash, hang, refuse to go, and have children of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from matrix_bus.errors import UsageError
from matrix_serving import MODEL_NAME, launcher
from matrix_serving.backends import Launch, Wanted, llama
from matrix_serving.launcher import Server
from matrix_serving.local import models_at
from tests.helpers import until

STUB = """
import os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

folder, port, manner = sys.argv[1:]
engine = subprocess.Popen(["sleep", "1000"])  # as vLLM has one, with the GPU's memory

class Models(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "stub"}]}')

    def log_message(self, *_):
        pass

def stop(*_):
    print("stopping, the engine", "lives" if engine.poll() is None else "was stopped first", flush=True)
    if manner != "stubborn":
        sys.exit(0)

signal.signal(signal.SIGTERM, stop)
if manner != "silent":
    server = HTTPServer(("127.0.0.1", int(port)), Models)
print("serving as", os.getpid(), flush=True)
with open(f"{folder}/pids", "a") as file:
    file.write(f"{os.getpid()} {engine.pid}\\n")
while manner == "silent":
    signal.pause()
server.serve_forever()
"""


class Watched:
    """A server of the launcher with what it said and how it changed."""

    def __init__(self, folder: Path, manner: str = "good", ready_within_s: float = 30.0) -> None:
        stub = folder / "stub.py"
        stub.write_text(STUB)
        self.folder = folder
        words = (sys.executable, str(stub), str(folder), "{port}", manner)
        self.server = Server(Launch("stub", words, {}), folder / "logs" / "stub.log", ready_within_s=ready_within_s)
        self.changes: list[bool] = []
        self.said: list[str] = []
        self.task = asyncio.create_task(self.server.run(self.changes.append, self.said.append))

    async def up(self, times: int = 1) -> tuple[int, int]:
        """Pids of the server and of its engine, once it has come up so many times."""
        await until(lambda: self.task.done() or self.changes.count(True) == times, f"up {times} times")
        assert not self.task.done(), self.task
        return pids_in(self.folder)[-1]

    async def end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, UsageError):
            await self.task


def pids_in(folder: Path) -> list[tuple[int, int]]:
    """Of each stub that has run in this folder: its own, and that of its engine."""
    lines = (folder / "pids").read_text().splitlines()
    return [(int(server), int(engine)) for server, engine in map(str.split, lines)]


def gone(*pids: int) -> bool:
    """Whether none of them runs; one that nobody has reaped does not."""
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                return False
    return True


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_FIRST_S", 0.1), ("_LOOK_S", 0.1), ("_LOOK_TIMEOUT_S", 0.5), ("_MISSED", 3)):
        monkeypatch.setattr(launcher, name, value)


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    made = Watched(tmp_path)
    yield made
    await made.end()


async def test_the_engine_of_a_dead_server_is_gone_when_another_comes(watched: Watched) -> None:
    server, engine = await watched.up()
    os.kill(server, signal.SIGKILL)
    again = await watched.up(2)
    assert gone(server, engine)
    assert not gone(*again)
    assert watched.changes == [True, False, True]
    assert watched.said[0].startswith("the server of stub ended with exit code -9, starting it again in ")


async def test_each_crash_is_waited_for_longer(watched: Watched) -> None:
    for times in (1, 2, 3):
        server, _ = await watched.up(times)
        os.kill(server, signal.SIGKILL)
    await watched.up(4)
    started = [f"serving as {server}\n" for server, _ in pids_in(watched.folder)]
    assert watched.server.log.read_text() == "".join(started)
    assert [said.rpartition(" ends:\n  ")[2] for said in watched.said] == [line.strip() for line in started[:3]]
    assert [said.partition(" in ")[2].partition(" s;")[0] for said in watched.said] == ["0.2", "0.4", "0.8"]


async def test_a_server_that_hangs_is_started_anew(watched: Watched) -> None:
    server, engine = await watched.up()
    os.kill(server, signal.SIGSTOP)
    await watched.up(2)
    assert gone(server, engine)
    assert "has not answered 3 times in a row" in watched.said[0]


async def test_a_server_whose_keeper_is_killed_is_brought_back(watched: Watched) -> None:
    server, engine = await watched.up()
    keeper = os.getpgid(server)
    assert keeper != server
    os.kill(keeper, signal.SIGKILL)
    await watched.up(2)
    assert gone(server, engine)
    assert "was killed together with its keeper" in watched.said[0]


async def test_sigterm_goes_to_the_server_alone(watched: Watched) -> None:
    pids = await watched.up()
    await watched.end()
    assert watched.server.log.read_text().endswith("stopping, the engine lives\n")
    await until(lambda: gone(*pids), "all of it to be gone")


async def test_a_server_that_does_not_go_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_GRACE_S", 0.5)
    watched = Watched(tmp_path, "stubborn")
    pids = await watched.up()
    await watched.end()
    assert watched.server.log.read_text().endswith("stopping, the engine lives\n")
    await until(lambda: gone(*pids), "all of it to be gone")


async def test_a_server_that_never_answers_is_a_mistake_and_ends(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "silent", ready_within_s=2.0)
    with pytest.raises(UsageError, match=r"the server of stub does not answer on port \d+ after 2 s; the end of"):
        await watched.task
    assert watched.changes == []
    assert "stopping" in watched.server.tail()
    await until(lambda: gone(*pids_in(tmp_path)[0]), "all of it to be gone")


async def test_a_proxy_is_not_asked_about_our_own_server(tmp_path: Path) -> None:
    code = f"""
import asyncio, pathlib
from tests.integration.test_launcher import Watched

async def main():
    watched = Watched(pathlib.Path({str(tmp_path)!r}))
    await watched.up()
    await watched.end()

asyncio.run(main())
"""
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, env=environment)
    assert await process.wait() == 0


async def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import asyncio, pathlib
from tests.integration.test_launcher import Watched

async def main():
    watched = Watched(pathlib.Path({str(tmp_path)!r}), "stubborn")
    await watched.up()
    print("up", flush=True)
    await watched.task

asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"up\n"
    (pids,) = pids_in(tmp_path)
    keeper = os.getpgid(pids[0])
    process.kill()
    await process.wait()
    await until(lambda: gone(*pids, keeper), "the server, its engine and its keeper to be gone")


@pytest.mark.model
async def test_the_embedded_model(tmp_path: Path) -> None:
    launch = llama(Wanted("embedded"))
    server = Server(launch, tmp_path / "llama.log")
    changes: list[bool] = []
    said: list[str] = []
    task = asyncio.create_task(server.run(changes.append, said.append))
    await until(lambda: changes or task.done(), "it to answer", 50)
    url = f"http://127.0.0.1:{server.port}/v1"
    assert [model["id"] for model in models_at(url)] == [MODEL_NAME] == [launch.name]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert models_at(url) == []
