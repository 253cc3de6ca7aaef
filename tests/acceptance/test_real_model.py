"""The main job and a real dataset, with the embedded model: nothing between the row and the answer is pretended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from matrix_bus import registry
from matrix_bus.broker import Broker
from matrix_bus.bus import Bus
from matrix_bus.llm.history import full_messages
from tests.helpers import until_sync

ROOT = Path(__file__).parents[2]
QUESTIONS = ROOT / "agents" / "matrix_agents" / "coral" / "questions.jsonl"
MMLU_PRO = ROOT.parent / "shared" / "data" / "mmlu_pro_test.jsonl.zst"
SHORT = ["workflow.max_turns=2", "llm.max_tokens=16"]

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "matrix_bus", *words]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with a state directory of its own; what was started in it is stopped."""
    environment = {**os.environ, "MATRIX_BUS_HOME": str(tmp_path / "home"), "MATRIX_BUS_SERVER": ""}
    yield environment
    for service in ("broker", "serve"):
        subprocess.run(command(service, "stop"), env=environment, check=True, capture_output=True, timeout=60)


def test_one_command_takes_questions_to_outcomes(tmp_path: Path, home: dict[str, str]) -> None:
    lines = QUESTIONS.read_text().splitlines()[:4]
    (tmp_path / "four.jsonl").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        command("run", "four.jsonl", *SHORT),
        check=False,
        cwd=tmp_path,
        env=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(row["row"] for row in rows) == [0, 1, 2, 3]
    assert {json.dumps(row["input"]) for row in rows} == {json.dumps(json.loads(line)) for line in lines}
    for row in rows:
        assert row["outcome"] in ("success", "filtered")
        assert row["hops"] == 6
        assert [call["role"] for call in row["history"]] == ["solver", "extractor", "reviewer", "extractor"]
        assert all(call["usage"]["completion_tokens"] >= 1 for call in row["history"])
        assert all(call["sampling"]["seed"] >= 0 for call in row["history"])
        encoded = [json.dumps(call).encode() for call in row["history"]]
        assert full_messages(encoded, 2)[0].role == "system"
        assert row["usage"]["calls"] == 4
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["rows"] == 4
    assert len(manifest["model"]["sha256"]) == 64
    assert "tokens/s" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_killed_comes_back_and_costs_no_row(tmp_path: Path, home: dict[str, str]) -> None:
    (tmp_path / "three.jsonl").write_text("\n".join(QUESTIONS.read_text().splitlines()[:3]) + "\n")
    info = Path(home["MATRIX_BUS_HOME"]) / "model.json"
    running = subprocess.Popen(
        command("run", "three.jsonl", *SHORT, "--log-level", "info"),
        cwd=tmp_path,
        env=home,
        stderr=subprocess.PIPE,
        text=True,
    )
    stderr = running.stderr
    assert stderr is not None
    until_sync(lambda: "rows submitted in" in stderr.readline(), "the run to start", 120)
    pid = int(json.loads(info.read_text())["pid"])
    os.kill(pid, signal.SIGKILL)
    _, said = running.communicate(timeout=200)
    assert running.returncode == 0, said
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["outcome"] for row in rows} <= {"success", "filtered"}
    assert len(rows) == 3
    assert json.loads(info.read_text())["pid"] != pid


@pytest.mark.skipif(not MMLU_PRO.exists(), reason="the MMLU-Pro test set is not beside the checkout")
async def test_all_of_mmlu_pro_is_admitted_bit_by_bit_and_a_few_dozen_are_answered(
    tmp_path: Path, broker: Broker, model_url: str
) -> None:
    in_flight = 8
    overrides = [*SHORT, f"max_in_flight={in_flight}", f"llm.urls={model_url}"]
    submit = command("submit", str(MMLU_PRO), *overrides, "--detach", "--run", "mmlu", "--server", broker.url)
    subprocess.run(submit, cwd=tmp_path, check=True, timeout=60)
    worker = subprocess.Popen(command("worker", "--server", broker.url), start_new_session=True)
    try:
        async with await Bus.connect(broker.url) as bus:
            record = await registry.require(bus, "mmlu")
            assert record.total == 12_032
            while (progress := await registry.progress(bus, record)).outcomes < 24:
                assert progress.in_flight <= in_flight
                assert worker.poll() is None
                await asyncio.sleep(0.5)  # looking without a pause would take a core from the model
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    collect = command("collect", "mmlu", "-o", "some.jsonl", "--server", broker.url)
    subprocess.run(collect, cwd=tmp_path, check=True, timeout=60)
    rows = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["row"] for row in rows}) >= 24
    assert {row["outcome"] for row in rows} <= {"success", "filtered"}
    until_sync(lambda: worker.poll() is not None, "the worker has ended")
