"""Composing a run's settings with Hydra: once, in the process of the command, before anything is submitted.

Layers, low to high: the defaults of the structs in `config`, the workflow's own, the chosen options of groups
(`llm=vllm`), what the workflow wants for a quick try, the user's `config.yaml`, the words of the command line. Hydra
composes the groups; values are laid over by us, so that a wrong key gets our error and not Hydra's advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .agent import Workflow
from .bus import without_password
from .config import RunConfig, parse_run, tree_of
from .errors import ConfigError

_SHIPPED = Path(__file__).parent / "conf"
_GROUPS = ("workflow", "roles", "llm", "broker", "sandbox", "input", "io", "limits")
_PRIMARY = "matrix_bus_run"
# Hydra's own pattern has a slash among the letters, for groups inside groups; we have none, but files in folders.
_OVERRIDE = re.compile(r"[+~]*[\w.@]+=|~[\w.@]+$")
_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")


def is_override(word: str) -> bool:
    """True for `key=value` in any of Hydra's forms; anything else on the command line is a dataset."""
    return _OVERRIDE.match(word) is not None


@dataclass
class Composed:
    """A run's settings, and where each comes from."""

    config: RunConfig
    tree: dict[str, Any]
    """All of them, defaults too, as plain values."""
    origins: dict[str, str] = field(default_factory=dict)
    """By dotted path; what is not here has its default."""


@dataclass(frozen=True)
class _Word:
    """One override, read."""

    text: str
    key: str
    value: Any
    deletes: bool


def compose(
    flow: Workflow[Any], words: Sequence[str] = (), *, config_dir: Path | None = None, quick: bool = False
) -> Composed:
    """The settings of a run of `flow`. `quick` adds what the workflow wants for a first try on a small model.

    Raises `ConfigError` that says where, what was expected, what was found, and what to do.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = _load_file(config_dir)
    overrides = [_read(word) for word in words]
    groups = _groups_of(config_dir)
    choices = {**_choices_of(file), **{w.key: w.value for w in overrides if _is_choice(w, groups)}}
    origins: dict[str, str] = {}
    defaults = _workflow_defaults(flow)
    tree, chosen = _compose_groups(flow, defaults, choices, config_dir)
    _note(origins, {"workflow": defaults}, f"workflow {flow.name}")
    for group, (content, where) in chosen.items():
        _note(origins, content, f"{group} ({where})")
    settings: DictConfig | ListConfig = OmegaConf.create(tree)
    try:
        for key, value in flow.quick.items() if quick else ():
            OmegaConf.update(settings, key, value, force_add=True)
            _note(origins, _nested(key, value), f"workflow {flow.name}, for a quick try")
        if file:
            settings = OmegaConf.merge(settings, {k: v for k, v in file.items() if k != "defaults"})
            _note(origins, file, str(_file_of(config_dir)))
        for word in overrides:
            if _is_choice(word, groups):
                continue
            if word.deletes:
                _delete(settings, word)
            else:
                OmegaConf.update(settings, word.key, word.value, force_add=True)
                _note(origins, _nested(word.key, word.value), "command line")
        assert isinstance(settings, DictConfig)
        _refuse_resolvers(OmegaConf.to_container(settings, resolve=False))
        plain = OmegaConf.to_container(settings, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"these settings cannot be read: {' '.join(words)}: {_first_line(error)}") from None
    assert isinstance(plain, dict)
    config = parse_run(_without_defaults({str(k): v for k, v in plain.items()}, defaults))
    full = tree_of(config)
    full["workflow"] = {**defaults, **config.workflow}
    full["roles"] = {name: tree_of(config.role(name)) for name in flow.roles}
    full["broker"]["url"] = without_password(config.broker.url)
    return Composed(config, full, origins)


def _read(word: str) -> _Word:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    if not is_override(word):
        raise ConfigError(f"{word!r} is not of the form key=value, as in llm.temperature=0.5")
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ConfigError(
            f"{word!r} cannot be read ({_first_line(error)}): a text with commas, brackets or quotes in it needs "
            "quotes of its own, as in key='\"a, b\"'"
        ) from None
    if override.is_sweep_override():
        raise ConfigError(
            f"{word!r} has several values, and a run takes one: write a list as [a,b], a text with a comma as "
            "'\"a,b\"'; to try several values, submit several runs"
        )
    deletes = override.type == OverrideType.DEL
    return _Word(word, override.key_or_group, None if deletes else override.value(), deletes)


def _is_choice(word: _Word, groups: Mapping[str, list[str]]) -> bool:
    """True where a word chooses an option of a group. Raises `ConfigError` for an option that there is not."""
    if word.deletes or not isinstance(word.value, str) or word.key not in {*_GROUPS, *groups}:
        return False
    if word.value not in groups.get(word.key, []):
        there = ", ".join(groups.get(word.key, [])) or "none"
        raise ConfigError(
            f"{word.text!r}: {word.key} has no option {word.value!r}, there are: {there}. A file {word.key}/"
            f"{word.value}.yaml in the folder that --config-dir names adds it"
        )
    return True


def _groups_of(config_dir: Path | None) -> dict[str, list[str]]:
    """The options of each group that is made of files."""
    groups: dict[str, list[str]] = {}
    for folder in filter(None, (_SHIPPED, config_dir)):
        for path in sorted(folder.rglob("*.yaml")):
            if path.parent != folder:
                groups.setdefault(path.parent.relative_to(folder).as_posix(), []).append(path.stem)
    return groups


def _compose_groups(
    flow: Workflow[Any], defaults: Mapping[str, Any], choices: Mapping[str, str], config_dir: Path | None
) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], str]]]:
    """(the tree of defaults with the chosen options over it; what each option has changed, and its file)."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    node = {
        "workflow": dict(defaults),
        "roles": {name: {} for name in flow.roles},
        "defaults": ["_self_", {"llm": "embedded"}],
    }
    ConfigStore.instance().store(name=_PRIMARY, node=node)  # builtins: it does not take msgspec's structs
    folder = str(config_dir.resolve()).replace("'", "\\'") if config_dir is not None else ""
    search = [f"hydra.searchpath=['file://{folder}']"] if folder else []

    def composed(chosen: Mapping[str, str]) -> dict[str, Any]:
        words = [f"{'' if group == 'llm' else '+'}{group}={option}" for group, option in chosen.items()]
        found = OmegaConf.to_container(hydra.compose(_PRIMARY, overrides=[*search, *words]), resolve=False)
        assert isinstance(found, dict)
        return {str(key): value for key, value in found.items()}

    GlobalHydra.instance().clear()
    changed = {}
    try:
        with hydra.initialize_config_dir(str(_SHIPPED), version_base="1.3"):
            below = composed({})
            for count, (group, option) in enumerate(choices.items(), start=1):
                above = composed(dict(list(choices.items())[:count]))
                changed[f"{group}/{option}"] = (_changes(below, above), _place(group, option, config_dir))
                below = above
    except (HydraException, OmegaConfBaseException) as error:
        words = " ".join(f"{group}={option}" for group, option in choices.items())
        raise ConfigError(f"{words or 'the settings'} cannot be composed: {_first_line(error)}") from None
    finally:
        GlobalHydra.instance().clear()
    return below, changed


def _place(group: str, option: str, config_dir: Path | None) -> str:
    own = config_dir / group / f"{option}.yaml" if config_dir is not None else None
    return str(own) if own is not None and own.is_file() else "of matrix-bus"


def _file_of(config_dir: Path | None) -> Path | None:
    return config_dir / "config.yaml" if config_dir is not None else None


def _load_file(config_dir: Path | None) -> dict[str, Any]:
    """The user's `config.yaml`; empty if there is none."""
    import yaml

    if config_dir is None:
        return {}
    if not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a folder")
    path = config_dir / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text()) if path.is_file() else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(found or {}, dict):
        raise ConfigError(f"{path} must hold settings by their names, found {type(found).__name__}")
    return found or {}


def _choices_of(file: Mapping[str, Any]) -> dict[str, str]:
    """The options that a `config.yaml` chooses in Hydra's `defaults` list."""
    choices: dict[str, str] = {}
    for entry in file.get("defaults") or []:
        if isinstance(entry, dict) and all(isinstance(option, str) for option in entry.values()):
            choices.update(entry)
        elif entry != "_self_":
            raise ConfigError(
                f"config.yaml: an entry of defaults chooses an option, as in `- llm: vllm`, not {entry!r}"
            )
    return choices


def _workflow_defaults(flow: Workflow[Any]) -> dict[str, Any]:
    defaults = {}
    for parameter in msgspec.structs.fields(flow.config) if flow.config is not None else ():
        if parameter.default is not msgspec.NODEFAULT:
            defaults[parameter.encode_name] = msgspec.to_builtins(parameter.default)
        elif parameter.default_factory is not msgspec.NODEFAULT:
            defaults[parameter.encode_name] = msgspec.to_builtins(parameter.default_factory())
    return defaults


def _without_defaults(plain: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What a run stores: who sets nothing, however it is submitted, makes the same run."""
    if isinstance(plain.get("workflow"), dict):
        unset = object()
        plain["workflow"] = {k: v for k, v in plain["workflow"].items() if defaults.get(k, unset) != v}
    if isinstance(plain.get("roles"), dict):
        plain["roles"] = {name: settings for name, settings in plain["roles"].items() if settings != {}}
    return plain


def _delete(settings: Any, word: _Word) -> None:
    from omegaconf import OmegaConf

    parent, _, name = word.key.rpartition(".")
    section = OmegaConf.select(settings, parent) if parent else settings
    if section is None or name not in section:
        raise ConfigError(f"{word.text!r}: there is no setting {word.key} to take away")
    del section[name]


def _refuse_resolvers(value: Any) -> None:
    """A setting is stored with the run and shown to all: what a resolver reads from the environment must not be."""
    if isinstance(value, dict):
        for inner in value.values():
            _refuse_resolvers(inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_resolvers(inner)
    elif isinstance(value, str) and _RESOLVER.search(value):
        raise ConfigError(
            f"{value!r} would be looked up while composing and stored with the run: give the name of an environment "
            "variable instead, as in llm.api_key_env=OPENAI_API_KEY; only ${other.setting} is filled in"
        )


def _nested(key: str, value: Any) -> dict[str, Any]:
    for word in reversed(key.split(".")):
        value = {word: value}
    assert isinstance(value, dict)
    return value


def _changes(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in above.items():
        old = below.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if inner := _changes(old, value):
                changed[key] = inner
        elif key not in below or old != value:
            changed[key] = value
    return changed


def _note(origins: dict[str, str], tree: Mapping[str, Any], origin: str) -> None:
    for path, _ in _leaves(tree):
        origins[path] = origin


def _leaves(tree: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a tree that is not itself one; an empty one counts as a value."""
    for key, value in tree.items():
        path = f"{at}.{key}" if at else str(key)
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
