"""Model servers that are announced by hand, as typed."""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from matrix_bus.broker import Broker
from tests.acceptance.conftest import Shell
from tests.helpers import until_sync

FLOW = """
import matrix_bus as mb

class Said(mb.State):
    x: int
    text: str = ""

flow = mb.Workflow("said", state=Said, start="ask")

@flow.role
async def ask(row: mb.Row[Said], llm: mb.LLM) -> mb.Outcome:
    row.state.text = (await llm.chat([mb.user(f"{row.state.x}?")])).text
    return mb.success()
"""


class _Model(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._say(b'vllm:num_requests_running{model="m"} 3.0\nvllm:generation_tokens_total 70\n')
        else:
            self._say(b'{"data": [{"id": "tiny"}]}')

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        self._say(json.dumps({"choices": [{"message": {"content": f"{asked}!"}}]}).encode())

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def model_url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_run_finds_the_server_that_was_announced(shell: Shell, broker: Broker, model_url: str) -> None:
    server = ("--server", broker.url)
    flow = shell.directory / "said.py"
    flow.write_text(FLOW)
    assert "no model servers are announced" in shell.run("endpoints", *server).stderr
    shell.start("worker", "-w", str(flow), *server)
    submitter = shell.start("submit", str(shell.dataset(3)), "-w", str(flow), *server, "llm.model=tiny")
    serving = shell.start("serve", "--url", model_url, "--model", "tiny", "--label", "gpu=none", *server)
    serving.says(f"serving tiny at {model_url}")
    assert submitter.ends() == 0, submitter.said
    written = [json.loads(line) for line in (shell.directory / "out.jsonl").read_text().splitlines()]
    assert sorted(line["state"]["text"] for line in written) == ["0?!", "1?!", "2?!"]
    (endpoint,) = json.loads((shell.directory / "out.manifest.json").read_text())["endpoints"].items()
    assert endpoint[0] == model_url
    assert (endpoint[1]["model"], endpoint[1]["calls"], endpoint[1]["usage"]["calls"]) == ("tiny", 3, 3)
    assert endpoint[1]["latency_s"] > 0
    listed = shell.run("endpoints", *server).stdout
    assert listed.startswith(f"tiny\t{model_url}\tup\tx1\t")
    assert "3 running, 0 tokens/s\tgpu=none" in listed
    serving.signal(15)
    assert serving.ends() == 0
    assert "withdrawn" in serving.said
    until_sync(lambda: not shell.run("endpoints", *server).stdout, "it to be gone")


SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Tiny(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.say({"data": [{"id": "tiny"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.say({"choices": [{"message": {"content": str(os.getpid())}}]})

    def say(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

print("hello from", os.getpid(), flush=True)
if len(sys.argv) > 2:
    sys.exit(sys.argv[2])
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Tiny).serve_forever()
"""


def test_servers_are_launched_brought_back_and_ended(shell: Shell, broker: Broker) -> None:
    server = ("--server", broker.url)
    flow, tiny = shell.directory / "said.py", shell.directory / "tiny.py"
    flow.write_text(FLOW)
    tiny.write_text(SERVER)
    launch = ("serve", "tiny", "--backend", "command", "--replicas", "2", "--drain-s", "1", *server)
    serving = shell.start(*launch, "--", sys.executable, str(tiny), "{port}")
    until_sync(lambda: serving.said.count("serving tiny at ") == 2, "both servers")
    shell.start("worker", "-w", str(flow), *server)

    def answered_by(run: str) -> set[int]:
        words = ("-w", str(flow), *server, "--run", run, "-o", f"{run}.jsonl", "llm.model=tiny", "llm.sticky=false")
        submitted = shell.run("submit", str(shell.dataset(40)), *words)
        assert submitted.returncode == 0, submitted.stderr
        lines = [json.loads(line) for line in (shell.directory / f"{run}.jsonl").read_text().splitlines()]
        assert len(lines) == 40
        return {int(line["state"]["text"]) for line in lines}

    first = answered_by("first")
    assert len(first) == 2
    victim = first.pop()
    os.kill(victim, 9)
    until_sync(lambda: serving.said.count("serving tiny at ") == 3, "the killed one to be back")
    assert "ended with exit code -9, starting it again" in serving.said
    assert f"hello from {victim}" in serving.said, "the end of its log"
    second = answered_by("second")
    assert len(second) == 2
    assert victim not in second
    serving.signal(15)
    assert serving.ends() == 0
    until_sync(lambda: not any(alive(pid) for pid in second), "its servers to be gone")
    killed = shell.start(*launch, "--", sys.executable, str(tiny), "{port}")
    until_sync(lambda: killed.said.count("serving tiny at ") == 2, "both servers once more")
    third = answered_by("third")
    killed.kill()
    until_sync(lambda: not any(alive(pid) for pid in third), "servers to go with their launcher")


def test_a_simulated_model_is_served_like_any_other(shell: Shell, broker: Broker) -> None:
    server = ("--server", broker.url)
    flow = shell.directory / "said.py"
    flow.write_text(FLOW)
    words = ("serve", "big-model", "--simulate", "embedded", "--drain-s", "1", *server)
    serving = shell.start(*words, "--", "--responder", "fixed:Simulated.")
    serving.says("serving big-model at ")
    shell.start("worker", "-w", str(flow), *server)
    submitted = shell.run("submit", str(shell.dataset(5)), "-w", str(flow), *server, "llm.model=big-model")
    assert submitted.returncode == 0, submitted.stderr
    lines = [json.loads(line) for line in (shell.directory / "out.jsonl").read_text().splitlines()]
    assert {line["state"]["text"] for line in lines} == {"Simulated."}
    assert all(line["usage"]["prompt_tokens"] > 0 for line in lines)
    assert "0 running, 0 waiting" in shell.run("endpoints", *server).stdout
    serving.signal(15)
    assert serving.ends() == 0
    wrong = shell.run("serve", "big-model", "--simulate", "h100", *server)
    assert (wrong.returncode, "there is no profile 'h100'" in wrong.stderr) == (2, True), wrong.stderr


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_server_that_does_not_start_shows_its_log(shell: Shell, broker: Broker) -> None:
    server = ("--server", broker.url)
    tiny = shell.directory / "tiny.py"
    tiny.write_text(SERVER)
    command = ("serve", "tiny", "--backend", "command", *server)
    for words, said in (
        (("--", sys.executable, str(tiny), "{port}", "no GPU found"), "ended with exit code 1; the end of"),
        (("--", sys.executable, str(tiny), "{port}", "no GPU found"), "no GPU found"),
        (("--", "no-such-server"), "no-such-server: No such file"),
        (("--host", "0.0.0.0", "--", "no-such-server", "{host}"), "--host 0.0.0.0 needs --advertise NAME"),
        (("--host", "0.0.0.0", "--advertise", "here", "--", "no-such-server"), "backend 'command' does not take it"),
        ((), "needs a command after --"),
    ):
        wrong = shell.run(*command, *words)
        assert (wrong.returncode, said in wrong.stderr) == (2, True), (words, wrong.stderr)
    unknown = shell.run("serve", "tiny", "--backend", "vlm", *server)
    assert "unknown backend 'vlm': there are vllm, sglang, llama, command, simulator" in unknown.stderr
    few = shell.run("serve", "tiny", "--replicas", "3", "--gpus", "0,1", *server)
    assert "3 replicas with 1 GPUs each need 3, there are 2: 0, 1" in few.stderr


def test_mistakes_are_explained(shell: Shell, broker: Broker, model_url: str) -> None:
    server = ("--server", broker.url)
    for words, said in (
        (("--url", model_url), "--url needs --model NAME"),
        (("--url", model_url, "--model", "big"), "has no model 'big': it has tiny"),
        (("--url", "localhost:8000", "--model", "tiny"), "must look like http://host:8000/v1"),
        (("--url", model_url, "--model", "tiny", "--label", "gpu"), "--label 'gpu': must be NAME=VALUE"),
        (("--url", model_url, "--model", "tiny", "--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY"),
    ):
        wrong = shell.run("serve", *words, *server)
        assert (wrong.returncode, said in wrong.stderr) == (2, True), (words, wrong.stderr)
