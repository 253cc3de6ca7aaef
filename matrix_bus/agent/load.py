"""Finding workflows: by installed name, by file, by module and attribute."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..errors import WorkflowError
from .workflow import Workflow

ENTRY_POINTS = "matrix_bus.workflows"


def installed_workflows() -> list[str]:
    """Names of the workflows that installed packages offer."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)})


def load_workflow(spec: str) -> Workflow[Any]:
    """A workflow by name (an entry point), by file (`my_flow.py`) or as `module:attribute`.

    Raises `WorkflowError`; an exception of the workflow's own code comes through as its cause.
    """
    if spec.endswith(".py"):
        module = _import_file(Path(spec))
        found = [value for value in vars(module).values() if isinstance(value, Workflow)]
        if len(found) != 1:
            raise WorkflowError(f"{spec} must define one Workflow, it defines {len(found)}")
        flow = found[0]
    else:
        target = spec
        if ":" not in spec:
            points = {p.name: p.value for p in importlib.metadata.entry_points(group=ENTRY_POINTS)}
            if spec not in points:
                raise WorkflowError(
                    f"no workflow named {spec!r}: installed are {', '.join(sorted(points)) or 'none'}; "
                    "a file is given with its .py ending"
                )
            target = points[spec]
        name, _, attribute = target.partition(":")
        module = _import(name, spec)
        there = getattr(module, attribute, None)
        if not isinstance(there, Workflow):
            raise WorkflowError(f"{target} is not a Workflow")
        flow = there
    flow.spec = str(Path(spec).resolve()) if spec.endswith(".py") else spec
    flow.code_hash = flow.code_hash or _code_hash(module)  # of the code that runs, not of an edit since
    flow.check()
    return flow


def _import(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise WorkflowError(f"workflow {spec!r} cannot be imported: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise WorkflowError(f"no such workflow file: {path}")
    name = f"matrix_bus_workflow_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module  # handlers' annotations and pickling look it up
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise WorkflowError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _code_hash(module: Any) -> str:
    """Over the module's file, or all files of the package that it is."""
    file = Path(module.__file__)
    files = sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]
    digest = hashlib.sha256()
    for source in files:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def identify(flow: Workflow[Any]) -> None:
    """Gives a workflow that was imported, not loaded, the code hash that `load_workflow` would give it.

    Raises `WorkflowError` where its code has no file, as in a notebook.
    """
    if flow.code_hash:
        return
    flow.check()
    if flow.name in installed_workflows() and load_workflow(flow.name) is flow:
        return
    module = sys.modules.get(flow.roles[flow.start].handler.__module__)
    if getattr(module, "__file__", None) is None:
        raise WorkflowError(
            f"workflow {flow.name!r} was not written in a file: put it into one that the workers load too"
        )
    flow.code_hash = _code_hash(module)
