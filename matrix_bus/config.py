"""Validated settings of a run: what is stored with it, and read by workers that have no files.

Unknown keys are refused and errors name the path. Sampling parameters, low to high: the role's own defaults in the
workflow, `llm`, `llm.models.<alias>`, `roles.<role>`, the arguments of the call.

Every struct leaves out what has its default when written, so that an older worker can read what a newer one wrote
as long as nothing new is used. A default therefore never changes its value.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from .errors import ConfigError

T = TypeVar("T")
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=30 * 86_400)]

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""Name of the model that comes along."""
DEFAULT_MODEL = "default"
"""Alias of the model that `llm` itself describes."""


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Sampling parameters of a model call, by their OpenAI names. None means: not sent."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_tokens: Positive | None = None
    stop: list[str] | None = None
    seed: int | None = None
    extra: dict[str, Any] | None = None
    """Further body parameters, passed through as they are (`top_k`, `guided_json`, …)."""

    @property
    def sampling(self) -> Sampling:
        """The sampling parameters alone."""
        return Sampling(**{name: getattr(self, name) for name in Sampling.__struct_fields__})

    def over(self, below: Sampling) -> Sampling:
        """These parameters, with what is unset here taken from `below`."""
        mine = {name: getattr(self, name) for name in Sampling.__struct_fields__}
        return Sampling(**{f: v if v is not None else getattr(below, f) for f, v in mine.items()})


class ModelConfig(Sampling, frozen=True, kw_only=True):
    """One model: where it is served, how it is called, and with which sampling parameters."""

    model: str = EMBEDDED_MODEL
    """The name that the servers know it by."""
    urls: list[str] = []
    """Base URLs of OpenAI-compatible servers, with `/v1`.

    Empty: for the default model the embedded one on the worker's machine, for others those that `matrix-bus serve` has
    announced on the bus.
    """
    transport: Literal["direct", "sdk", "azure"] = "direct"
    """`direct` for vLLM, SGLang, llama.cpp; `sdk` (the openai package) for hosted providers, `azure` for theirs.

    With `azure` a URL is that of the resource, `https://NAME.openai.azure.com`, and the model is the deployment.
    """
    api_version: str = "2024-10-21"
    """Of Azure's interface."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key, looked up in the worker. Never the key itself."""
    prompt_price: Annotated[float, Meta(ge=0)] = 0.0
    """Of a million prompt tokens, for `limits.cost`."""
    completion_price: Annotated[float, Meta(ge=0)] = 0.0
    """Of a million completion tokens."""
    concurrency: Positive = 64
    """Calls in flight per endpoint and worker process; the rest wait in line without their timeout running."""
    requests_per_minute: Positive | None = None
    """Of all worker processes together, as hosted models allow them; unset: no limit."""
    tokens_per_minute: Positive | None = None
    """The same for prompt and completion tokens."""
    timeout_s: Seconds = 600.0
    """From the moment a call is sent."""
    patience_s: Annotated[float, Meta(ge=0, le=30 * 86_400)] = 600.0
    """How long a call waits for a server to come back when none answers, before it fails and its hop is retried."""
    sticky: bool = True
    """Calls of one row go to the same replica, which has the beginning of the row's prompts in its prefix cache."""

    @property
    def is_metered(self) -> bool:
        """Whether calls are limited per minute."""
        return bool(self.requests_per_minute or self.tokens_per_minute)

    @property
    def is_embedded(self) -> bool:
        """True for the model that comes along; of any other without urls, servers announce themselves on the bus."""
        return not self.urls and self.model == EMBEDDED_MODEL

    @property
    def server(self) -> ModelConfig:
        """The same without sampling parameters: what is called, whatever is asked."""
        names = set(ModelConfig.__struct_fields__) - set(Sampling.__struct_fields__)
        return ModelConfig(**{name: getattr(self, name) for name in names})


class LlmConfig(ModelConfig, frozen=True, kw_only=True):
    """The default model, and further ones by alias."""

    cache: Literal["off", "run", "shared"] = "off"
    """Keep answers on the broker, by what was asked: for the run (a hop that is executed again repeats only the calls
    that were not answered), or shared with all runs that say so."""
    models: dict[str, ModelConfig] = {}
    """Models that roles or calls name by an alias; `default` is the one that is described beside this."""

    @property
    def aliases(self) -> list[str]:
        """All aliases there are."""
        return [DEFAULT_MODEL, *self.models]

    def named(self, alias: str) -> ModelConfig:
        """The model of that alias. Raises `ConfigError`, naming those there are."""
        if alias == DEFAULT_MODEL:
            return self
        if alias not in self.models:
            raise ConfigError(
                f"no model {alias!r}: there are {', '.join(self.aliases)}; llm.models.{alias}.model=NAME adds it"
            )
        return self.models[alias]


class RoleConfig(Sampling, frozen=True, kw_only=True):
    """Settings of one role."""

    model: str | None = None
    """Alias of a model; unset: what the workflow declares for the role."""
    slots: Positive | None = None
    """Hops of the role in flight per worker process, for this run; unset, and at most: the worker's `--slots`."""
    max_attempts: Positive = 5
    """Handler calls for one hop, the first included, before a transient error ends the row as failed."""
    timeout_s: Seconds = 3600.0
    """For one handler call."""


class _Group(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A group of settings."""


class BrokerConfig(_Group, frozen=True, kw_only=True):
    """The broker, and how it keeps the run."""

    url: str = ""
    """As `--server`, which wins. Never stored with a run: it may hold a password."""
    replicas: Literal[1, 3, 5] = 1
    """Servers of a cluster that hold each message of the run."""


class SandboxConfig(_Group, frozen=True, kw_only=True):
    """Where code that a model wrote is run."""

    kind: Literal["none"] = "none"
    """There is no sandbox yet, so no role can ask for one."""


class InputConfig(_Group, frozen=True, kw_only=True):
    """Which lines of the dataset become rows, and what of them."""

    skip: Annotated[int, Meta(ge=0)] = 0
    """So many lines at the beginning are left out."""
    limit: Positive | None = None
    """No more than so many lines after that, those that are rejected included."""
    shuffle: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """Submit in random order, as far as a buffer of so many lines goes (they are held in memory); 0: as they stand."""
    fields: list[str] = []
    """Leave out all other fields of a line, but for `id`; empty: keep all."""
    rename: dict[str, str] = {}
    """New name of a field -> the one that it has in the line; dots lead into objects: `metadata.url`."""


class IoConfig(_Group, frozen=True, kw_only=True):
    """How rows are carried."""

    offload_above_bytes: Annotated[int, Meta(ge=1024)] = 64 << 10
    """A row whose message would be larger has its large parts put into the run's object store."""
    queue_messages: Positive = 1_000_000
    """A submission waits for the workers while the run's queue holds so many messages, rows and hops."""
    queue_bytes: Positive = 8 << 30
    """The same for the bytes of these messages; values in the object store are not counted."""


class LimitsConfig(_Group, frozen=True, kw_only=True):
    """When a row, or the whole run, has gone on for long enough. A row that reaches a limit ends as failed: `limit`."""

    row_s: Seconds | None = None
    """Seconds from a row's admission to its end, waiting included."""
    hops: Positive | None = None
    """Handler deliveries of a row."""
    attempts: Positive | None = None
    """Handler calls of a row, those that failed and were tried again included."""
    tokens: Positive | None = None
    """Prompt and completion tokens of a row's model calls."""
    cost: Annotated[float, Meta(gt=0)] | None = None
    """Of a row's model calls, in the currency of `llm.prompt_price` and `llm.completion_price`."""
    crashes: Annotated[int, Meta(ge=4)] = 8
    """A hop that so many workers died of, while they executed it, ends its row as failed.

    From the second on it goes in a small group, from the third on alone, so that it can be told from its neighbours.
    """
    failed_share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    """The run is paused when so many of the last outcomes failed; 1 pauses only when all of them did."""
    failed_window: Annotated[int, Meta(ge=0)] = 200
    """How many of the last outcomes that looks at; 0: never pause."""


class RunConfig(_Group, frozen=True, kw_only=True):
    """Everything that a worker must know about a run, as stored with it."""

    workflow: dict[str, Any] = {}
    """The workflow's own parameters, validated by its config struct."""
    llm: LlmConfig = msgspec.field(default_factory=LlmConfig)
    roles: dict[str, RoleConfig] = {}
    broker: BrokerConfig = BrokerConfig()
    sandbox: SandboxConfig = SandboxConfig()
    input: InputConfig = InputConfig()
    io: IoConfig = IoConfig()
    limits: LimitsConfig = LimitsConfig()
    max_in_flight: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000
    """Rows of the run that may be under way at once; the broker enforces it."""
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    """The run's share of workers that serve several: one of weight 2 gets twice the slots of one of weight 1."""
    trials: Positive = 1
    """How often each line is run, each with a seed of its own."""
    seed: int = 0
    ack_wait_s: Annotated[float, Meta(ge=1, le=86_400)] = 30.0
    """After this long without a heartbeat, a hop is given to another worker."""

    def role(self, name: str) -> RoleConfig:
        """The settings of a role, defaults if none are given."""
        return self.roles.get(name, _ROLE_DEFAULTS)

    def alias_of(self, name: str, declared: str) -> str:
        """The model that a role calls: as set for it, else what the workflow declares, if there is such a model.

        A workflow may tell its models apart by alias and yet be run with one for all.
        """
        return self.role(name).model or (declared if declared in self.llm.aliases else DEFAULT_MODEL)


_ROLE_DEFAULTS = RoleConfig()


def parse_run(plain: Mapping[str, Any]) -> RunConfig:
    """A run's settings from a plain tree. Raises `ConfigError` that says where, what was expected and what was found.

    `urls` may be one bare URL.
    """
    tree = dict(plain)
    if isinstance(tree.get("llm"), dict):
        tree["llm"] = llm = _with_url_list(tree["llm"])
        if isinstance(llm.get("models"), dict):
            llm["models"] = {alias: _with_url_list(model) for alias, model in llm["models"].items()}
            if DEFAULT_MODEL in llm["models"]:
                raise ConfigError(
                    f"setting at llm.models.{DEFAULT_MODEL}: the default model is llm itself, as in llm.model=NAME"
                )
    config = _parse_run(tree)
    check_run(config)
    return config


def _with_url_list(model: Any) -> Any:
    if not isinstance(model, dict):
        return model
    return {**model, "urls": [model["urls"]]} if isinstance(model.get("urls"), str) else dict(model)


def tree_of(value: Any) -> Any:
    """A config as a plain tree with everything in it, also what has its default."""
    if isinstance(value, Struct):
        return {name: tree_of(getattr(value, name)) for name in value.__struct_fields__}
    return {key: tree_of(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def check_run(config: RunConfig) -> None:
    """Raises `ConfigError` for a URL that is none, and if the config, stored as JSON, would be read as another one."""
    for alias in config.llm.aliases:
        at = "llm" if alias == DEFAULT_MODEL else f"llm.models.{alias}"
        for url in config.llm.named(alias).urls:
            check_url(url, f"setting at {at}.urls: ")
    if msgspec.json.decode(msgspec.json.encode(config), type=RunConfig) != config:
        raise ConfigError(
            f"these settings cannot be stored as JSON (an infinity, or not a number?): {msgspec.to_builtins(config)}"
        )


def check_url(url: str, where: str = "") -> None:
    """Raises `ConfigError` if it is not the address of a server; the message begins with `where`."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is no number, or a bracket is left open
        good = False
    if not good or " " in url or not url.isprintable():
        raise ConfigError(f"{where}{url!r} is not the URL of a server; it must look like http://host:8000/v1")


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
        known = _fields_at(kind, path)
        near = difflib.get_close_matches(what.rsplit("`", 2)[-2], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}" if known else ""
    return f"setting at {where}: {what}{hint}"


def _fields_at(kind: type, path: str) -> list[str]:
    """Names of the fields of the struct that lies at `path` within `kind`."""
    info: Any = msgspec.inspect.type_info(kind)
    for word in filter(None, path.split(".")):
        fields = {field.encode_name: field.type for field in getattr(info, "fields", ())}
        info = fields.get(word)
    return [field.encode_name for field in getattr(info, "fields", ())]
