"""Settings and datasets on a real command line, bad data, and models that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from matrix_bus.broker import Broker
from matrix_bus.service import free_port
from tests.acceptance.conftest import Shell

CHAT = """
import matrix_bus as mb


class Draft(mb.State):
    topic: str


flow = mb.Workflow("chat", state=Draft, start="writer")


@flow.role(sampling=mb.Sampling(temperature=0.1))
async def writer(row: mb.Row[Draft], llm: mb.LLM) -> mb.Outcome:
    await llm.chat([mb.user(row.state.topic)])
    return mb.success()
"""


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def chat(shell: Shell) -> Path:
    path = shell.directory / "chat.py"
    path.write_text(CHAT)
    return path


def test_settings_and_dataset_in_any_order(shell: Shell, broker: Broker) -> None:
    shell.dataset(2).rename(shell.directory / "a=b.jsonl")
    shell.start("worker", "-w", "walk.py", "--server", broker.url)
    done = shell.run("submit", "trials=2", "./a=b.jsonl", "seed=7", "-w", "walk.py", "--server", broker.url)
    assert done.returncode == 0, done.stderr
    assert len(lines(shell.directory / "out.jsonl")) == 4
    manifest = json.loads((shell.directory / "out.manifest.json").read_text())
    assert (manifest["run"]["config"]["trials"], manifest["run"]["config"]["seed"]) == (2, 7)
    mistaken = shell.run("submit", "a=b.jsonl", "-w", "walk.py", "--server", broker.url)
    assert mistaken.returncode == 2
    assert "'a=b.jsonl' is read as a setting; the file is ./a=b.jsonl" in mistaken.stderr


def test_config_shows_values_and_where_they_come_from(shell: Shell, chat: Path) -> None:
    mine = shell.directory / "mine"
    (mine / "llm").mkdir(parents=True)
    (mine / "config.yaml").write_text("defaults:\n  - llm: ours\ntrials: 3\n")
    (mine / "llm" / "ours.yaml").write_text("urls: [http://gpu1:8000/v1]\nmodel: llama\n")
    words = ["-w", "chat.py", "--config-dir", "mine", "llm.top_p=0.5", "roles.writer.slots=8"]
    shown = shell.run("config", *words)
    assert shown.returncode == 0, shown.stderr
    parts = [line.split("  # ") for line in shown.stdout.splitlines() if "  # " in line]
    origin = {value.strip(): where for value, where in parts}
    assert origin["trials: 3"] == "mine/config.yaml"
    assert origin['model: "llama"'] == "llm/ours (mine/llm/ours.yaml)"
    assert origin["top_p: 0.5"] == origin["slots: 8"] == "command line"
    assert origin["max_in_flight: 10000"] == "default"
    assert "writer: model llama, temperature=0.1 (workflow chat), top_p=0.5 (llm)" in shown.stdout
    stored = json.loads(shell.run("config", *words, "--json").stdout)
    assert stored == {
        "llm": {"model": "llama", "urls": ["http://gpu1:8000/v1"], "top_p": 0.5},
        "roles": {"writer": {"slots": 8}},
        "trials": 3,
    }


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("llm.temprature=1", ["setting at llm", "temprature", "did you mean 'temperature'"]),
        ("llm.temperature=hot", ["setting at llm.temperature", "float", "'hot'"]),
        ("roles.writr.slots=2", ["writr", "did you mean 'writer'"]),
        ("workflow.turns=2", ["no parameters", "turns"]),
        ("llm=vlm", ["no option 'vlm'", "vllm"]),
        ("llm.urls=http://gpu:port/v1", ["setting at llm.urls", "'http://gpu:port/v1'", "http://host:8000/v1"]),
        ("foo=1", ["foo", "max_in_flight"]),
        ("llm.model=a,b", ["several values", "several runs"]),
        ("llm.api_key_env=${oc.env:HOME}", ["would be looked up", "environment variable"]),
    ],
)
def test_a_wrong_setting_says_where_and_what_to_do(shell: Shell, chat: Path, word: str, expected: list[str]) -> None:
    done = shell.run("config", "-w", "chat.py", word)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr and "+key" not in done.stderr
    for text in expected:
        assert text in done.stderr


MIXED = '{"x": 0, "id": "zero"}\n{"x": 1, "id": "zero"}\n{"x": 2}\nnot json\n{"x": 3, "id": "2"}\n'


def test_an_id_that_was_taken_is_rejected_with_its_place(shell: Shell, broker: Broker) -> None:
    (shell.directory / "mixed.jsonl").write_text(MIXED)
    shell.start("worker", "-w", "walk.py", "--server", broker.url)
    done = shell.run("submit", "mixed.jsonl", "-w", "walk.py", "--server", broker.url)
    assert done.returncode == 0, done.stderr
    rejected = lines(shell.directory / "out.jsonl.rejected.jsonl")
    assert [line["line"] for line in rejected][:2] == [2, 4]
    assert rejected[0]["reason"] == "the id 'zero' was taken before, by line 1"
    written = lines(shell.directory / "out.jsonl")
    assert len(written) + len(rejected) == 5


@pytest.mark.parametrize("stdin", [False, True])
def test_strict_submits_nothing_where_a_line_is_bad(shell: Shell, broker: Broker, stdin: bool) -> None:
    (shell.directory / "mixed.jsonl").write_text(MIXED)
    (shell.directory / "good.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    words = ("-w", "walk.py", "--strict", "--detach", "--server", broker.url)
    for name, code in (("mixed", 2), ("good", 0)):
        data = "-" if stdin else f"{name}.jsonl"
        with (shell.directory / f"{name}.jsonl").open() as file:
            done = subprocess.run(
                [sys.executable, "-m", "matrix_bus", "submit", data, *words],
                cwd=shell.directory,
                env=shell.environment,
                stdin=file,
                capture_output=True,
                text=True,
                timeout=50,
                check=False,
            )
        assert done.returncode == code, done.stderr
        if code:
            assert "cannot become rows, so with --strict nothing is submitted" in done.stderr
            assert lines(shell.directory / "out.jsonl.rejected.jsonl")[0]["line"] == 2
            assert shell.run("runs", "--server", broker.url).stdout == ""
    assert "2 rows" in shell.run("runs", "--server", broker.url).stdout


class _Other(BaseHTTPRequestHandler):
    """A model server that has another model."""

    def do_GET(self) -> None:
        body = b'{"object": "list", "data": [{"id": "other-model", "object": "model"}]}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def other_model() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Other)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_that_is_not_there_is_one_message_before_anything_is_submitted(
    shell: Shell, chat: Path, broker: Broker, other_model: str
) -> None:
    (shell.directory / "topics.jsonl").write_text('{"topic": "rain"}\n')
    words = ["run", "topics.jsonl", "-w", "chat.py", "--server", broker.url]
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    for settings, expected in (
        ([f"llm.urls={nobody}", "llm.model=m"], [nobody, "can be reached"]),
        ([f"llm.urls={other_model}", "llm.model=m"], ["'m'", "other-model"]),
        (["llm.urls=ftp://x"], ["ftp://x", "http://host:8000/v1"]),
        (["llm=openai", "llm.model=m", "llm.api_key_env=NO_SUCH_KEY"], ["NO_SUCH_KEY"]),
    ):
        done = shell.run(*words, *settings)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
        for text in expected:
            assert text in done.stderr
    assert shell.run("runs", "--server", broker.url).stdout == ""
    left = [p for p in psutil.Process().children(recursive=True) if "matrix_bus" in " ".join(p.cmdline())]
    assert left == [], "nothing is left running"


def test_a_file_of_bad_lines_leaves_no_run_behind(shell: Shell, broker: Broker) -> None:
    (shell.directory / "bad.jsonl").write_text("no\n[1]\n")
    done = shell.run("submit", "bad.jsonl", "-w", "walk.py", "--server", broker.url, "--run", "r")
    assert done.returncode == 2
    assert "no line of bad.jsonl could become a row: see out.jsonl.rejected.jsonl" in done.stderr
    assert [line["line"] for line in lines(shell.directory / "out.jsonl.rejected.jsonl")] == [1, 2]
    assert shell.run("runs", "--server", broker.url).stdout == ""
    (shell.directory / "bad.jsonl").write_text('no\n{"x": 1}\n')
    done = shell.run("submit", "bad.jsonl", "-w", "walk.py", "--server", broker.url, "--run", "r", "--detach")
    assert done.returncode == 0, done.stderr
    assert "1 lines rejected" in done.stderr
    again = shell.run("submit", "bad.jsonl", "-w", "walk.py", "--server", broker.url, "--run", "r", "--detach")
    assert "run r is submitted already, with 1 rows" in again.stderr
