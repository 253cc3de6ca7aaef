"""A million rows of three hops in one sitting, as a user runs them, and what every process needed for it.

    python -m benchmarks.million [--rows 1000000] [--in-flight 10000] [--folder FOLDER]

A private broker on file storage, one worker process, and `matrix-bus submit`, which reads the dataset and writes the
outcomes at the same time. Resident memory of each process is looked at every second. Then the output is checked: every
row once, a success, after three hops that each left their mark. The last line is JSON; the exit code is 1 if a row is
wrong or missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import psutil

from matrix_bus import Next, Outcome, Row, State, Workflow, success, to
from matrix_bus.broker import Broker

_ROOT = Path(__file__).resolve().parent.parent
_LOOK_S = 1.0
_TEXT = "Some words that a row carries along. " * 4


class Count(State):
    """A number, and who has seen it."""

    x: int
    text: str
    seen: list[str] = msgspec.field(default_factory=list)


flow = Workflow("million", state=Count, start="first")


@flow.role
async def first(row: Row[Count]) -> Next:
    """The first of three."""
    row.state.seen.append("first")
    return to("second")


@flow.role
async def second(row: Row[Count]) -> Next:
    """The second."""
    row.state.seen.append("second")
    return to("third")


@flow.role
async def third(row: Row[Count]) -> Outcome:
    """The last."""
    row.state.seen.append("third")
    return success()


class _Line(msgspec.Struct):
    row: int
    outcome: str
    hops: int
    state: Count


def check(path: Path, rows: int) -> list[str]:
    """What is wrong with the output; nothing if it is as it must be."""
    decoder = msgspec.json.Decoder(_Line)
    seen = bytearray(rows)
    problems = []
    with open(path, "rb") as file:
        for raw in file:
            line = decoder.decode(raw)
            fine = line.outcome == "success" and line.hops == 3 and line.state.seen == ["first", "second", "third"]
            if not fine or line.state.x != line.row or seen[line.row]:
                problems.append(f"row {line.row}: {raw[:200]!r}")
            seen[line.row] = 1
    missing = rows - sum(seen)
    return [*problems[:10], *([f"{missing} rows are missing"] if missing else [])]


def measure(rows: int, in_flight: int, folder: Path) -> dict[str, object]:
    """The whole sitting."""
    with open(folder / "rows.jsonl", "w") as file:
        file.writelines(f'{{"x":{n},"text":"{_TEXT}"}}\n' for n in range(rows))
    (folder / "broker").mkdir()
    words = [sys.executable, "-m", "matrix_bus"]
    with Broker(folder / "broker") as broker:
        server = ["--server", broker.url]
        worker = subprocess.Popen([*words, "worker", "-w", __file__, *server, "--slots", "1000"], cwd=_ROOT)
        started = time.monotonic()
        submit = subprocess.Popen(
            [*words, "submit", "rows.jsonl", "-w", __file__, *server, f"max_in_flight={in_flight}"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
        processes = {"broker": broker.pid, "worker": worker.pid, "submit": submit.pid}
        watched = {name: psutil.Process(pid) for name, pid in processes.items()}
        looks: dict[str, list[int]] = {name: [] for name in watched}
        cpu_s: dict[str, float] = {}
        try:
            while submit.poll() is None:
                time.sleep(_LOOK_S)
                for name, process in watched.items():
                    try:
                        with process.oneshot():
                            looks[name].append(process.memory_info().rss >> 20)
                            cpu_s[name] = sum(process.cpu_times()[:2])
                    except (psutil.NoSuchProcess, psutil.ZombieProcess):
                        continue
            seconds = time.monotonic() - started
        finally:
            submit.kill()
            worker.terminate()
            worker.wait(30)
        disk = sum(path.stat().st_size for path in (folder / "broker").rglob("*") if path.is_file())
    problems = check(folder / "out.jsonl", rows)
    return {
        "benchmark": "million",
        "ok": submit.returncode == 0 and not problems,
        "problems": problems,
        "rows": rows,
        "hops": 3 * rows,
        "in_flight": in_flight,
        "seconds": round(seconds, 1),
        "rows_per_s": round(rows / seconds, 1),
        "hops_per_s": round(3 * rows / seconds, 1),
        "rss_mib_peak": {name: max(seen) for name, seen in looks.items()},
        "rss_mib_at_fifths": {name: seen[:: max(1, len(seen) // 5)] for name, seen in looks.items()},
        "broker_bytes_per_row": round((max(looks["broker"]) << 20) / rows),
        "cpu_us_per_row": {name: round(spent / rows * 1e6, 1) for name, spent in cpu_s.items()},
        "broker_disk_mib": disk >> 20,
        "output_mib": (folder / "out.jsonl").stat().st_size >> 20,
        "machine": {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="million", description="A million rows in one sitting.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--in-flight", type=int, default=10_000)
    parser.add_argument("--folder", default="", help="for dataset, broker and output; several GB; emptied afterwards")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="matrix-bus-million-", dir=given.folder or None))
    try:
        found = measure(given.rows, given.in_flight, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found), flush=True)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
