"""The words of a command that are settings, and `config`, which shows what they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from .. import run
from ..agent import Workflow, load_workflow
from ..compose import Composed, compose, is_override
from ..config import RunConfig
from ..errors import ConfigError, DatasetError
from . import app
from .common import WorkflowSpec

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="DATASET [KEY=VALUE]...",
        help="A dataset (a file, a folder or 'a pattern' of JSON lines, CSV, Parquet; - is stdin) and settings: "
        "data.jsonl trials=2 llm.temperature=0.5 llm.urls=http://host:8000/v1. matrix-bus config shows them all.",
    ),
]
ConfigDir = Annotated[
    Path | None,
    typer.Option("--config-dir", help="Folder of your own settings: config.yaml, llm/NAME.yaml for llm=NAME, …"),
]

_COLUMN = 44


def load(
    spec: str, words: list[str], config_dir: Path | None, *, quick: bool = False
) -> tuple[str, Workflow[Any], RunConfig]:
    """(dataset, workflow, settings) of a command line. Raises `UsageError`s."""
    datasets = [word for word in words if not is_override(word)]
    if not datasets:
        files = [word for word in words if Path(word).exists()]
        hint = f" ({files[0]!r} is read as a setting; the file is ./{files[0]})" if files else ""
        raise DatasetError(f"no dataset is named{hint}: give a file, a folder, or - for stdin, beside the settings")
    if len(datasets) > 1:
        raise ConfigError(f"{datasets[1]!r} is neither the dataset (that is {datasets[0]!r}) nor of the form KEY=VALUE")
    flow, composed = _compose(spec, [word for word in words if is_override(word)], config_dir, quick)
    return datasets[0], flow, composed.config


def _compose(spec: str, words: list[str], config_dir: Path | None, quick: bool) -> tuple[Workflow[Any], Composed]:
    chosen = [word for word in words if word.startswith("workflow=") and not word.startswith("workflow={")]
    if chosen:  # in Hydra's way of speaking, a workflow is an option of its group
        spec = chosen[-1].partition("=")[2]
    flow = load_workflow(spec)
    return flow, compose(flow, [word for word in words if word not in chosen], config_dir=config_dir, quick=quick)


@app.command()
def config(
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for submit.")] = None,
    workflow: WorkflowSpec = "coral",
    config_dir: ConfigDir = None,
    json: Annotated[bool, typer.Option("--json", help="What is stored with a run: all that is not a default.")] = False,
) -> None:
    """Show the settings of a run, and where each comes from, without submitting anything."""
    for word in words or []:
        if not is_override(word):
            raise ConfigError(f"{word!r} is not of the form KEY=VALUE: config takes no dataset")
    flow, composed = _compose(workflow, words or [], config_dir, quick=False)
    record = run.new_record(flow, composed.config)
    if json:
        print(msgspec.json.format(msgspec.json.encode(record.config), indent=2).decode())
        return
    _print_tree(composed.tree, composed.origins)
    _print_calls(flow, composed)


def _print_tree(tree: dict[str, Any], origins: dict[str, str], at: str = "", indent: str = "") -> None:
    """YAML, with the origin of each value as a comment."""
    for key, value in tree.items():
        path = f"{at}.{key}" if at else str(key)
        if isinstance(value, dict) and value:
            print(f"{indent}{key}:")
            _print_tree(value, origins, path, indent + "  ")
        elif value is not None or path in origins:
            shown = f"{indent}{key}: {msgspec.json.encode(value).decode()}"
            print(f"{shown:<{_COLUMN}}  # {_origin(path, origins)}")


def _origin(path: str, origins: dict[str, str]) -> str:
    """Where a value comes from: also that of a part of it, or of the whole that it is a part of."""
    while path:
        if path in origins:
            return origins[path]
        path = path.rpartition(".")[0]
    return "default"


def _print_calls(flow: Workflow[Any], composed: Composed) -> None:
    """What each role's calls are made with, when all layers are laid over each other."""
    config = composed.config
    lines = []
    for name, role in flow.roles.items():
        if not role.wants_model:
            continue
        alias = config.alias_of(name, role.model)
        mine, model = config.role(name).sampling, config.llm.named(alias)
        layers = [
            (mine, f"roles.{name}"),
            (model.sampling, "llm" if alias == "default" else f"llm.models.{alias}"),
            (config.llm.sampling, "llm"),
            (role.sampling, f"workflow {flow.name}"),
        ]
        parts = [
            f"{parameter}={value!r} ({origin})"
            for parameter in mine.__struct_fields__
            for value, origin in [_first(layers, parameter)]
            if value is not None
        ]
        told = "" if alias == (config.role(name).model or role.model) else f" (no llm.models.{role.model})"
        lines.append(f"#   {name}: model {model.model}{told}" + "".join(f", {part}" for part in parts))
    if lines:
        print("\n# what the roles call:")
        print("\n".join(lines))


def _first(layers: list[tuple[Any, str]], parameter: str) -> tuple[Any, str]:
    return next(((value, o) for layer, o in layers if (value := getattr(layer, parameter)) is not None), (None, ""))
