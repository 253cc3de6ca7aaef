"""What a user writes: workflows, roles, what is refused in them, where they are found, what a handler sees."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

import matrix_bus as mb
from matrix_bus import LLM, Next, Outcome, Row, Sampling, State, Workflow, failed, filtered, success, to
from matrix_bus.agent import installed_workflows, load_workflow
from matrix_bus.agent.routes import Routes
from matrix_bus.errors import ConfigError, RowError, WorkflowError
from matrix_bus.orchestrator import ErrorRecord, RowMessage, admit, advance, finish, retry


class Draft(State):
    topic: str
    text: str = ""
    score: float | None = None
    more: Any = None


class Settings(msgspec.Struct):
    max_turns: int = 3


async def writer(row: Row[Draft], llm: LLM) -> Next | Outcome:
    return to("judge")


async def judge(row: Row[Draft], config: Settings) -> Next | Outcome:
    return success() if row.turn > config.max_turns else mb.to("writer")


def flow(*handlers: Callable[..., Any], start: str = "writer", **more: Any) -> Workflow[Draft]:
    made = Workflow("draft", state=Draft, start=start, config=Settings, **more)
    for handler in handlers:
        made.role(handler)
    return made


# --- declaring ----------------------------------------------------------------------------------------------


def test_decisions() -> None:
    assert to("judge") == Next("judge")
    assert success() == Outcome("success", "")
    assert success("good") == Outcome("success", "good")
    assert filtered("short") == Outcome("filtered", "short")
    assert failed("odd") == Outcome("failed", "odd")


def test_roles_are_named_by_their_functions() -> None:
    made = flow(writer, judge)
    assert list(made.roles) == ["writer", "judge"]
    assert made.roles["writer"].handler is writer, "the function itself stays what it was"
    assert (made.roles["writer"].model, made.roles["writer"].sampling) == ("default", Sampling())
    assert made.roles["writer"].mode == "async"
    assert made.roles["writer"].routes.roles == ("judge",)
    assert made.roles["writer"].wants_model
    assert not made.roles["judge"].wants_model
    assert made.roles["judge"].parameters == (("config", Settings),)
    assert made.roles["judge"].routes.roles == ("writer",)
    made.check()


def test_a_role_with_options() -> None:
    made = flow()

    @made.role(name="writer", model="big", sampling=Sampling(temperature=0.5), process=True)
    def burn(row: Row[Draft]) -> Outcome:
        return success()

    role = made.roles["writer"]
    assert (role.name, role.model, role.sampling) == ("writer", "big", Sampling(temperature=0.5))
    assert (role.mode, role.handler) == ("process", burn)


def test_a_plain_def_runs_in_a_thread() -> None:
    def writer(row: Row[Draft]) -> Outcome:
        return success()

    assert flow(writer).roles["writer"].mode == "thread"


def test_quick_settings_have_a_default_that_can_be_replaced() -> None:
    assert flow().quick == {"max_in_flight": 4}
    assert flow(quick={"trials": 1, "max_in_flight": 2}).quick == {"max_in_flight": 2, "trials": 1}


@pytest.mark.parametrize("name", ["", "a b", "a.b", "x" * 65, "ü"])
def test_a_workflow_has_a_name_that_fits_in_a_subject(name: str) -> None:
    with pytest.raises(WorkflowError, match="must be 1 to 64 of"):
        Workflow(name, state=Draft, start="writer")


@pytest.mark.parametrize("name", ["_", "a.b", "a b"])
def test_a_role_has_a_name_that_fits_in_a_subject(name: str) -> None:
    with pytest.raises(WorkflowError, match="must be 1 to 64 of"):
        flow().role(name=name)(writer)


def test_two_roles_of_one_name() -> None:
    made = flow(writer)
    with pytest.raises(WorkflowError, match="'draft' has two roles named 'writer'"):
        made.role(writer)


def test_a_process_handler_is_no_coroutine() -> None:
    with pytest.raises(WorkflowError, match="a process handler must be a plain def"):
        flow().role(process=True)(writer)


# --- check --------------------------------------------------------------------------------------------------


def refused(made: Workflow[Any]) -> str:
    with pytest.raises(WorkflowError) as caught:
        made.check()
    return str(caught.value)


def test_check_unknown_start() -> None:
    assert refused(flow(writer, judge, start="wirter")) == (
        "workflow 'draft' starts at 'wirter', its roles are judge, writer; did you mean 'writer'?"
    )
    assert refused(flow()).endswith("its roles are none")


def test_check_unknown_route() -> None:
    assert refused(flow(writer)) == "role 'writer' sends rows to 'judge', the roles are writer"


def test_check_missing_annotation() -> None:
    async def writer(row: Row[Draft], llm) -> Outcome:  # type: ignore[no-untyped-def]
        return success()

    assert refused(flow(writer)) == "role 'writer': parameter 'llm' needs a type, such as llm: LLM"


def test_check_annotation_that_nobody_defines() -> None:
    async def writer(row: Row[Draft], llm: Nowhere) -> Outcome:  # type: ignore[name-defined]  # noqa: F821
        return success()

    assert "name 'Nowhere' is not defined, in its annotations" in refused(flow(writer))


def test_check_type_that_nothing_provides() -> None:
    async def writer(row: Row[Draft], count: int) -> Outcome:
        return success()

    assert "asks for 'count' of type <class 'int'>, which nothing provides" in refused(flow(writer))


def test_check_handler_without_row() -> None:
    async def writer() -> Outcome:
        return success()

    assert refused(flow(writer)) == "role 'writer': the handler must take the row as its first parameter"


@pytest.mark.parametrize("process", [False, True])
def test_check_plain_def_with_model(process: bool) -> None:
    def writer(row: Row[Draft], llm: LLM) -> Outcome:
        return success()

    made = flow()
    made.role(process=process)(writer)
    assert "is a plain def, which cannot await 'llm': make it async def" in refused(made)


def test_routes_that_are_not_literal_are_left_to_the_run() -> None:
    async def writer(row: Row[Draft]) -> Next:
        return to(row.state.text)

    made = flow(writer)
    assert made.roles["writer"].routes == Routes(complete=False)
    made.check()


def test_a_method_named_to_is_no_route() -> None:
    async def writer(row: Row[Draft]) -> Outcome:
        row.state.more.to("cuda")
        return success()

    flow(writer).check()


def test_a_handler_without_source_has_no_routes() -> None:
    scope: dict[str, Any] = {}
    exec("async def writer(row): return to('nobody')", scope)
    flow(scope["writer"]).check()


def test_a_callable_that_is_no_function_is_refused() -> None:
    with pytest.raises(WorkflowError, match="must be a function, not partial"):
        flow(writer).role(name="judge")(functools.partial(judge))


# --- rows and state -----------------------------------------------------------------------------------------


def rows(n: int = 7, trials: int = 2) -> Row[Draft]:
    line = b'{"topic":"cats","k":1}'
    made = flow(writer, judge)
    message = admit(RowMessage(msgspec.Raw(line), "a", 42, 1.0), "r1", n, "writer", b"", 2.0)
    return Row(message, made.begin(line), trials)


async def test_what_a_handler_sees_of_its_row() -> None:
    row = rows()
    assert (row.run, row.id, row.number, row.line, row.trial) == ("r1", "a", 7, 3, 1)
    assert (row.hop, row.attempt, row.turn, row.seed) == (1, 1, 1, 42)
    assert row.state == Draft(topic="cats")
    assert await row.input() == {"topic": "cats", "k": 1}
    assert await row.history() == []


def test_turn_counts_visits_of_this_role() -> None:
    message = rows()._message
    for hop, (role, turn) in enumerate([("judge", 1), ("writer", 2), ("judge", 2)], start=2):
        message = advance(message, role)
        row = Row(message, Draft(topic="cats"))
        assert (row.hop, row.turn, row.attempt) == (hop, turn, 1)
    again = Row(retry(message, ErrorRecord("E", "", "judge", 4, 1, 0.0), 0.0), Draft(topic="cats"))
    assert (again.turn, again.hop, again.attempt) == (2, 4, 2)


def test_the_generator_of_a_row_repeats_itself() -> None:
    def drawn(row: Row[Draft]) -> list[float]:
        rng = row.rng
        return [rng.random() for _ in range(3)]

    first = rows()._message
    again = retry(first, ErrorRecord("E", "", "writer", 1, 1, 0.0), 0.0)
    following = advance(first, "judge")
    other = msgspec.structs.replace(first, seed=43)
    state = Draft(topic="cats")
    assert drawn(Row(first, state)) == drawn(Row(first, state)) == drawn(Row(again, state))
    distinct = [drawn(Row(message, state)) for message in (first, following, other)]
    assert all(a != b for a, b in itertools.combinations(distinct, 2))
    assert len(set(distinct[0])) == 3


async def test_history_is_decoded() -> None:
    message = msgspec.structs.replace(rows()._message, history=[b'{"role":"writer"}'])
    assert await Row(message, Draft(topic="cats")).history() == [{"role": "writer"}]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{}", "missing required field `topic`"),
        (b'{"topic":1}', r"Expected `str`, got `int` - at `\$.topic`"),
        (b"[1]", "Expected `object`, got `array`"),
        (b'{"topic":"x"', "truncated"),
        (b'{"topic":"\xff"}', "utf-8"),
        (b"", "truncated"),
    ],
)
def test_a_line_that_does_not_fit(line: bytes, why: str) -> None:
    with pytest.raises(RowError, match=f"the input does not fit workflow 'draft': .*{why}"):
        flow().begin(line)


def test_a_line_that_is_nested_too_deeply() -> None:
    with pytest.raises(RowError):
        flow().begin(b'{"topic":"x","more":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def test_state_survives_its_wire_form() -> None:
    state = Draft(topic="cats", text="ü", score=0.5, more={"a": [1]})
    assert flow().decode_state(msgspec.json.encode(state)) == state


# --- parameters and metrics ---------------------------------------------------------------------------------


def test_parameters() -> None:
    assert flow().parse_config({}) == Settings()
    assert flow().parse_config({"max_turns": 5}) == Settings(5)
    with pytest.raises(ConfigError, match=r"^setting at workflow\.max_turns: Expected `int`, got `str`"):
        flow().parse_config({"max_turns": "five"})


def test_a_workflow_without_parameters_takes_none() -> None:
    plain = Workflow("plain", state=Draft, start="writer")
    assert plain.parse_config({}) is None
    with pytest.raises(ConfigError, match="workflow 'plain' has no parameters, got max_turns, x"):
        plain.parse_config({"max_turns": 1, "x": 2})


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_turnz.*did you mean 'max_turns'"):
        flow().parse_config({"max_turnz": 5})


def test_metrics_are_of_final_state_and_input() -> None:
    made = flow()
    message = msgspec.structs.replace(rows()._message, state=b'{"topic":"cats","score":0.5}')
    record = finish(message, "draft", 1, "success", "", 1.0)
    assert made.measure(record) == {}

    @made.metrics
    def numbers(state: Draft, given: Any) -> Mapping[str, float]:
        return {"score": state.score or 0.0, "k": given["k"]}

    assert made.measure(record) == {"score": 0.5, "k": 1}
    assert made.measure(msgspec.structs.replace(record, state=msgspec.Raw(b"null"))) == {}
    assert numbers(Draft(topic="x"), {"k": 2}) == {"score": 0.0, "k": 2}


# --- finding workflows --------------------------------------------------------------------------------------

SOURCE = """
import matrix_bus as mb

class Draft(mb.State):
    topic: str

flow = mb.Workflow("found", state=Draft, start="writer")

@flow.role
async def writer(row: mb.Row[Draft]) -> mb.Outcome:
    return mb.success("one")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "my_flow.py"
    path.write_text(SOURCE)
    return path


def said(found: Workflow[Any]) -> str:
    """What the handler in the source answers."""
    outcome = asyncio.run(found.roles["writer"].handler(None))
    assert isinstance(outcome, Outcome)
    return outcome.reason


def unloadable(spec: str) -> WorkflowError:
    with pytest.raises(WorkflowError) as caught:
        load_workflow(spec)
    return caught.value


def test_a_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    found = load_workflow("my_flow.py")
    assert found.name == "found"
    assert found.spec == str(source), "another process may be started elsewhere"
    assert found.code_hash == hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    assert load_workflow(str(source)) is found
    assert said(found) == "one"


def test_the_hash_is_that_of_the_source(tmp_path: Path) -> None:
    hashes = []
    for number, text in enumerate([SOURCE, SOURCE, SOURCE.replace("one", "two")]):
        path = tmp_path / f"flow_{number}.py"
        path.write_text(text)
        hashes.append(load_workflow(str(path)).code_hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_hash_is_that_of_the_code_that_runs(source: Path) -> None:
    before = load_workflow(str(source))
    code, reason = before.code_hash, said(before)
    source.write_text(SOURCE.replace("one", "two"))
    after = load_workflow(str(source))
    assert (after.code_hash == code) == (said(after) == reason)


def test_module_and_attribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "flows_of_a_package"
    package.mkdir()
    (package / "__init__.py").write_text(SOURCE)
    (package / "prompts.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = load_workflow("flows_of_a_package:flow")
    assert (found.name, found.spec) == ("found", "flows_of_a_package:flow")
    before = found.code_hash
    (package / "prompts.py").write_text("TEXT = 'x'")
    found.code_hash = ""
    assert load_workflow("flows_of_a_package:flow").code_hash != before, "all files of the package count"
    assert str(unloadable("flows_of_a_package:Draft")) == (
        "flows_of_a_package:Draft is not a Workflow; flows_of_a_package has flow"
    )
    assert str(unloadable("flows_of_a_package:nothing")).startswith("flows_of_a_package:nothing is not a Workflow")


def test_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flow_with_entry_point.py").write_text(SOURCE)
    info = tmp_path / "flow_with_entry_point-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flow-with-entry-point\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[matrix_bus.workflows]\nsketch = flow_with_entry_point:flow\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "sketch" in installed_workflows()
    found = load_workflow("sketch")
    assert (found.name, found.spec) == ("found", "sketch")
    assert str(unloadable("sketsch")) == "no workflow named 'sketsch': did you mean 'sketch'?"
    there = str(unloadable("other"))
    assert there.startswith("no workflow named 'other': installed are ") and "sketch" in there
    assert there.endswith("a file is given with its .py ending")
    monkeypatch.chdir(tmp_path)
    assert str(unloadable("flow_with_entry_point")).endswith(
        "a file is given with its ending: flow_with_entry_point.py"
    )


def test_nothing_there(tmp_path: Path) -> None:
    assert str(unloadable(str(tmp_path / "x.py"))) == f"no such workflow file: {tmp_path / 'x.py'}"
    assert str(unloadable(str(tmp_path))).startswith(f"no workflow named '{tmp_path}'")
    gone = unloadable("no_such_module_here:flow")
    assert str(gone).startswith("workflow 'no_such_module_here:flow' cannot be imported: ModuleNotFoundError")
    assert isinstance(gone.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("import no_such_module_here", ImportError), ("def", SyntaxError), ("1 / 0", ZeroDivisionError)],
)
def test_a_broken_file_tells_its_own_error(tmp_path: Path, text: str, kind: type[Exception]) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    for _ in range(2):
        error = unloadable(str(path))
        assert str(error).startswith(f"{path} cannot be loaded: ")
        assert isinstance(error.__cause__, kind)
    path.write_text(SOURCE)
    assert load_workflow(str(path)).name == "found", "nothing of the broken one is left"
    assert sum(path.as_posix() in str(getattr(m, "__file__", "")) for m in list(sys.modules.values())) == 1


def test_a_file_defines_one_workflow(tmp_path: Path) -> None:
    none, two = tmp_path / "none.py", tmp_path / "two.py"
    none.write_text("x = 1")
    two.write_text(SOURCE + "\nother = mb.Workflow('other', state=Draft, start='writer')\n")
    assert str(unloadable(str(none))) == f"{none} must define one Workflow, it defines 0"
    assert str(unloadable(str(two))) == f"{two} must define one Workflow, it defines 2: choose with {two}:flow"
    other = load_workflow(f"{two}:flow")
    assert (other.name, other.spec) == ("found", f"{two}:flow")
    assert str(unloadable(f"{two}:Draft")) == f"{two}:Draft is not a Workflow; {two} has flow, other"


def test_a_file_beside_it_can_be_imported_and_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "prompts_beside_the_flow.py").write_text("TEXT = 'x'\n")
    (tmp_path / "uses_prompts.py").write_text("from prompts_beside_the_flow import TEXT\n" + SOURCE)
    assert load_workflow(str(tmp_path / "uses_prompts.py")).name == "found"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("flow_in_current_folder.py").write_text(SOURCE)
    assert load_workflow("flow_in_current_folder:flow").spec == "flow_in_current_folder:flow"


def test_a_script_that_exits(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("raise SystemExit(3)")
    assert "it exits when imported" in str(unloadable(str(path)))


def test_a_file_of_nearly_that_name(source: Path) -> None:
    assert str(unloadable(str(source.with_name("myflow.py")))).endswith("myflow.py; did you mean my_flow.py?")


def test_what_is_loaded_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "odd.py"
    path.write_text(SOURCE.replace('start="writer"', 'start="nobody"'))
    assert "starts at 'nobody'" in str(unloadable(str(path)))
