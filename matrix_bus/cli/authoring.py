"""Commands for who writes a workflow: new, graph."""

from __future__ import annotations

import enum
import keyword
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..agent import draw, load_workflow
from ..errors import UsageError
from . import app
from .common import say

_TEMPLATES = Path(__file__).parent.parent / "templates"


class Form(enum.StrEnum):
    """How to draw."""

    text = "text"
    mermaid = "mermaid"
    dot = "dot"


@app.command()
def graph(
    workflow: Annotated[str, typer.Argument(metavar="WORKFLOW", help="my_flow.py, an installed name, or module:attr.")],
    form: Annotated[Form, typer.Option("--format", "-f", help="mermaid and dot are sources of pictures.")] = Form.text,
) -> None:
    """Draw a workflow: its roles, what they ask for, and where rows go from each, as its source says."""
    print(draw(load_workflow(workflow), form.value))


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the workflow, and of its files.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where to write them.")] = Path(),
) -> None:
    """Write a small workflow to start from: NAME.py, a test of it, and three rows of data."""
    module = name.replace("-", "_")
    if not module.isidentifier() or not module.isascii() or keyword.iskeyword(module) or len(module) > 60:
        raise UsageError(f"{name!r} cannot be the name of a Python module: take letters, digits and _, such as my_flow")
    if module in sys.stdlib_module_names or module == "matrix_bus":
        raise UsageError(f"{name!r} is a module already, which {module}.py would hide: take another name")
    state = "".join(part.capitalize() for part in module.split("_")) or "Draft"
    files = {
        folder / target: (_TEMPLATES / source).read_text().replace("__NAME__", module).replace("__STATE__", state)
        for source, target in (
            ("workflow.py.txt", f"{module}.py"),
            ("test.py.txt", f"test_{module}.py"),
            ("rows.jsonl", f"{module}.jsonl"),
        )
    }
    for path in files:
        if path.exists():
            raise UsageError(f"{path} exists already: take another name, or --dir for another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to: {error.strerror}") from None
    source, test, rows = files
    say(
        f"wrote {source}, {test} and {rows}. Now try\n\n"
        f"  matrix-bus run {rows} --workflow {source}\n"
        f"  matrix-bus graph {source}\n"
        f"  python -m pytest {test}"
    )
