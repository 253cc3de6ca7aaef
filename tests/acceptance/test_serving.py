"""Model servers that are announced by hand, as typed."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

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


def test_mistakes_are_explained(shell: Shell, broker: Broker, model_url: str) -> None:
    server = ("--server", broker.url)
    for words, said in (
        (("--url", model_url), "--url needs --model NAME"),
        (("--url", model_url, "--model", "big"), "has no model 'big': it has tiny"),
        (("--url", "localhost:8000", "--model", "tiny"), "must look like http://host:8000/v1"),
        (("--url", model_url, "--model", "tiny", "--label", "gpu"), "--label 'gpu': must be NAME=VALUE"),
        (("--url", model_url, "--model", "tiny", "--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY"),
        (("stat",), "serve stat: start, stop or status"),
    ):
        wrong = shell.run("serve", *words, *server)
        assert (wrong.returncode, said in wrong.stderr) == (2, True), (words, wrong.stderr)
