"""Settings: how they are composed, what they default to, and what a mistake is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matrix_bus.config import LlmConfig, ModelConfig, RoleConfig, RunConfig, Sampling, compose, parse
from matrix_bus.errors import ConfigError, UsageError


def mistake(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(words)
    return str(caught.value)


# --- composing ----------------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = compose()
    assert config == RunConfig()
    assert (config.max_in_flight, config.trials, config.seed, config.ack_wait_s) == (10_000, 1, 0, 30.0)
    assert config.workflow == {}
    assert config.llm.models == {"default": ModelConfig()}
    assert config.llm.sampling == Sampling()
    model = config.llm.models["default"]
    assert (model.urls, model.transport, model.api_key_env) == ([], "direct", "")
    assert (model.concurrency, model.timeout_s) == (64, 600.0)
    assert config.role("anything") == RoleConfig()
    assert (RoleConfig().model, RoleConfig().max_attempts, RoleConfig().timeout_s) == (None, 5, 3600.0)


def test_overrides_are_dotted_and_have_yaml_values() -> None:
    config = compose(
        [
            "trials=3",
            "llm.sampling.temperature=0.5",
            "llm.sampling.stop=[END, '\\n']",
            "llm.models.default.urls=[http://a:1/v1,http://b:2/v1]",
            "llm.models.big.name=large",
            "roles.judge.model=big",
            "roles.judge.sampling={max_tokens: 5, extra: {top_k: 3}}",
            "workflow.max_turns=4",
            "workflow.words=[a,b]",
            "ack_wait_s=2",
        ]
    )
    assert (config.trials, config.ack_wait_s) == (3, 2.0)
    assert config.llm.sampling == Sampling(temperature=0.5, stop=["END", "\\n"])
    assert config.llm.models == {
        "default": ModelConfig(urls=["http://a:1/v1", "http://b:2/v1"]),
        "big": ModelConfig(name="large"),
    }
    assert config.role("judge") == RoleConfig(model="big", sampling=Sampling(max_tokens=5, extra={"top_k": 3}))
    assert config.workflow == {"max_turns": 4, "words": ["a", "b"]}


def test_the_default_model_stays_when_another_is_added() -> None:
    assert sorted(compose(["llm.models.big.name=large"]).llm.models) == ["big", "default"]


def test_overrides_lie_over_the_base_and_the_last_one_wins() -> None:
    base = {"trials": 2, "seed": 1, "workflow": {"a": 1, "b": 2}, "llm": {"sampling": {"top_p": 0.5}}}
    config = compose(["trials=3", "workflow.b=5", "llm.sampling.temperature=1", "trials=4"], base)
    assert (config.trials, config.seed) == (4, 1)
    assert config.workflow == {"a": 1, "b": 5}
    assert config.llm.sampling == Sampling(top_p=0.5, temperature=1.0)
    assert base["workflow"] == {"a": 1, "b": 2}, "the base is not changed"


def test_a_value_may_refer_to_another() -> None:
    assert compose(["seed=5", "workflow.seed=${seed}"]).workflow == {"seed": 5}


# --- mistakes -----------------------------------------------------------------------------------------------


def test_a_config_error_is_the_users() -> None:
    assert issubclass(ConfigError, UsageError)


@pytest.mark.parametrize(
    ("word", "path", "unknown", "near"),
    [
        ("seeed=1", "the top level", "seeed", "seed"),
        ("max_inflight=5", "the top level", "max_inflight", "max_in_flight"),
        ("llm.sampling.temprature=1", "llm.sampling", "temprature", "temperature"),
        ("llm.samplin.top_p=1", "llm", "samplin", "sampling"),
        ("roles.judge.timout_s=1", "roles", "timout_s", "timeout_s"),
        ("llm.models.default.ulrs=[a]", "llm.models", "ulrs", "urls"),
    ],
)
def test_an_unknown_key_names_path_and_nearest_name(word: str, path: str, unknown: str, near: str) -> None:
    said = mistake(word)
    assert said.startswith(f"setting at {path}")
    assert said.endswith(f"unknown field `{unknown}`; did you mean {near!r}?")


def test_an_unknown_key_that_is_near_to_nothing_has_no_hint() -> None:
    assert "did you mean" not in mistake("xyzzy=1")


def test_the_nearest_name_is_one_that_fits_there() -> None:
    assert mistake("llm.model.default.name=x").endswith("did you mean 'models'?")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trials=many", "setting at trials: Expected `int`, got `str`"),
        ("seed=true", "setting at seed: Expected `int`, got `bool`"),
        ("seed='1'", "setting at seed: Expected `int`, got `str`"),
        ("seed=1.5", "setting at seed: Expected `int`, got `float`"),
        ("seed=", "setting at seed: Expected `int`, got `null`"),
        ("llm=5", "setting at llm: Expected `object`, got `int`"),
        ("llm.sampling.temperature=warm", "setting at llm.sampling.temperature: Expected `float | null`"),
        ("llm.sampling.stop=[1]", "setting at llm.sampling.stop[0]: Expected `str`, got `int`"),
        ("workflow=5", "setting at workflow: Expected `object`, got `int`"),
        ("llm.models=null", "setting at llm.models: Expected `object`, got `null`"),
    ],
)
def test_a_wrong_type_names_path_expected_and_found(word: str, said: str) -> None:
    assert mistake(word).startswith(said)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trials=0", "setting at trials: Expected `int` >= 1"),
        ("max_in_flight=0", "setting at max_in_flight: Expected `int` >= 1"),
        ("max_in_flight=1000001", "setting at max_in_flight: Expected `int` <= 1000000"),
        ("ack_wait_s=0.5", "setting at ack_wait_s: Expected `float` >= 1.0"),
        ("ack_wait_s=.nan", "setting at ack_wait_s: Expected `float` >= 1.0"),
        ("llm.sampling.temperature=-0.1", "setting at llm.sampling.temperature: Expected `float` >= 0.0"),
        ("llm.sampling.top_p=0", "setting at llm.sampling.top_p: Expected `float` > 0.0"),
        ("llm.sampling.top_p=1.1", "setting at llm.sampling.top_p: Expected `float` <= 1.0"),
        ("llm.sampling.max_tokens=0", "setting at llm.sampling.max_tokens: Expected `int` >= 1"),
    ],
)
def test_a_value_out_of_range_names_path_and_range(word: str, said: str) -> None:
    assert mistake(word).startswith(f"{said}, in {word.split('=')[1].strip('.')[:3]}")


@pytest.mark.parametrize(
    "word",
    [
        "roles.judge.max_attempts=0",
        "roles.judge.timeout_s=0",
        "llm.models.big.concurrency=0",
        "llm.models.big.timeout_s=-1",
        "llm.models.big.transport=pigeon",
        "llm.models.big.urls=http://a",
    ],
)
def test_settings_of_roles_and_models_are_checked(word: str) -> None:
    assert word.split("=")[0].split(".")[-1] in mistake(word)


@pytest.mark.parametrize("word", ["roles.judge.max_attempts=0", "llm.models.big.ulrs=[a]", "roles.judge=5"])
def test_the_path_names_the_role_or_the_model(word: str) -> None:
    assert ("judge" if "judge" in word else "big") in mistake(word)


@pytest.mark.parametrize("word", ["trials", "--trials", ""])
def test_a_word_without_equals_says_how_it_must_look(word: str) -> None:
    assert mistake(word) == (f"{word!r} is not of the form key=value, as in llm.sampling.temperature=0.5")


def test_a_reference_to_nothing() -> None:
    assert "seed=${nothing}" in mistake("seed=${nothing}")


@pytest.mark.parametrize("word", ["seed=[1", "workflow.x=\x00", "workflow.x=!!python/object:os.system 1"])
def test_a_value_that_is_no_yaml(word: str) -> None:
    assert word.split("=")[0] in mistake(word)


@pytest.mark.parametrize(
    "word",
    [
        "ack_wait_s=.inf",
        "roles.judge.timeout_s=.inf",
        "llm.models.default.timeout_s=.inf",
        "llm.sampling.temperature=.inf",
        "workflow.x=.inf",
    ],
)
def test_what_is_accepted_can_be_stored(word: str) -> None:
    try:
        config = compose([word])
    except ConfigError:
        return
    assert msgspec.json.decode(msgspec.json.encode(config), type=RunConfig) == config


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
    config = parse(plain, RunConfig)
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
    assert list(RunConfig().llm.models) == ["default"]
