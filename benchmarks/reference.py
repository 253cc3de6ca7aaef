"""The reference implementation's own overhead test, measured beside ours: `coral_mmlu_pro_dummy` of fair-matrix.

Its workload is the one that `benchmarks.workload` follows: no model, 1 024 ± 20 % characters, agreement around turn 3.
It lives in a virtual environment of its own, with every package pinned in `reference.txt`: its Ray must be older
than 2.56, from where on every row fails while its progress bar goes to 100 %. So the exit code proves nothing, and
hops are counted from the history of its output rows, each of which is checked.

Ray runs inside the measured program (`ray.init`), not from `ray start`: the latter replaces 127.0.0.1 by the address
of the machine and listens on all interfaces. All its processes share one session, which is how they are stopped.

The time runs from the first row's creation to the last row's arrival at its sink, by its own time stamps: the start
of Ray and of its actors, reading the dataset and writing the last row are not counted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
from msgspec import Struct

from benchmarks.workload import LENGTH, SPREAD, line

DEFAULT_ENVIRONMENT = Path(__file__).resolve().parent.parent / ".reference"
_PINS = Path(__file__).with_name("reference.txt")
_CYCLE = ("teacher", "answer_extractor", "answer_matcher", "student", "answer_extractor", "answer_matcher")
_MAX_TURNS = 20
_CPUS = 32
"""Logical ones, so that all actors are placed at once (they ask for 5.5)."""
_LEAST_CONCURRENT = 1000
"""With fewer rows in flight than rows, its progress poll of one second sets the pace."""
_STOP_S = 15.0
_TAIL = 3000

_PROGRAM = """
import os, runpy, signal, sys, threading
import ray

def until_orphaned():
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=until_orphaned, daemon=True).start()
ray.init(
    address="local", num_cpus=int(sys.argv.pop(1)), include_dashboard=False,
    _node_ip_address="127.0.0.1", _temp_dir=sys.argv.pop(1),
)
runpy.run_module("matrix.agents.p2p_agents", run_name="__main__", alter_sys=True)
"""
"""As `python -m` would, except that it finds Ray initialized and uses it."""

_VERSIONS = """
import importlib.util, json, platform
from importlib.metadata import version
from pathlib import Path

(folder,) = importlib.util.find_spec("matrix").submodule_search_locations
later = Path(folder, "agents", "dispatcher.py").exists()
build = "the repository, with dispatcher" if later else "PyPI wheel, older than the repository: no dispatcher"
found = {"fair-matrix": version("fair-matrix"), "build": build, "ray": version("ray")}
print(json.dumps(found | {"python": platform.python_version()}))
"""


class Reference(Struct):
    """One measurement."""

    seconds: float
    rows: int
    hops: int
    problems: list[str]

    @property
    def hops_per_s(self) -> float:
        return self.hops / self.seconds

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds


class Response(Struct):
    status_ok: bool = False
    text: str = ""
    agreement: bool = False
    rated_turns: int = 0


class Message(Struct):
    agent: str
    response: Response


class Written(Struct):
    """A row of its output; one that it gave up has no history."""

    id: int | str
    history: list[Message] = []
    creation_timestamp: float = 0.0
    finish_timestamp: float = 0.0
    error: str = ""


def prepare(environment: Path) -> None:
    """Makes the environment, unless it holds the pinned packages already."""
    stamp = environment / _PINS.name
    if stamp.is_file() and stamp.read_bytes() == _PINS.read_bytes():
        return
    print(f"installing the reference into {environment}", file=sys.stderr, flush=True)
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", _PINS], check=True, stdout=sys.stderr)
    shutil.copyfile(_PINS, stamp)


def versions(environment: Path) -> dict[str, str]:
    """What is measured. Wheel and repository carry the same number, but only the latter has a dispatcher."""
    done = subprocess.run([environment / "bin" / "python", "-c", _VERSIONS], check=True, capture_output=True)
    return msgspec.json.decode(done.stdout, type=dict[str, str])


def measure(environment: Path, rows: int, in_flight: int, timeout_s: float) -> Reference:
    """Runs its test on a Ray of its own. Raises `SystemExit` if it fails or takes longer than `timeout_s`."""
    with tempfile.TemporaryDirectory(prefix="mb-ref-", ignore_cleanup_errors=True) as folder:
        directory = Path(folder)
        output, log = directory / "out.jsonl", directory / "reference.log"
        (directory / "in.jsonl").write_bytes(b"".join(_input(n) for n in range(rows)))
        words: list[str | Path] = [
            *(environment.absolute() / "bin" / "python", "-c", _PROGRAM, str(_CPUS), directory / "ray"),
            "--config-name=coral_mmlu_pro_dummy",
            f"max_concurrent_tasks={max(_LEAST_CONCURRENT, in_flight)}",
            *("dataset.name=json", "dataset.split=train", f"dataset.data_files={directory / 'in.jsonl'}"),
            *(f"dataset.cut_off={rows}", f"output.path={output}", f"matrix.matrix_dir={directory / 'matrix'}"),
            *(f"hydra.run.dir={directory / 'hydra'}", f"orchestrator.max_turns={_MAX_TURNS}"),
        ]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                words,
                cwd=directory,
                env=_environ(environment, directory),
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the reference took longer than {timeout_s} s:\n{_tail(log)}") from None
        finally:
            _stop(process)
        if code or not output.is_file():
            raise SystemExit(f"the reference ended with exit code {code}:\n{_tail(log)}")
        return examine(output.read_bytes(), rows)


def examine(output: bytes, rows: int) -> Reference:
    """Counts the hops in its output and looks for what is not sound."""
    written: list[Written] = []
    problems: list[str] = []
    for n, text in enumerate(output.splitlines()):
        try:
            written.append(msgspec.json.decode(text, type=Written))
        except msgspec.DecodeError as error:
            problems.append(f"reference: line {n + 1} of its output: {error}")
    if sorted(str(row.id) for row in written) != sorted(map(str, range(rows))):
        problems.append(f"reference: {len(written)} rows, {len({row.id for row in written})} distinct, of {rows}")
    problems += [f"reference: row {row.id}: {wrong}" for row in written if (wrong := _wrong(row))]
    hops = sum(len(row.history[1:]) for row in written)
    timed = [row for row in written if row.history]
    if not timed:
        raise SystemExit("\n".join(["the reference made no hops", *problems[:20]]))
    seconds = max(row.finish_timestamp for row in timed) - min(row.creation_timestamp for row in timed)
    if seconds <= 0:
        raise SystemExit(f"the reference's time stamps span {seconds} s")
    return Reference(seconds, len(written), hops, problems)


def _wrong(row: Written) -> str:
    """What tells that this row did not make its way; empty for a sound one. Its history begins with the question."""
    if row.error or len(row.history) < 2:
        return row.error or "no hops"
    said = row.history[1:]
    if any(message.agent != _CYCLE[n % len(_CYCLE)] for n, message in enumerate(said)) or len(said) % 3:
        return f"an unexpected route: {[message.agent for message in said]}"
    if failed := sum(not message.response.status_ok for message in said):
        return f"{failed} of {len(said)} hops failed"
    low, high = int(LENGTH * (1 - SPREAD)), int(LENGTH * (1 + SPREAD))
    if not all(low <= len(message.response.text) <= high for message in said[::3]):
        return "an answer of the wrong length"
    matches = [message.response for message in said[2::3]]
    agreed = [match.agreement for match in matches]
    if any(agreed[:-1]) or not (agreed[-1] or len(matches) == _MAX_TURNS):
        return f"ended against its matcher: {agreed}"
    if [match.rated_turns for match in matches] != list(range(1, len(matches) + 1)):
        return f"turns lost: {[match.rated_turns for match in matches]}"
    return ""


def _input(n: int) -> bytes:
    """The benchmark's question, in the shape of an MMLU-Pro row."""
    question = msgspec.json.decode(line(n))["question"]
    options = [f"The premises hold in case {case} and in no other." for case in range(10)]
    answer = n % len(options)
    row: dict[str, Any] = {"question_id": n, "question": question, "options": options}
    row |= {"answer": chr(ord("A") + answer), "answer_index": answer, "category": "logic", "src": "synthetic"}
    return msgspec.json.encode(row) + b"\n"


def _environ(environment: Path, directory: Path) -> dict[str, str]:
    """Ours, without what would change Ray or Python, and nothing that goes to the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON", "HF_"))}
    return kept | {
        "PATH": f"{environment.absolute() / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "HF_HOME": str(directory / "hf"),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stops the program and every process of its session; Ray's own go shortly after it."""
    assert process.stdin is not None
    process.stdin.close()
    if process.poll() is None:
        process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    for send in (psutil.Process.terminate, psutil.Process.kill):
        deadline = time.monotonic() + _STOP_S
        for member in _session(process.pid):
            with suppress(psutil.NoSuchProcess):
                send(member)
        while _session(process.pid) and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.1)
    process.wait(_STOP_S)


def _session(leader: int) -> list[psutil.Process]:
    """The living processes of this session. Its number is not given to another while it has members."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_TAIL:]
