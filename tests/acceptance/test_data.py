"""Data in and out as a user moves it: files of every form and of every kind of damage, shared work, full disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from matrix_bus.broker import Broker
from tests.acceptance.conftest import Shell
from tests.helpers import until_sync


def outcomes(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_of_parquet_becomes_training_data(shell: Shell, broker: Broker) -> None:
    pages = shell.directory / "pages"
    pages.mkdir()
    for part in range(3):
        rows = [{"name": {"page": f"p{part}-{n}"}, "number": part * 20 + n, "noise": "…" * 50} for n in range(20)]
        pq.write_table(pa.Table.from_pylist(rows), pages / f"part-{part}.parquet")
    server = ("--server", broker.url)
    worker = shell.start("worker", "-w", "walk.py", *server)
    done = shell.run(
        *("submit", "pages", "-w", "walk.py", *server, "-o", "out.parquet", "--success-only", "--ordered"),
        *("--fields", "id,x=state.x,path=state.path,input"),
        *("input.rename.id=name.page", "input.rename.x=number", "input.fields=[id]", "input.skip=10", "input.limit=40"),
    )
    assert done.returncode == 0, done.stderr
    found = pq.read_table(shell.directory / "out.parquet").to_pylist()
    assert [row["x"] for row in found] == list(range(10, 50))
    assert [row["id"] for row in found] == [f"p{n // 20}-{n % 20}" for n in range(10, 50)]
    assert json.loads(found[0]["path"]) == [str(hop) for hop in range(1, 9)]
    assert json.loads(found[0]["input"]) == {"id": "p0-10", "x": 10}
    manifest = json.loads((shell.directory / "out.manifest.json").read_text())
    assert manifest["rows"] == 40
    assert manifest["run"]["config"]["input"]["limit"] == 40
    worker.signal(signal.SIGTERM)
    assert worker.ends() == 0


def test_csv_whose_cells_are_numbers(shell: Shell, broker: Broker) -> None:
    (shell.directory / "data.csv").write_text('id,x,path\na,1,"[]"\nb,two,\nc,3,"[""seen""]"\n')
    server = ("--server", broker.url)
    shell.start("worker", "-w", "walk.py", *server)
    done = shell.run("submit", "data.csv", "-w", "walk.py", *server, "--ordered", "--fields", "id,state.path")
    assert done.returncode == 0, done.stderr
    assert [(row["id"], row["path"][0]) for row in outcomes(shell.directory / "out.jsonl")] == [
        ("a", "1"),
        ("c", "seen"),
    ]
    (rejected,) = outcomes(shell.directory / "out.jsonl.rejected.jsonl")
    assert rejected["line"] == 3
    assert "x" in rejected["reason"]


def test_submitters_and_collectors_share_one_run(shell: Shell, broker: Broker) -> None:
    shell.dataset(300)
    server = ("--server", broker.url)
    shell.start("worker", "-w", "walk.py", *server)
    submit = ("submit", "data.jsonl", "-w", "walk.py", *server, "--run", "r", "--detach")
    first = shell.start(*submit, "--shard", "1/3", "trials=2")
    third = shell.start(*submit, "--shard", "3/3", "trials=2")
    assert (first.ends(), third.ends()) == (0, 0), first.said + third.said
    assert "100 rows" not in first.said
    assert "200 rows of shard 1/3 submitted" in first.said
    again = shell.run(*submit, "--shard", "1/3", "trials=2")
    assert "shard 1/3 of run r is submitted already" in again.stderr
    other = shell.run(*submit, "--shard", "2/4", "trials=2")
    assert other.returncode == 2
    assert "shards: was 3, now 4" in other.stderr
    assert "not sealed" in shell.run("collect", "r", *server, "-o", "early.jsonl").stderr
    assert shell.run(*submit, "--shard", "2/3", "trials=2").returncode == 0
    collect = ("collect", "r", *server, "--follow", "-o", "out.jsonl.zst", "--part-mb", "1")
    collectors = [shell.start(*collect, "--shard", f"{n}/2") for n in (1, 2)]
    assert [collector.ends() for collector in collectors] == [0, 0], collectors[0].said + collectors[1].said
    found = []
    for part in (shell.directory / "out.jsonl.zst").glob("part-*"):
        body = zstandard.ZstdDecompressor().stream_reader(part.read_bytes()).read()
        found += [json.loads(line)["row"] for line in body.splitlines()]
    assert sorted(found) == list(range(600))
    counts = [json.loads((shell.directory / f"out.{n}of2.manifest.json").read_text())["rows"] for n in (1, 2)]
    assert sum(counts) == 600


def test_a_shard_whose_submitter_was_killed_is_submitted_again(shell: Shell, broker: Broker) -> None:
    shell.dataset(20_000)
    server = ("--server", broker.url)
    submit = ("submit", "data.jsonl", "-w", "walk.py", *server, "--run", "r", "--detach", "--shard")
    half = shell.start(*submit, "2/2")

    half.says("rows submitted")
    half.kill()
    for shard in ("1/2", "2/2"):
        done = shell.run(*submit, shard)
        assert done.returncode == 0, done.stderr
    assert "20000" in shell.run("status", "r", *server).stdout


def test_outcomes_are_written_while_rows_still_come(shell: Shell, broker: Broker) -> None:
    os.mkfifo(shell.directory / "pipe")
    server = ("--server", broker.url)
    shell.start("worker", "-w", "walk.py", *server)
    submitting = shell.start("submit", "pipe", "-w", "walk.py", *server)
    output = shell.directory / "out.jsonl"
    with open(shell.directory / "pipe", "w") as pipe:
        for x in range(3):
            pipe.write(json.dumps({"x": x}) + "\n")
            pipe.flush()
            until_sync(lambda: output.exists() and len(outcomes(output)) == x + 1, f"the outcome of row {x}")  # noqa: B023
    assert submitting.ends() == 0
    assert "3 rows submitted" in submitting.said


def test_bad_rows_of_every_kind_are_rejected_with_their_place_and_a_page_of_50_mb_is_none(
    shell: Shell, broker: Broker
) -> None:
    server = ("--server", broker.url)
    big = "page " * 10_000_000
    lines = [
        b'{"x":0}',
        b'{"x":null}',
        b'{"x":1,"page":null}',
        b'{"x":2,"page":"\xff\xfe"}',
        b'{"x":3,"page":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"x":4,"page":"\\ud800"}',
        b'{"x":' + b"9" * 5000 + b"}",
        json.dumps({"x": 7, "page": big}).encode(),
        b'{"x":8',
        b'{"x":9}',
    ]
    (shell.directory / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    shell.start("worker", "-w", "walk.py", *server)
    done = shell.run("submit", "data.jsonl", "-w", "walk.py", *server, timeout_s=55)
    assert done.returncode == 0, done.stderr
    found = {row["line"]: row for row in outcomes(shell.directory / "out.jsonl")}
    assert {line: row["outcome"] for line, row in found.items()} == {0: "success", 7: "success", 9: "success"}
    assert found[7]["state"]["page"] == big[::-1]
    rejected = outcomes(shell.directory / "out.jsonl.rejected.jsonl")
    assert [line["line"] for line in rejected] == [2, 3, 4, 5, 6, 7, 9]
    assert all(line["reason"] and len(line["text"]) <= 200 for line in rejected)


@pytest.mark.parametrize("name", ["data.jsonl.zst", "data.parquet"])
def test_a_file_that_is_cut_off_is_said_and_what_was_read_goes_on(shell: Shell, broker: Broker, name: str) -> None:
    server = ("--server", broker.url)
    path = shell.directory / name
    rows = [{"x": x, "page": os.urandom(300).hex()} for x in range(3000)]
    if name.endswith(".zst"):
        path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    shell.start("worker", "-w", "walk.py", *server, SECONDS="0")
    submit = ("submit", name, "-w", "walk.py", *server, "--run", "r")
    cut = shell.run(*submit)
    assert cut.returncode == 2
    assert f"cannot read {name}" in cut.stderr
    assert "Traceback" not in cut.stderr
    path.write_bytes(whole)
    done = shell.run(*submit, timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert sorted(row["row"] for row in outcomes(shell.directory / "out.jsonl")) == list(range(3000))


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_an_output_that_does_not_fit_is_said_and_nothing_is_lost(shell: Shell, broker: Broker, name: str) -> None:
    server = ("--server", broker.url)
    shell.dataset(200, page=lambda x: os.urandom(500).hex())
    shell.start("worker", "-w", "walk.py", *server, SECONDS="0")
    words = ("submit", "data.jsonl", "-w", "walk.py", *server, "--run", "r", "-o", name)

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    full = subprocess.run(
        [sys.executable, "-m", "matrix_bus", *words],
        cwd=shell.directory,
        env=shell.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=small_disk,
    )
    assert full.returncode == 2, full.stderr
    assert "cannot write" in full.stderr
    assert "goes on without this terminal" in full.stderr
    assert "Traceback" not in full.stderr
    assert shell.run("collect", "r", *server, "-o", name, "--follow").returncode == 0
    found = (
        pq.read_table(shell.directory / name)["row"].to_pylist()
        if name.endswith("parquet")
        else [row["row"] for row in outcomes(shell.directory / name)]
    )
    assert sorted(found) == list(range(200))


def test_a_form_that_there_is_not_is_said_before_anything_is_submitted(shell: Shell, broker: Broker) -> None:
    shell.dataset(2)
    server = ("--server", broker.url)
    for words, expected in (
        (("-o", "out.xlsx", "--success-only"), "names no form of output"),
        (("-o", "out.jsonl", "--fields", "a.x,b.x"), "two fields are named 'x'"),
        (("--shard", "3/2", "--run", "r"), "names no shard"),
        (("--shard", "1/2"), "--run"),
        (("input.limit=0",), "input.limit"),
        (("input.shufle=5",), "did you mean 'shuffle'"),
    ):
        done = shell.run("submit", "data.jsonl", "-w", "walk.py", *server, *words)
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr
    assert shell.run("runs", *server).stdout.strip().count("\n") <= 1
