"""Settings: what they default to, what is stored of them, and what a mistake is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matrix_bus.config import (
    LlmConfig,
    ModelConfig,
    RoleConfig,
    RunConfig,
    Sampling,
    check_url,
    parse,
    parse_run,
    tree_of,
)
from matrix_bus.errors import ConfigError, UsageError


def mistake(plain: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run(plain)
    return str(caught.value)


# --- defaults and access ------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = parse_run({})
    assert config == RunConfig()
    assert (config.max_in_flight, config.trials, config.seed, config.ack_wait_s) == (10_000, 1, 0, 30.0)
    assert config.workflow == {}
    assert (config.llm.urls, config.llm.transport, config.llm.api_key_env) == ([], "direct", "")
    assert (config.llm.concurrency, config.llm.timeout_s, config.llm.models) == (64, 600.0, {})
    assert (config.broker.replicas, config.sandbox.kind, config.io.offload_above_bytes) == (1, "none", 65_536)
    assert config.role("anything") == RoleConfig()
    role = RoleConfig()
    assert (role.model, role.slots, role.max_attempts, role.timeout_s) == (None, None, 5, 3600.0)


def test_the_default_model_is_llm_itself() -> None:
    config = parse_run({"llm": {"model": "small", "temperature": 0.5, "models": {"judge": {"model": "big"}}}})
    assert config.llm.aliases == ["default", "judge"]
    assert config.llm.named("default") is config.llm
    assert config.llm.named("judge") == ModelConfig(model="big")
    with pytest.raises(ConfigError, match=r"no model 'jugde': there are default, judge; llm\.models\.jugde\.model="):
        config.llm.named("jugde")


def test_what_is_called_is_the_same_whatever_is_asked() -> None:
    one = parse_run({"llm": {"urls": ["http://a/v1"], "temperature": 0.5, "models": {"x": {"urls": ["http://a/v1"]}}}})
    assert one.llm.named("x").server == one.llm.server == ModelConfig(urls=["http://a/v1"])
    assert one.llm.sampling == Sampling(temperature=0.5)


def test_one_url_needs_no_list() -> None:
    config = parse_run({"llm": {"urls": "http://a/v1", "models": {"x": {"urls": "http://b/v1"}}}})
    assert (config.llm.urls, config.llm.named("x").urls) == (["http://a/v1"], ["http://b/v1"])


@pytest.mark.parametrize("url", ["https://host/v1", "http://[::1]:8000/v1", "http://u:p@host:80", "HTTP://a_b"])
def test_what_may_be_a_url(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    "url", ["", "host", "ftp://host", "http://", "http://h:port", "http://h:70000", "http://[::1", "http://h /v1"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match=r"is not the URL of a server; it must look like http://host:8000/v1"):
        check_url(url)


def test_what_is_written_holds_what_was_set() -> None:
    config = RunConfig(trials=2, llm=LlmConfig(model="m"), roles={"a": RoleConfig(top_p=0.5)})
    assert msgspec.json.decode(msgspec.json.encode(config)) == {
        "trials": 2,
        "llm": {"model": "m"},
        "roles": {"a": {"top_p": 0.5}},
    }


def test_the_tree_holds_everything() -> None:
    tree = tree_of(RunConfig(roles={"a": RoleConfig(top_p=0.5)}))
    assert tree["roles"]["a"]["max_attempts"] == 5
    assert (tree["llm"]["concurrency"], tree["io"]["offload_above_bytes"]) == (64, 65_536)


# --- mistakes -----------------------------------------------------------------------------------------------


def test_a_config_error_is_the_users() -> None:
    assert issubclass(ConfigError, UsageError)


@pytest.mark.parametrize(
    ("plain", "path", "unknown", "near"),
    [
        ({"seeed": 1}, "the top level", "seeed", "seed"),
        ({"max_inflight": 5}, "the top level", "max_inflight", "max_in_flight"),
        ({"llm": {"temprature": 1}}, "llm", "temprature", "temperature"),
        ({"llm": {"modls": {}}}, "llm", "modls", "models"),
        ({"roles": {"judge": {"timout_s": 1}}}, "roles.judge", "timout_s", "timeout_s"),
        ({"llm": {"models": {"big": {"ulrs": []}}}}, "llm.models.big", "ulrs", "urls"),
        ({"broker": {"replica": 3}}, "broker", "replica", "replicas"),
    ],
)
def test_an_unknown_key_names_path_and_nearest_name(plain: dict[str, Any], path: str, unknown: str, near: str) -> None:
    said = mistake(plain)
    assert said.startswith(f"setting at {path}: ")
    assert said.endswith(f"unknown field `{unknown}`; did you mean {near!r}?")


def test_an_unknown_key_that_is_near_to_nothing_has_no_hint() -> None:
    assert "did you mean" not in mistake({"xyzzy": 1})


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"trials": "many"}, "setting at trials: Expected `int`, got `str`, in 'many'"),
        ({"seed": True}, "setting at seed: Expected `int`, got `bool`"),
        ({"seed": 1.5}, "setting at seed: Expected `int`, got `float`"),
        ({"seed": None}, "setting at seed: Expected `int`, got `null`"),
        ({"llm": 5}, "setting at llm: Expected `object`, got `int`"),
        ({"llm": {"temperature": "warm"}}, "setting at llm.temperature: Expected `float | null`"),
        ({"llm": {"stop": [1]}}, "setting at llm.stop[0]: Expected `str`, got `int`"),
        ({"llm": {"models": None}}, "setting at llm.models: Expected `object`, got `null`"),
        ({"trials": 0}, "setting at trials: Expected `int` >= 1, in 0"),
        ({"max_in_flight": 1000001}, "setting at max_in_flight: Expected `int` <= 1000000"),
        ({"ack_wait_s": 0.5}, "setting at ack_wait_s: Expected `float` >= 1.0"),
        ({"ack_wait_s": float("nan")}, "setting at ack_wait_s: Expected `float` >= 1.0"),
        ({"llm": {"top_p": 0}}, "setting at llm.top_p: Expected `float` > 0.0"),
        ({"llm": {"top_p": 1.1}}, "setting at llm.top_p: Expected `float` <= 1.0"),
        ({"llm": {"max_tokens": 0}}, "setting at llm.max_tokens: Expected `int` >= 1"),
        ({"broker": {"replicas": 2}}, "setting at broker.replicas: Invalid enum value 2"),
        ({"sandbox": {"kind": "bwrap"}}, "setting at sandbox.kind: Invalid enum value 'bwrap'"),
        ({"io": {"offload_above_bytes": 10}}, "setting at io.offload_above_bytes: Expected `int` >= 1024"),
        ({"roles": {"judge": {"slots": 0}}}, "setting at roles.judge.slots: Expected `int` >= 1"),
        ({"roles": {"judge": {"max_attempts": 0}}}, "setting at roles.judge.max_attempts"),
        ({"roles": {"judge": {"timeout_s": 0}}}, "setting at roles.judge.timeout_s"),
        ({"roles": {"judge": 5}}, "setting at roles.judge: Expected `object`"),
        ({"llm": {"models": {"big": {"concurrency": 0}}}}, "setting at llm.models.big.concurrency"),
        ({"llm": {"models": {"big": {"transport": "pigeon"}}}}, "setting at llm.models.big.transport"),
        ({"llm": {"urls": "gpu:8000/v1"}}, "setting at llm.urls: 'gpu:8000/v1' is not the URL of a server"),
        ({"llm": {"urls": ["http://a/v1", "http://gpu:port/v1"]}}, "setting at llm.urls: 'http://gpu:port/v1'"),
        ({"llm": {"models": {"big": {"urls": "http:///v1"}}}}, "setting at llm.models.big.urls: 'http:///v1'"),
        ({"llm": {"models": {"default": {}}}}, "setting at llm.models.default: the default model is llm itself"),
    ],
)
def test_a_wrong_value_names_path_expected_and_found(plain: dict[str, Any], said: str) -> None:
    assert mistake(plain).startswith(said)


@pytest.mark.parametrize("plain", [{"ack_wait_s": float("inf")}, {"workflow": {"x": float("inf")}}])
def test_what_cannot_be_stored_is_refused(plain: dict[str, Any]) -> None:
    mistake(plain)


@settings(deadline=None, max_examples=50)
@given(
    st.builds(
        dict,
        trials=st.integers(1, 9),
        seed=st.integers(-(2**31), 2**31),
        ack_wait_s=st.floats(1, 86_400),
        workflow=st.dictionaries(st.sampled_from("abc"), st.integers() | st.booleans(), max_size=3),
    )
)
def test_a_stored_config_is_the_same(plain: dict[str, Any]) -> None:
    config = parse_run(plain)
    assert msgspec.json.decode(msgspec.json.encode(config), type=RunConfig) == config


def test_parse_puts_the_given_path_in_front() -> None:
    with pytest.raises(ConfigError, match=r"^setting at chat\.top_p: Expected `float` <= 1.0, in 2$"):
        parse({"top_p": 2}, Sampling, at="chat")
    with pytest.raises(ConfigError, match=r"^setting at chat: Object contains unknown field `topp`; did you mean"):
        parse({"topp": 2}, Sampling, at="chat")


# --- sampling -----------------------------------------------------------------------------------------------


def test_over_takes_what_is_unset_from_below() -> None:
    call = Sampling(temperature=0.0)
    role = Sampling(temperature=0.9, max_tokens=10, stop=[])
    shared = Sampling(temperature=0.5, max_tokens=99, stop=["x"], seed=7, extra={"top_k": 1})
    assert call.over(role).over(shared) == Sampling(temperature=0.0, max_tokens=10, stop=[], seed=7, extra={"top_k": 1})
    assert call == Sampling(temperature=0.0)


def test_over_nothing_and_nothing_over() -> None:
    some = Sampling(top_p=0.5, extra={"a": 1})
    assert Sampling().over(some) == some
    assert some.over(Sampling()) == some


samplings = st.builds(
    Sampling,
    temperature=st.none() | st.floats(0, 2),
    top_p=st.none() | st.floats(0.1, 1),
    max_tokens=st.none() | st.integers(1, 9),
    seed=st.none() | st.integers(0, 9),
    stop=st.none() | st.just(["x"]),
)


@settings(deadline=None)
@given(samplings, samplings, samplings)
def test_over_is_associative(a: Sampling, b: Sampling, c: Sampling) -> None:
    assert a.over(b).over(c) == a.over(b.over(c))


def test_unset_parameters_are_not_sent() -> None:
    assert msgspec.json.encode(Sampling(top_p=0.5)) == b'{"top_p":0.5}'


# --- frozen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("struct", [Sampling(), ModelConfig(), LlmConfig(), RoleConfig(), RunConfig()])
def test_settings_do_not_change(struct: msgspec.Struct) -> None:
    for name in struct.__struct_fields__:
        with pytest.raises(AttributeError, match="immutable"):
            setattr(struct, name, None)


def test_two_configs_share_no_dictionaries() -> None:
    RunConfig().workflow["x"] = 1
    RunConfig().llm.models["x"] = ModelConfig()
    assert RunConfig().workflow == {}
    assert RunConfig().llm.models == {}
