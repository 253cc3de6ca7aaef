"""Validated settings of a run: composed once from `key=value` overrides, stored with the run, read by workers.

Unknown keys are refused and errors name the path. Precedence of sampling parameters, low to high: the role's
own defaults in the workflow, `llm.sampling`, `roles.<role>.sampling`, the arguments of the call.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from .errors import ConfigError

T = TypeVar("T")
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=30 * 86_400)]


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Sampling parameters of a model call, by their OpenAI names. None means: not sent."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_tokens: Positive | None = None
    stop: list[str] | None = None
    seed: int | None = None
    extra: dict[str, Any] | None = None
    """Further body parameters, passed through as they are (`top_k`, `guided_json`, …)."""

    def over(self, below: Sampling) -> Sampling:
        """These parameters, with what is unset here taken from `below`."""
        mine = {f: getattr(self, f) for f in self.__struct_fields__}
        return Sampling(**{f: v if v is not None else getattr(below, f) for f, v in mine.items()})


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one model is served and how it is called."""

    name: str = "smollm2-135m-instruct"
    """The name that the servers know it by."""
    urls: list[str] = []
    """Base URLs of OpenAI-compatible servers, with `/v1`. Empty: the embedded model on the worker's machine."""
    transport: Literal["direct", "sdk"] = "direct"
    """`direct` for vLLM, SGLang, llama.cpp; `sdk` (the openai package) for hosted providers."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key, looked up in the worker. Never the key itself."""
    concurrency: Positive = 64
    """Calls in flight per endpoint and worker process; the rest wait in line without their timeout running."""
    timeout_s: Seconds = 600.0
    """From the moment a call is sent."""


class LlmConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Models and what all roles share in calling them."""

    models: dict[str, ModelConfig] = msgspec.field(default_factory=lambda: {"default": ModelConfig()})
    """By the alias that roles use; `default` is what a role uses that names none."""
    sampling: Sampling = Sampling()


class RoleConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one role."""

    model: str | None = None
    """Alias in `llm.models`; unset: what the workflow declares for the role."""
    sampling: Sampling = Sampling()
    max_attempts: Positive = 5
    """Handler calls for one hop, the first included, before a transient error ends the row as failed."""
    timeout_s: Seconds = 3600.0
    """For one handler call."""


class IoConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How rows are carried."""

    offload_above_bytes: Annotated[int, Meta(ge=1024)] = 64 << 10
    """A row whose message would be larger has its large parts put into the run's object store."""


class RunConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a worker must know about a run, as stored with it."""

    workflow: dict[str, Any] = {}
    """The workflow's own parameters, validated by its config struct."""
    llm: LlmConfig = msgspec.field(default_factory=LlmConfig)
    roles: dict[str, RoleConfig] = {}
    io: IoConfig = IoConfig()
    max_in_flight: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000
    """Rows of the run that may be under way at once; the broker enforces it."""
    trials: Positive = 1
    """How often each line is run, each with a seed of its own."""
    seed: int = 0
    ack_wait_s: Annotated[float, Meta(ge=1, le=86_400)] = 30.0
    """After this long without a heartbeat, a hop is given to another worker."""

    def role(self, name: str) -> RoleConfig:
        """The settings of a role, defaults if none are given."""
        return self.roles.get(name, _ROLE_DEFAULTS)


_ROLE_DEFAULTS = RoleConfig()


def compose(overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None) -> RunConfig:
    """The run's config from `key=value` words, dotted and with YAML values, over `base`.

    Raises `ConfigError` that names the path, what was expected and what was found.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not of the form key=value, as in llm.sampling.temperature=0.5")
    try:
        merged = OmegaConf.merge(OmegaConf.create(dict(base or {})), OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"these settings cannot be read: {' '.join(overrides)}: {error}") from None
    assert isinstance(plain, dict)
    models = plain.get("llm", {}).get("models") if isinstance(plain.get("llm"), dict) else None
    if isinstance(models, dict):
        models.setdefault("default", {})
    config = _parse_run(plain)
    check_storable(config)
    return config


def check_storable(config: RunConfig) -> None:
    """Raises `ConfigError` if the config, stored as JSON, would be read as another one."""
    if msgspec.json.decode(msgspec.json.encode(config), type=RunConfig) != config:
        raise ConfigError(
            f"these settings cannot be stored as JSON (an infinity, or not a number?): {msgspec.to_builtins(config)}"
        )


def _parse_run(plain: dict[Any, Any]) -> RunConfig:
    """Entries by name first, so that an error's path says which one."""
    for at, kind in (("llm.models", ModelConfig), ("roles", RoleConfig)):
        section: Any = plain
        for word in at.split("."):
            section = section.get(word) if isinstance(section, dict) else None
        for name, entry in section.items() if isinstance(section, dict) else ():
            parse(entry, kind, f"{at}.{name}")
    return parse(plain, RunConfig)


def parse(plain: Any, kind: type[T], at: str = "") -> T:
    """`plain` validated as `kind`; raises `ConfigError` naming the path and the nearest right name."""
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), plain, kind, at)) from None


def _explain(message: str, plain: Any, kind: type, at: str) -> str:
    what, _, path = message.partition(" - at ")
    path = path.strip("`").removeprefix("$").lstrip(".")
    where = ".".join(p for p in (at, path) if p) or "the top level"
    found = plain
    for word in filter(None, path.split(".")):
        found = found.get(word) if isinstance(found, dict) else None
    hint = "" if isinstance(found, dict | list) or found is None else f", in {found!r:.100}"
    if "unknown field" in what:
        near = difflib.get_close_matches(what.rsplit("`", 2)[-2], _fields_at(kind, path), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"setting at {where}: {what}{hint}"


def _fields_at(kind: type, path: str) -> list[str]:
    """Names of the fields of the struct that lies at `path` within `kind`."""
    info: Any = msgspec.inspect.type_info(kind)
    for word in filter(None, path.split(".")):
        fields = {field.encode_name: field.type for field in getattr(info, "fields", ())}
        info = fields.get(word)
    return [field.encode_name for field in getattr(info, "fields", ())]
