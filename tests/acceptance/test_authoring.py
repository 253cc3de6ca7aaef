"""Writing a workflow, from nothing: new, its test, graph, run; and what is said where it does not work."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from matrix_bus.broker import Broker
from tests.acceptance.conftest import Shell


def test_what_new_writes_passes_its_test_and_can_be_drawn(shell: Shell) -> None:
    made = shell.run("new", "my-flow")
    assert made.returncode == 0, made.stderr
    assert {path.name for path in shell.directory.glob("*my_flow*")} == {
        "my_flow.py",
        "test_my_flow.py",
        "my_flow.jsonl",
    }
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_flow.py"],
        cwd=shell.directory,
        env=shell.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert tested.returncode == 0 and "2 passed" in tested.stdout, tested.stdout
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "mypy", "my_flow.py", "test_my_flow.py"],
        cwd=shell.directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    drawn = shell.run("graph", "my_flow.py")
    assert [re.sub(" +", " ", line).strip() for line in drawn.stdout.splitlines()] == [
        "my_flow: topic, text=…",
        "▶ writer llm default → judge",
        "judge llm default → writer, success, filtered: rejected",
    ]
    again = shell.run("new", "my_flow")
    assert again.returncode == 2
    assert "my_flow.py exists already" in again.stderr


@pytest.mark.model
@pytest.mark.timeout(240)
def test_what_new_writes_runs_on_the_real_model(shell: Shell, broker: Broker, model_url: str) -> None:
    assert shell.run("new", "draft", "--dir", "flows").returncode == 0
    words = ["--workflow", "flows/draft.py", "--server", broker.url, f"llm.urls={model_url}"]
    done = shell.run("run", "flows/draft.jsonl", *words, timeout_s=200)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in (shell.directory / "out.jsonl").read_text().splitlines()]
    assert sorted(o["id"] for o in outcomes) == ["bees", "rain", "sea"]
    assert all(o["outcome"] in ("success", "filtered") and o["state"]["text"] for o in outcomes)


@pytest.mark.parametrize(
    ("name", "said"),
    [("1st", "cannot be the name"), ("class", "cannot be the name"), ("json", "a module already"), ("a.b", "a.b")],
)
def test_a_name_that_new_refuses(shell: Shell, name: str, said: str) -> None:
    done = shell.run("new", name)
    assert done.returncode == 2
    assert said in done.stderr
    assert not list(shell.directory.glob("*.jsonl"))


ODD = """
import matrix_bus as mb


class Draft(mb.State):
    topic: str


class Pool: ...


flow = mb.Workflow("odd", state=Draft, start="a")


@flow.resource
def pool() -> Pool:
    return Pool()


@flow.role(model="big")
async def a(row: mb.Row[Draft], llm: mb.LLM, pool: Pool) -> mb.Next:
    return mb.to(row.state.topic)


@flow.role(process=True)
def end(row: mb.Row[Draft]) -> mb.Outcome:
    return mb.filtered('a "b" <c>')
"""


def test_graph_in_all_forms(shell: Shell) -> None:
    (shell.directory / "odd.py").write_text(ODD)
    text = shell.run("graph", "odd.py").stdout
    assert "llm big, pool  → ?" in text
    assert "in a process" in text
    assert "@flow.role(routes=[…])" in text
    mermaid = shell.run("graph", "odd.py", "--format", "mermaid").stdout
    assert mermaid.startswith("flowchart LR\n")
    assert 'end_0(["filtered: a #quot;b#quot; #lt;c>"])' in mermaid
    assert "role_a --> end_computed" in mermaid
    dot = shell.run("graph", "odd.py", "-f", "dot").stdout
    assert '"role_a" -> "end_computed"' in dot
    assert r'label="filtered: a \"b\" <c>"' in dot
    assert shell.run("graph", "coral").returncode == 0
    assert shell.run("graph", "coral", "-f", "png").returncode == 2


def test_a_mistake_in_a_workflow_shows_the_users_own_lines_only(shell: Shell) -> None:
    (shell.directory / "prompts.py").write_text("def load():\n    return {}['system']\n")
    (shell.directory / "bad.py").write_text("from prompts import load\n\nTEXT = load()\n")
    (shell.directory / "typo.py").write_text("import matrix_bus as mb\nflow = mb.Workflow('x' state=1)\n")
    (shell.directory / "lost.py").write_text(ODD.replace("row.state.topic", '"ned"'))
    shell.dataset(1)
    for words in ("graph", "submit data.jsonl -w", "worker -w", "config -w", "run data.jsonl -w"):
        done = shell.run(*words.split(), "bad.py")
        assert done.returncode == 2
        said = done.stderr.splitlines()
        assert said[0] == "error: bad.py cannot be loaded: KeyError: 'system'"
        assert [line.strip() for line in said if "File " in line] == [
            f'File "{shell.directory / "bad.py"}", line 3, in <module>',
            f'File "{shell.directory / "prompts.py"}", line 2, in load',
        ]
        assert said[-1] == "KeyError: 'system'"
    typo = shell.run("graph", "typo.py").stderr
    assert "SyntaxError" in typo and 'typo.py", line 2' in typo and "matrix_bus/" not in typo
    lost = shell.run("graph", "lost.py")
    assert lost.returncode == 2
    assert lost.stderr == "error: role 'a' sends rows to 'ned', the roles are a, end; did you mean 'end'?\n"
    assert "did you mean 'coral'" in shell.run("graph", "corel").stderr
    assert "did you mean bad.py" in shell.run("graph", "bat.py").stderr


def test_the_version(shell: Shell) -> None:
    done = shell.run("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"matrix-bus \d+\.\d+\.\d+\n", done.stdout)
