"""The public names, on one screen; and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import matrix_bus

PUBLIC = (
    "LLM",
    "BlockingClient",
    "BlockingRun",
    "BusError",
    "ChatRequest",
    "Client",
    "ContextLengthExceeded",
    "EndpointGone",
    "HandlerError",
    "Large",
    "LlmConfig",
    "MatrixBusError",
    "Message",
    "ModelConfig",
    "ModelError",
    "ModelTimeout",
    "Next",
    "Outcome",
    "OutcomeRecord",
    "RateLimited",
    "Rejected",
    "Rejections",
    "Reply",
    "Retry",
    "RoleConfig",
    "Row",
    "RowError",
    "RowResult",
    "Run",
    "RunConfig",
    "Sampling",
    "State",
    "Status",
    "StructureInvalid",
    "Usage",
    "UsageError",
    "Workflow",
    "WorkflowInfo",
    "__version__",
    "assistant",
    "connect",
    "connect_blocking",
    "failed",
    "filtered",
    "load_workflow",
    "success",
    "system",
    "to",
    "tool",
    "user",
)

HEAVY = ("typer", "rich", "aiohttp", "openai", "omegaconf", "nats")


def python(code: str) -> str:
    """What a fresh interpreter prints; warnings are errors there too."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names_are_these() -> None:
    assert matrix_bus.__all__ == PUBLIC
    assert isinstance(matrix_bus.__all__, tuple)
    assert dir(matrix_bus) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_resolves(name: str) -> None:
    value = getattr(matrix_bus, name)
    assert value is not None
    if hasattr(value, "__name__"):
        assert value.__name__ == name


def test_every_name_has_one_home() -> None:
    homes = [name for names in matrix_bus._HOMES.values() for name in names]
    assert sorted(homes) == sorted(set(PUBLIC) - {"__version__"})


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'matrix_bus' has no attribute 'nothing'"):
        matrix_bus.nothing  # noqa: B018


def test_star_import_takes_all_public_names() -> None:
    code = f"from matrix_bus import *; print(sorted(set({PUBLIC!r}) - set(globals())))"
    assert python(code) == "[]"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, matrix_bus; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert python(code) == "[]"


def test_names_of_a_light_module_stay_light() -> None:
    code = f"import sys, matrix_bus; matrix_bus.Sampling; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert python(code) == "[]"


def test_the_event_loop_policy_of_the_host_is_left_alone() -> None:
    code = f"""
import asyncio
def refuse(policy):
    raise SystemExit("the policy was set")
asyncio.set_event_loop_policy = asyncio.events.set_event_loop_policy = refuse
import matrix_bus, matrix_bus.worker, matrix_bus.run, matrix_bus.cli.processes, matrix_bus.cli.runs
for name in {PUBLIC!r}:
    getattr(matrix_bus, name)
print(asyncio.events._event_loop_policy)
"""
    assert python(code) == "None"


def test_the_menu_names_every_command_and_its_module() -> None:
    code = (
        "import importlib, typer, matrix_bus.cli as cli\n"
        "from matrix_bus.cli import menu\n"
        "for module in {module for module, _ in menu._COMMANDS.values()}:\n"
        "    importlib.import_module(f'matrix_bus.cli.{module}')\n"
        "made = typer.main.get_command(cli.app).commands\n"
        "wrong = [name for name in made if name not in menu._COMMANDS]\n"
        "for name, (module, _) in menu._COMMANDS.items():\n"
        "    calls = getattr(made[name], 'callback', None)\n"
        "    if calls is not None and calls.__module__ != f'matrix_bus.cli.{module}':\n"
        "        wrong.append(name)\n"
        "print(wrong)"
    )
    assert python(code) == "[]"


def test_help_imports_nothing_that_takes_long() -> None:
    code = (
        "import sys, matrix_bus.cli as cli\n"
        "sys.argv = ['matrix-bus', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "slow = {'nats', 'aiohttp', 'openai', 'structlog', 'prometheus_client', 'hydra', 'pyarrow', 'rich'}\n"
        "print(sorted(slow & sys.modules.keys()))\n"
    )
    assert python(code).splitlines()[-1] == "[]"
