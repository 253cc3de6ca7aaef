"""The programs on the page about embedding, each run as it stands there, against a real broker and worker."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import matrix_bus as mb
from matrix_bus.broker import Broker
from tests.acceptance.conftest import Shell
from tests.helpers import until_sync

PAGE = Path(__file__).parents[2] / "docs" / "embedding.md"

DRAFT = """
import msgspec
import matrix_bus as mb


class Draft(mb.State):
    topic: str
    text: str = ""


class Params(msgspec.Struct):
    max_turns: int = 3


flow = mb.Workflow("draft", state=Draft, start="writer", config=Params)


@flow.role
async def writer(row: mb.Row[Draft], params: Params) -> mb.Outcome:
    row.state.text = row.state.topic.upper()
    return mb.success(f"in {params.max_turns}")
"""


def test_the_programs_of_the_page(shell: Shell, broker: Broker) -> None:
    (shell.directory / "draft.py").write_text(DRAFT)
    shell.start("worker", "-w", "draft.py", "--server", broker.url)
    with mb.connect_blocking(broker.url) as bus:
        until_sync(bus.workflows, "the worker to announce its workflow")
    programs = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    said = []
    for number, program in enumerate(programs):
        path = shell.directory / f"program_{number}.py"
        path.write_text(program)
        done = subprocess.run(
            [sys.executable, "-W", "error", str(path)],
            env={**shell.environment, "MATRIX_BUS_SERVER": broker.url},
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), f"{program}\n{done.stderr}"
        said.append(done.stdout.splitlines())
    first, second, third, fourth = said
    assert sorted(first) == sorted(f"topic-{n} success in 4" for n in range(100))
    assert second == ["['draft'] ['nightly']", "100 of 100, 0 in flight, active", "100"]
    assert "missing required field" in third[0] or "topic" in third[0]
    assert "did you mean 'draft'?" in third[1] and "did you mean 'max_turns'?" in third[2]
    assert sorted(fourth) == ["0 success", "1 success"]
