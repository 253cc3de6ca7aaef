"""Web pages through natural reasoning: all of them with a simulated model, some with the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from matrix_bus.broker import Broker
from tests import pages

ROOT = Path(__file__).parents[2]
COUNT = int(os.environ.get("MATRIX_BUS_PAGES", "6"))
"""Pages for the real model: a few seconds each on two cores."""

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not pages.WEB_PAGES.exists(), reason="the web pages are not beside the checkout"),
]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "matrix_bus", *words]


def test_all_pages_end_as_in_table_2(tmp_path: Path, broker: Broker) -> None:
    with open(tmp_path / "pages.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in pages.lines())
    simulator = [sys.executable, "-m", "matrix_serving.simulator", "--profile", "instant", "--model", "m"]
    simulator += ["--responder", "script:tests.pages:say"]
    server = ("--server", broker.url)
    with subprocess.Popen(simulator, cwd=ROOT, stdout=subprocess.PIPE, text=True) as model:
        assert model.stdout is not None
        url = model.stdout.readline().strip()
        worker = subprocess.Popen(command("worker", "-w", "natural_reasoning", *server), start_new_session=True)
        try:
            words = ("submit", "pages.jsonl", "-w", "natural_reasoning", *server, f"llm.urls={url}", "llm.model=m")
            form = ("-o", "lessons.parquet", "--success-only", "--messages")
            done = subprocess.run(
                command(*words, *form), cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, done.stderr
        finally:
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(30) == 0
            model.terminate()
    manifest = json.loads((tmp_path / "lessons.manifest.json").read_text())
    expected = Counter(pages.fates()[pages.key(page["text"])] for page in pages.pages())
    assert (expected.total(), expected["filter_by_classifier"], expected["success"]) == (1863, 1680, 102)
    found = {reason.removeprefix("filtered: "): count for reason, count in manifest["reasons"].items()}
    assert found == expected
    import pyarrow.parquet as pq

    lessons = pq.read_table(tmp_path / "lessons.parquet").to_pylist()
    assert len(lessons) == expected["success"]
    assert all([m["role"] for m in lesson["messages"]] == ["user", "assistant"] for lesson in lessons)
    # one call for what is English, one more for what passes, two for a question and its answer
    calls = 1863 - expected["filter_by_en"]
    calls += calls - expected["filter_by_classifier"]
    calls += 2 * (expected["success"] + expected["filter_by_no_boxed_answer"])
    assert sum(usage["calls"] for usage in manifest["usage_by_role"].values()) == calls
    assert not [error for endpoint in manifest["endpoints"].values() for error in endpoint.get("errors", {})]


@pytest.mark.model
def test_small_pages_and_the_real_model(tmp_path: Path, broker: Broker, model_url: str) -> None:
    small = [page for page in pages.pages() if len(page["text"].encode()) <= 4096][:COUNT]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in small))
    server = ("--server", broker.url)
    worker = subprocess.Popen(command("worker", "-w", "natural_reasoning", *server), start_new_session=True)
    try:
        words = ("submit", "pages.jsonl", "-w", "natural_reasoning", *server, f"llm.urls={model_url}")
        limits = ("workflow.max_page_chars=1500", "roles.score.max_tokens=192", "roles.question.max_tokens=192")
        done = subprocess.run(
            command(*words, *limits, "max_in_flight=4", "limits.failed_window=0"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == len(small)
    assert {row["outcome"] for row in rows} <= {"success", "filtered"}, done.stderr
    for row in rows:
        assert row["state"]["nr_english"] is not None
        assert bool(row["history"]) == (row["reason"] != "filter_by_en")
        assert 0 <= row["state"]["nr_kept_chars"] <= 1500
    print(done.stderr)
