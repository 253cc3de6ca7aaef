"""House rules, read from the source: which module may import which, and how long a file may get."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import matrix_bus

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "matrix_bus"
AGENTS = ROOT / "agents" / "matrix_agents"
SERVING = ROOT / "serving" / "matrix_serving"
MOST_LINES = 400

LAYERS = (
    ("errors",),
    ("config", "telemetry", "metrics", "service"),
    ("orchestrator",),
    ("bus", "llm", "dataset", "broker"),
    ("agent", "payload"),
    ("catalog", "endpoints", "quota", "answers"),
    ("registry", "compose"),
    ("worker", "run", "control"),
    ("client",),
    ("cli",),
    ("__main__",),
)
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names}

SOURCES = sorted(path for folder in (PACKAGE, AGENTS, SERVING) for path in folder.rglob("*.py"))


class Import:
    """One imported module, absolute, with the name taken from it if there is one."""

    def __init__(self, module: str, name: str, lazy: bool, line: int) -> None:
        self.module = module
        self.name = name
        self.lazy = lazy
        """Made inside a function: it happens when that is called."""
        self.line = line

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def room(self) -> str:
        """The module or room of matrix_bus that is meant; empty for the package itself."""
        parts = self.module.split(".")
        if len(parts) > 1:
            return parts[1]
        return self.name if self.name in LAYER_OF else ""


def imports(tree: ast.AST, package: str, lazy: bool = False) -> Iterator[Import]:
    """The imports that run, so none under `if TYPE_CHECKING`. `package` is what a single dot means."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", lazy, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                yield Import(module, alias.name, lazy, node.lineno)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(other, package, lazy)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, package, lazy or inside)


def upward(source: str, room: str, package: str) -> list[str]:
    """What a file of `room` imports and must not."""
    found = []
    for made in imports(ast.parse(source), package):
        if made.top != "matrix_bus" or made.room == room:
            continue
        if not made.room:
            found.append(f"line {made.line}: {room} imports the package itself")
        elif made.room not in LAYER_OF:
            found.append(f"line {made.line}: {made.room} has no layer")
        elif LAYER_OF[made.room] >= LAYER_OF[room]:
            found.append(f"line {made.line}: {room} imports {made.room}, which is not below it")
    return found


def private(source: str) -> list[str]:
    """What a file of matrix_agents uses of matrix_bus that is not public."""
    tree = ast.parse(source)
    public = set(matrix_bus.__all__)
    found = []
    for made in imports(tree, "matrix_agents"):
        if made.top != "matrix_bus":
            continue
        if made.module != "matrix_bus":
            found.append(f"line {made.line}: {made.module} is private")
        elif made.name and made.name not in public:
            found.append(f"line {made.line}: {made.name} is not public")
    bound = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "matrix_bus"
    }
    found += [
        f"line {node.lineno}: {node.attr} is not public"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in bound
        and node.attr not in public
    ]
    return found


def place(path: Path) -> tuple[str, str]:
    """(room, package) of a file of matrix_bus."""
    parts = path.relative_to(PACKAGE).parts
    room = parts[0] if len(parts) > 1 else path.stem
    return room, ".".join(["matrix_bus", *parts[:-1]])


def test_every_module_has_a_layer() -> None:
    rooms = {place(path)[0] for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms <= LAYER_OF.keys()
    assert {"errors", "orchestrator", "bus", "worker", "run", "cli"} <= rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    room, package = place(path)
    source = path.read_text()
    if path == PACKAGE / "__init__.py":
        made = [i.module for i in imports(ast.parse(source), package) if i.top == "matrix_bus"]
        assert made == [], "the package's names load on first use"
    else:
        assert upward(source, room, package) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("errors", "from .config import Sampling"),
        ("orchestrator", "from .bus import Bus"),
        ("bus", "from ..llm import LLM"),
        ("bus", "from ..agent import Row"),
        ("agent", "from . import registry"),
        ("run", "from .worker import Worker"),
        ("worker", "from ..run import submit"),
        ("worker", "def late():\n    from .. import run"),
        ("run", "import matrix_bus.worker.session"),
        ("registry", "if x:\n    from .cli.common import go"),
        ("agent", "from matrix_bus import Sampling"),
        ("cli", "from ..somewhere import x"),
    ],
)
def test_an_import_that_does_not_point_downward_is_seen(room: str, source: str) -> None:
    package = "matrix_bus." + room if room in ("bus", "llm", "worker", "cli") else "matrix_bus"
    assert len(upward(source, room, package)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("run", "from . import registry"),
        ("worker", "from .session import Session"),
        ("cli", "from . import app"),
        ("cli", "def late():\n    from ..worker import Worker"),
        ("config", "if TYPE_CHECKING:\n    from .run import submit"),
        ("errors", "import asyncio\nfrom typing import Any"),
    ],
)
def test_an_import_that_points_downward_is_fine(room: str, source: str) -> None:
    package = "matrix_bus." + room if room in ("bus", "llm", "worker", "cli") else "matrix_bus"
    assert upward(source, room, package) == []


def test_the_bus_does_not_need_the_serving_package() -> None:
    early = [
        f"{path.relative_to(ROOT)}:{made.line}"
        for path in PACKAGE.rglob("*.py")
        for made in imports(ast.parse(path.read_text()), place(path)[1])
        if made.top == "matrix_serving" and not made.lazy
    ]
    assert early == []


def test_where_an_import_happens_is_seen() -> None:
    source = "try:\n    import a\nexcept E:\n    pass\nasync def f():\n    if x:\n        import b\n"
    assert [(i.module, i.lazy) for i in imports(ast.parse(source), "p")] == [("a", False), ("b", True)]


def test_agents_use_public_names_only() -> None:
    found = {str(path): private(path.read_text()) for path in AGENTS.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from matrix_bus.agent import Row",
        "import matrix_bus.agent",
        "from matrix_bus import agent",
        "import matrix_bus as mb\nmb.orchestrator.encode",
        "import matrix_bus\nmatrix_bus.registry",
    ],
)
def test_a_private_name_in_an_agent_is_seen(source: str) -> None:
    assert private(source)


def test_a_public_name_in_an_agent_is_fine() -> None:
    assert private("import matrix_bus as mb\nfrom matrix_bus import LLM, Row\nfrom .near import x\nmb.State\n") == []


def test_the_folder_of_agents_is_no_package() -> None:
    assert not (ROOT / "agents" / "__init__.py").exists(), "it would hide other people's package `agents`"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES
