"""How long until something can be used: the help text, the package, a connection, a worker.

    python -m benchmarks.startup [--repeat 5]

Each time has fresh processes; medians are reported, in seconds. `help` and `worker_ready` are from the start of the
process, the interpreter's own start included; a worker is ready when it says that it serves a run that was there
before it. `import` is `import matrix_bus` alone, `connect` the first connection of a process, with all that is
imported for it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from benchmarks.stage import worker
from matrix_bus import RunConfig, load_workflow, run
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus

_WORKFLOW = Path(__file__).with_name("latency.py")
_GOALS = {"help_s": 0.2, "import_s": 0.1, "connect_s": 0.4, "worker_ready_s": 1.0}
_IMPORT = "import time; at = time.perf_counter(); import matrix_bus; print(time.perf_counter() - at)"
_CONNECT = """
import asyncio, sys, time
import matrix_bus
at = time.perf_counter()
async def main():
    async with matrix_bus.connect(sys.argv[1]):
        print(time.perf_counter() - at)
asyncio.run(main())
"""


def _timed(*words: str) -> float:
    at = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - at


def _printed(*words: str) -> float:
    return float(subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True).stdout)


async def _open_run(url: str) -> None:
    async with await Bus.connect(url) as bus:
        await run.open_run(bus, run.new_record(load_workflow(str(_WORKFLOW)), RunConfig()))


def _worker_ready(directory: Path, number: int, url: str) -> float:
    at = time.perf_counter()
    client = worker(directory, number, url, str(_WORKFLOW), 8)
    try:
        while not client.said("worker.serving"):
            client.check()
            time.sleep(0.002)
        return time.perf_counter() - at
    finally:
        client.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="startup", description="How long until something can be used.")
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    if given.repeat < 1:
        parser.error("--repeat must be at least 1")
    found: dict[str, list[float]] = {name: [] for name in _GOALS}
    with tempfile.TemporaryDirectory(prefix="matrix-bus-startup-") as folder:
        directory = Path(folder)
        with Broker(directory / "broker") as broker:
            asyncio.run(_open_run(broker.url))
            _timed("-m", "matrix_bus", "--help")  # the first of all reads the files from disk
            for number in range(given.repeat):
                found["help_s"].append(_timed("-m", "matrix_bus", "--help"))
                found["import_s"].append(_printed("-c", _IMPORT))
                found["connect_s"].append(_printed("-c", _CONNECT, broker.url))
                found["worker_ready_s"].append(_worker_ready(directory, number, broker.url))
    made = {
        "benchmark": "startup",
        **{name: round(statistics.median(seconds), 3) for name, seconds in found.items()},
        "goals_met": {name: statistics.median(seconds) <= _GOALS[name] for name, seconds in found.items()},
        "runs": {name: [round(one, 3) for one in seconds] for name, seconds in found.items()},
        "machine": {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)},
    }
    print(msgspec.json.encode(made).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
