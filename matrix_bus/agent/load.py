"""Finding workflows: by installed name, by file, by module and attribute."""

from __future__ import annotations

import difflib
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
    """A workflow by name (an entry point), by file (`my_flow.py`, `flows.py:draft`) or as `module:attribute`.

    What the file's folder, or for a module the current one, holds can be imported by it. Raises `WorkflowError`; an
    exception of the workflow's own code is its cause.
    """
    path, attribute = _as_file(spec)
    if path is not None:
        module = _import_file(path)
        found = _workflow_in(module, attribute, str(path))
        found.spec = str(path.resolve()) + (f":{attribute}" if attribute else "")
    else:
        if ":" in spec:
            _make_importable(Path())
        name, _, attribute = (spec if ":" in spec else _entry_point(spec)).partition(":")
        module = _import(name, spec)
        found = _workflow_in(module, attribute, name)
        found.spec = spec
    found.code_hash = found.code_hash or _code_hash(module)  # of the code that runs, not of an edit since
    found.check()
    return found


def _as_file(spec: str) -> tuple[Path | None, str]:
    """(the file, the name in it) if the spec names a file."""
    if spec.endswith(".py"):
        return Path(spec), ""
    before, _, attribute = spec.rpartition(":")
    return (Path(before), attribute) if before.endswith(".py") else (None, "")


def _entry_point(name: str) -> str:
    points = {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if name in points:
        return points[name]
    if Path(f"{name}.py").is_file():
        advice = f"a file is given with its ending: {name}.py"
    elif near := difflib.get_close_matches(name, points, n=1):
        advice = f"did you mean {near[0]!r}?"
    else:
        advice = f"installed are {', '.join(sorted(points)) or 'none'}; a file is given with its .py ending"
    raise WorkflowError(f"no workflow named {name!r}: {advice}")


def _workflow_in(module: Any, attribute: str, where: str) -> Workflow[Any]:
    """The workflow of that name, or without a name the only one. Raises `WorkflowError`."""
    there = {name: value for name, value in vars(module).items() if isinstance(value, Workflow)}
    if attribute:
        if attribute not in there:
            raise WorkflowError(f"{where}:{attribute} is not a Workflow; {where} has {', '.join(there) or 'none'}")
        return there[attribute]
    if len({id(value) for value in there.values()}) != 1:
        raise WorkflowError(
            f"{where} must define one Workflow, it defines {len(there)}"
            + (f": choose with {where}:{next(iter(there))}" if there else "")
        )
    return next(iter(there.values()))


def _import(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise WorkflowError(f"workflow {spec!r} cannot be imported: {_said(error)}") from error


def _import_file(path: Path) -> Any:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], n=1)
        raise WorkflowError(f"no such workflow file: {path}" + (f"; did you mean {near[0]}?" if near else ""))
    name = f"matrix_bus_workflow_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module  # handlers' annotations and pickling look it up
    _make_importable(path.parent)
    try:
        loader.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise WorkflowError(f"{path} cannot be loaded: {_said(error)}") from error
    return module


def _make_importable(folder: Path) -> None:
    """As for a script, but after everything installed: a file of the user's must not hide a module that we need."""
    place = str(folder.resolve())
    if place not in sys.path:
        sys.path.append(place)


def _said(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "it exits when imported; what only a script does belongs under if __name__ == '__main__'"
    return f"{type(error).__name__}: {error}"


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
