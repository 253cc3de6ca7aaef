"""Composing: layers, groups, files and words, and that nobody sees Hydra's own errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from matrix_bus import Outcome, Row, State, Workflow, success
from matrix_bus.compose import Composed, compose, is_override
from matrix_bus.config import ModelConfig, RoleConfig, RunConfig
from matrix_bus.errors import ConfigError, WorkflowError


class Draft(State):
    topic: str = ""


class Parameters(msgspec.Struct):
    topic: str
    max_turns: int = 20
    words: list[str] = msgspec.field(default_factory=lambda: ["a"])


flow = Workflow(
    "draft", state=Draft, start="writer", config=Parameters, quick={"workflow.max_turns": 2, "roles.judge.top_p": 0.5}
)


@flow.role
async def writer(row: Row[Draft]) -> Outcome:
    return success()


@flow.role
async def judge(row: Row[Draft]) -> Outcome:
    return success()


def composed(*words: str, **more: Any) -> Composed:
    return compose(flow, words, **more)


def mistake(*words: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        composed(*words, **more)
    said = str(caught.value)
    for theirs in ("hydra", "Hydra", "omegaconf", "struct", "To append", "multirun"):
        assert theirs not in said
    return said


# --- words ----------------------------------------------------------------------------------------------------------


def test_no_words_are_the_defaults() -> None:
    found = composed()
    assert found.config == RunConfig()
    assert found.tree["workflow"] == {"max_turns": 20, "words": ["a"]}
    assert found.tree["roles"]["judge"]["max_attempts"] == 5
    assert set(found.origins.values()) == {"workflow draft"}


def test_words_are_dotted_and_have_values_of_their_types() -> None:
    config = composed(
        "trials=3",
        "llm.temperature=0.5",
        "llm.stop=[END, '\\n']",
        "llm.urls=[http://a:1/v1,http://b:2/v1]",
        "llm.model=meta-llama/Llama-3.1-8B-Instruct",
        "llm.models.big.model=large",
        "llm.models.big.urls=http://127.0.0.1:8000/v1",
        "roles.judge.model=big",
        "roles.judge={max_tokens: 5, extra: {top_k: 3}}",
        "roles.writer.slots=8",
        "workflow.max_turns=4",
        "++workflow.words=[a,b]",
        "+ack_wait_s=2",
    ).config
    assert (config.trials, config.ack_wait_s) == (3, 2.0)
    assert (config.llm.temperature, config.llm.stop) == (0.5, ["END", "\\n"])
    assert (config.llm.model, config.llm.urls) == (
        "meta-llama/Llama-3.1-8B-Instruct",
        ["http://a:1/v1", "http://b:2/v1"],
    )
    assert config.llm.models == {"big": ModelConfig(model="large", urls=["http://127.0.0.1:8000/v1"])}
    assert config.roles == {
        "judge": RoleConfig(model="big", max_tokens=5, extra={"top_k": 3}),
        "writer": RoleConfig(slots=8),
    }
    assert config.workflow == {"max_turns": 4, "words": ["a", "b"]}


def test_a_stop_sequence_may_be_a_line_end() -> None:
    assert composed('llm.stop=["\n"]').config.llm.stop == ["\n"]


def test_the_last_word_wins() -> None:
    assert composed("trials=3", "trials=4").config.trials == 4


def test_a_word_may_take_a_setting_away() -> None:
    assert composed("llm=openai", "~llm.api_key_env").config.llm.api_key_env == ""
    assert "there is no setting llm.nothing" in mistake("~llm.nothing")


def test_a_value_may_refer_to_another() -> None:
    assert composed("seed=5", "trials=${seed}").config.trials == 5
    assert "'nothing' not found" in mistake("seed=${nothing}")


def test_what_has_its_default_is_not_stored() -> None:
    assert composed("workflow.max_turns=20", "roles.judge={}").config == RunConfig()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trials=3", True),
        ("+a.b=3", True),
        ("++llm.models.x-y.model=3", False),
        ("~llm.stop", True),
        ("llm@other=vllm", True),
        ("a/b=c", False),
        ("./a=b.jsonl", False),
        ("~/data.jsonl", False),
        ("data.jsonl", False),
        ("-", False),
        ("/data/a-b=c.jsonl", False),
        ("", False),
    ],
)
def test_what_is_an_override(word: str, expected: bool) -> None:
    assert is_override(word) is expected


# --- groups and files -----------------------------------------------------------------------------------------------


def test_an_option_of_a_group() -> None:
    found = composed("llm=openai", "llm.model=gpt")
    assert (found.config.llm.transport, found.config.llm.api_key_env) == ("sdk", "OPENAI_API_KEY")
    assert found.origins["llm.transport"] == "llm/openai (of matrix-bus)"
    assert found.origins["llm.model"] == "command line"
    assert composed("llm=vllm").config.llm.urls == ["http://127.0.0.1:8000/v1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    conf = tmp_path / "my conf"
    for name, text in {
        "llm/mine.yaml": "model: own\nurls: [http://mine/v1]\ntemperature: 0.1\n",
        "roles/careful.yaml": "judge:\n  max_attempts: 9\n",
        "experiment/hot.yaml": "# @package _global_\nllm:\n  temperature: 2\ntrials: 7\n",
    }.items():
        (conf / name).parent.mkdir(parents=True, exist_ok=True)
        (conf / name).write_text(text)
    return conf


def test_options_of_the_users_own(folder: Path) -> None:
    found = composed("llm=mine", "roles=careful", "llm.top_p=0.5", config_dir=folder)
    assert (found.config.llm.model, found.config.llm.temperature, found.config.llm.top_p) == ("own", 0.1, 0.5)
    assert found.config.role("judge").max_attempts == 9
    assert found.origins["llm.model"] == f"llm/mine ({folder / 'llm' / 'mine.yaml'})"
    assert found.origins["roles.judge.max_attempts"].startswith("roles/careful")


@pytest.mark.parametrize("word", ["experiment=hot", "+experiment=hot"])
def test_a_group_of_the_users_own(folder: Path, word: str) -> None:
    config = composed("llm=mine", word, config_dir=folder).config
    assert (config.llm.model, config.llm.temperature, config.trials) == ("own", 2, 7)


def test_a_config_file_lies_between_groups_and_words(folder: Path) -> None:
    (folder / "config.yaml").write_text("defaults:\n- _self_\n- llm: mine\nllm:\n  model: filed\ntrials: 3\nseed: 1\n")
    found = composed("seed=2", config_dir=folder)
    assert (found.config.llm.model, found.config.llm.urls) == ("filed", ["http://mine/v1"])
    assert (found.config.trials, found.config.seed) == (3, 2)
    assert found.origins["trials"] == str(folder / "config.yaml")
    assert composed("llm=vllm", config_dir=folder).config.llm.urls == ["http://127.0.0.1:8000/v1"]


def test_quick_settings_lie_under_the_words() -> None:
    found = composed(quick=True)
    assert (found.config.workflow, found.config.role("judge").top_p) == ({"max_turns": 2}, 0.5)
    assert found.config.max_in_flight == 4
    assert "quick" in found.origins["workflow.max_turns"]
    assert composed("workflow.max_turns=9", quick=True).config.workflow == {"max_turns": 9}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "cannot be read"),
        ("- 1", "must hold settings by their names"),
        ("defaults: [5]", "an entry of defaults"),
        ("llm:\n  temprature: 1", "did you mean 'temperature'?"),
        ("llm:\n  api_key_env: ${oc.env:HOME}", "give the name of an environment variable"),
    ],
)
def test_a_config_file_that_is_wrong(folder: Path, text: str, said: str) -> None:
    (folder / "config.yaml").write_text(text)
    assert said in mistake(config_dir=folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "is not a folder" in mistake(config_dir=tmp_path / "none")


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seeed=1", "did you mean 'seed'?"),
        ("+seeed=1", "did you mean 'seed'?"),
        ("llm.temprature=1", "did you mean 'temperature'?"),
        ("roles.judge.timout_s=1", "setting at roles.judge"),
        ("llm=nope", "llm has no option 'nope', there are: embedded, openai, vllm"),
        ("broker=nope", "broker has no option 'nope', there are: none"),
        ("llm=5", "setting at llm: Expected `object`"),
        ("seed=", "setting at seed: Expected `int`, got `str`"),
        ("seed.x=1", "setting at seed"),
        ("trials=1,2", "several values, and a run takes one"),
        ("trials=range(1,3)", "several values"),
        ("seed=[1", "cannot be read"),
        ("ack_wait_s=inf", "ack_wait_s"),
        ("workflow.x=nan", "cannot be stored"),
        ("trials", "is not of the form key=value"),
        ("llm.api_key_env=${oc.env:HOME}", "give the name of an environment variable"),
        ("llm.model=a${ oc.decode:x }b", "would be looked up"),
        ("llm.models.x.urls=[${oc.env:SECRET}]", "would be looked up"),
    ],
)
def test_a_mistake_says_where_and_what_to_do(word: str, said: str) -> None:
    assert said in mistake(word)


def test_nothing_of_the_environment_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THIS_TEST", "hush")
    with pytest.raises(ConfigError) as caught:
        composed("llm.model=${oc.env:SECRET_OF_THIS_TEST}")
    assert "hush" not in str(caught.value)
    assert os.environ["SECRET_OF_THIS_TEST"] == "hush"


def test_composing_twice_is_composing_once() -> None:
    assert composed("llm=vllm", "trials=2").config == composed("llm=vllm", "trials=2").config
    other = Workflow("other", state=Draft, start="writer")
    with pytest.raises(WorkflowError):
        other.check()
    assert compose(other).tree["roles"] == {}
    assert sorted(composed().tree["roles"]) == ["judge", "writer"]


def test_a_password_is_not_shown() -> None:
    found = composed("broker.url=nats://me:hush@host:4222")
    assert found.config.broker.url == "nats://me:hush@host:4222"
    assert found.tree["broker"]["url"] == "nats://host:4222"
