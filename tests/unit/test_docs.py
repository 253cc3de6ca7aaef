"""The code in the pages about workflows is run as it stands there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from matrix_bus.agent import draw, load_workflow

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["docs/workflows.md", "docs/large-values.md", "README.md"])
def test_the_code_of_a_page_works(page: str, tmp_path: Path) -> None:
    path = tmp_path / f"{Path(page).stem.replace('-', '_').lower()}_page.py"
    code = [block for block in blocks(page, "python") if "connect(" not in block]  # those need a broker
    path.write_text("\n\n".join(code))
    runpy.run_path(str(path))
    path.with_name("flow.py").write_text(code[0])
    flow = load_workflow(str(path.with_name("flow.py")))
    drawn = [block for block in blocks(page, "") if block.startswith(f"{flow.name}: ")]
    assert drawn in ([], [draw(flow, "text") + "\n"])


def test_the_pages_are_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
