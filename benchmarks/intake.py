"""How fast a dataset comes in: read from files of every form, and submitted to a real broker.

    python -m benchmarks.intake [--rows 200000] [--row-bytes 1024] [--submit-rows 200000] [--shards 1]

Rows of the same content lie in a file of each form; each is read once by a process of its own, through the checks of
a workflow, and that process's memory is looked at all the while. Then rows are submitted from a JSONL file by
`matrix-bus submit --detach`, one process per shard, with no worker there to take them away. The last line is JSON;
`rss_growth_mib` is what a reading process grew by between the first and the last tenth of its rows, `rows_per_s` of
submitting is without the start of the command, `rows_per_s_with_start` with it, and CPU is always with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import zstandard

from matrix_bus import State, Workflow, registry, success
from matrix_bus.agent import Outcome, Row
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.dataset import read

_ROOT = Path(__file__).parents[1]
_ENV = {**os.environ, "PYTHONPATH": str(_ROOT)}
FORMS = ("jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet")
_LOOKS = 100
_LOOK_S = 0.05


class Page(State):
    """A row of text."""

    text: str


flow = Workflow("intake", state=Page, start="end")


@flow.role
async def end(row: Row[Page]) -> Outcome:
    """Never called: the benchmark has no worker."""
    return success()


def texts(rows: int, row_bytes: int) -> Iterator[tuple[int, str]]:
    """(number, text): random letters and spaces, hard to compress, so many bytes per JSON line."""
    draw = random.Random(0)
    pool = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz     ", k=1 << 20))
    length = max(1, row_bytes - 32)
    for n in range(rows):
        at = n * 7919 % ((1 << 20) - length)
        yield n, pool[at : at + length]


def write(path: Path, rows: int, row_bytes: int) -> None:
    """A dataset in the form that the path's suffix names."""
    form = path.name.partition(".")[2]
    if form == "parquet":
        _write_parquet(path, rows, row_bytes)
        return
    with open(path, "wb") as file:
        opened: Any = file
        if form.endswith(".zst"):
            opened = zstandard.ZstdCompressor(level=1).stream_writer(file, closefd=False)
        elif form.endswith(".gz"):
            import gzip

            opened = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1)
        if form == "csv":
            opened.write(b"id,text\n")
        for n, text in texts(rows, row_bytes):
            opened.write(b"r%d,%s\n" % (n, text.encode()) if form == "csv" else _json_line(n, text))
        if opened is not file:
            opened.close()


def _json_line(n: int, text: str) -> bytes:
    return json.dumps({"id": f"r{n}", "text": text}).encode() + b"\n"


def _write_parquet(path: Path, rows: int, row_bytes: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        batch: list[dict[str, str]] = []
        for n, text in texts(rows, row_bytes):
            batch.append({"id": f"r{n}", "text": text})
            if len(batch) == 50_000:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, schema))


def read_all(path: str, rows: int) -> dict[str, object]:
    """Reads a dataset in this process: rows per second, and resident memory early and late."""
    process = psutil.Process()
    every, seen, looks = max(1, rows // _LOOKS), 0, []
    started = time.perf_counter()
    for _ in read(path, flow.begin):
        seen += 1
        if seen % every == 0:
            looks.append(process.memory_info().rss / (1 << 20))
    seconds = time.perf_counter() - started
    early, late = max(looks[: len(looks) // 10 or 1]), max(looks[-(len(looks) // 10 or 1) :])
    return {
        "rows": seen,
        "rows_per_s": round(seen / seconds),
        "mib_per_s": round(os.stat(path).st_size / seconds / (1 << 20), 1),
        "rss_mib_early": round(early, 1),
        "rss_mib_late": round(late, 1),
        "rss_growth_mib": round(late - early, 1),
    }


def submit_all(url: str, path: Path, rows: int, shards: int) -> dict[str, Any]:
    """Submits a dataset with as many processes of the real command, and asks the broker for what has come."""
    command = [sys.executable, "-m", "matrix_bus", "submit", str(path), "-w", __file__, "--server", url, "--detach"]
    command += ["--run", "intake", f"io.queue_messages={10 * rows}"]
    logs = [path.with_name(f"submit-{i}.log") for i in range(1, shards + 1)]
    started = []  # kept, since one that is dropped is waited for by the interpreter
    for i, log in enumerate(logs, 1):
        with log.open("wb") as said:
            words = [*command, "--shard", f"{i}/{shards}"]
            started.append(subprocess.Popen(words, cwd=path.parent, env=_ENV, stderr=said))
    children = [psutil.Process(one.pid) for one in started]
    cpu_s = rss_mib = 0.0
    while alive := [child for child in children if child.status() != psutil.STATUS_ZOMBIE]:
        # Looked at, since what the system notes as the most ever held counts the process that it was forked from.
        rss_mib = max(rss_mib, *(child.memory_info().rss / (1 << 20) for child in alive))
        time.sleep(_LOOK_S)
    seconds = []
    for child, log in zip(children, logs, strict=True):
        _, status, used = os.wait4(child.pid, 0)
        if status or not (found := re.search(r"submitted in ([\d.]+) s", log.read_text())):
            raise SystemExit(f"a submitter ended with {status}: {log.read_text()[-2000:]}")
        seconds.append(float(found[1]))
        cpu_s += used.ru_utime + used.ru_stime
    return {"seconds": max(seconds), "cpu_s": cpu_s, "rss_mib": rss_mib, "total": asyncio.run(_total(url))}


async def _total(url: str) -> int | None:
    async with await Bus.connect(url) as bus:
        return (await registry.require(bus, "intake")).total


def _child(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "benchmarks.intake", *words], stdout=subprocess.PIPE)


def _answer(child: subprocess.Popen[bytes]) -> dict[str, Any]:
    out, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"a process of the benchmark ended with {child.returncode}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def measure(rows: int, row_bytes: int, submit_rows: int, shards: int, forms: list[str]) -> dict[str, object]:
    """Everything, one after the other."""
    reading: dict[str, object] = {}
    submitting: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="matrix-bus-intake-") as folder:
        for form in forms:
            path = Path(folder) / f"rows.{form}"
            write(path, rows, row_bytes)
            reading[form] = _answer(_child("--read", str(path), "--rows", str(rows)))
            print(form, reading[form], flush=True)
            path.unlink()
        if submit_rows:
            path = Path(folder) / "rows.jsonl"
            write(path, submit_rows, row_bytes)
            (Path(folder) / "broker").mkdir()
            with Broker(Path(folder) / "broker") as broker:
                server = psutil.Process(broker.pid)
                before = server.cpu_times()
                started = time.perf_counter()
                done = submit_all(broker.url, path, submit_rows, shards)
                with_start = time.perf_counter() - started
                used = server.cpu_times()
                submitting = {
                    "rows": submit_rows,
                    "submitters": shards,
                    "rows_per_s": round(submit_rows / done["seconds"]),
                    "rows_per_s_with_start": round(submit_rows / with_start),
                    "cpu_us_per_row": round(done["cpu_s"] / submit_rows * 1e6, 1),
                    "broker_cpu_us_per_row": round(
                        (used.user + used.system - before.user - before.system) / submit_rows * 1e6, 1
                    ),
                    "rss_mib": round(done["rss_mib"], 1),
                    "broker_rss_mib": round(server.memory_info().rss / (1 << 20)),
                    "sealed_total": done["total"],
                }
    return {
        "benchmark": "intake",
        "row_bytes": row_bytes,
        "reading": reading,
        "submitting": submitting,
        "machine": {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="intake", description="Datasets, read and submitted.")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--row-bytes", type=int, default=1024)
    parser.add_argument("--submit-rows", type=int, default=200_000, help="0: only read")
    parser.add_argument("--shards", type=int, default=1, help="submitting processes")
    parser.add_argument("--forms", default=",".join(FORMS), help="which to read; empty: none")
    parser.add_argument("--read", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(json.dumps(read_all(given.read, given.rows)), flush=True)
        return 0
    forms = [form for form in given.forms.split(",") if form]
    found = measure(given.rows, given.row_bytes, given.submit_rows, given.shards, forms)
    print(json.dumps(found), flush=True)
    return 0 if found["submitting"] == {} or found["submitting"]["sealed_total"] == given.submit_rows else 1  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
