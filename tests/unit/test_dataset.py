"""Files in and out: lines of a dataset, and an output that is whole after a crash at any byte."""

from __future__ import annotations

import io
import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from matrix_bus import dataset
from matrix_bus.dataset import (
    Line,
    Output,
    Rejected,
    difference,
    fingerprint,
    identity,
    read,
    write_atomically,
    write_json,
)
from matrix_bus.errors import DatasetError

COMPRESS = zstandard.ZstdCompressor().compress


def written(folder: Path, body: bytes, name: str = "in.jsonl") -> str:
    path = folder / name
    path.write_bytes(body)
    return str(path)


def lines_of(folder: Path, body: bytes, name: str = "in.jsonl") -> list[Line | Rejected]:
    return list(read(written(folder, body, name)))


# --- reading ------------------------------------------------------------------------------------------------


def test_lines_are_numbered_in_order(tmp_path: Path) -> None:
    assert lines_of(tmp_path, b'{"q":1}\n\n  \n{"q": 2} \r\n{"q":3}') == [
        Line(0, b'{"q":1}', "0"),
        Line(1, b'{"q": 2}', "1"),
        Line(2, b'{"q":3}', "2"),
    ]


def test_a_line_stays_as_it_is(tmp_path: Path) -> None:
    body = '{"b": 1.50,  "a":"ü\\u00fc", "b":2}'.encode()
    assert lines_of(tmp_path, body) == [Line(0, body, "0")]


@pytest.mark.parametrize(
    ("body", "identity"),
    [
        (b'{"id":"a"}', "a"),
        (b'{"id":17}', "17"),
        (b'{"x":1,"id":"\\u00fc"}', "ü"),
        (b'{"id":""}', ""),
    ],
)
def test_a_line_may_have_an_id(tmp_path: Path, body: bytes, identity: str) -> None:
    assert lines_of(tmp_path, body) == [Line(0, body, identity)]


def test_without_an_id_the_number_is_it(tmp_path: Path) -> None:
    found = lines_of(tmp_path, b'{"ID":"a"}\n{"x":{"id":"b"}}\n{"id":null}')
    assert [line.id for line in found if isinstance(line, Line)] == ["0", "1", "2"]


@pytest.mark.parametrize("body", [b'{"id":1.5}', b'{"id":true}', b'{"id":[1]}', b'{"id":{}}'])
def test_an_id_that_is_none_is_rejected(tmp_path: Path, body: bytes) -> None:
    [found] = lines_of(tmp_path, body)
    assert isinstance(found, Rejected)
    assert "$.id" in found.reason or "int | str" in found.reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"q":', "not a JSON object: Input data was truncated"),
        (b"hello", "not a JSON object: "),
        (b'{"q":1} x', "not a JSON object: "),
        (b'{"q":NaN}', "not a JSON object: "),
        (b"[1]", "not a JSON object: Expected `object`, got `array`"),
        (b"1", "not a JSON object: Expected `object`, got `int`"),
        (b"null", "not a JSON object: Expected `object`, got `null`"),
        (b'{"q":"\xff"}', "not UTF-8: invalid start byte at byte 6"),
        (b'{"q":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_a_bad_line_is_rejected_and_keeps_its_place(tmp_path: Path, body: bytes, reason: str) -> None:
    first, bad, last = lines_of(tmp_path, b'{"q":1}\n\n' + body + b'\n{"q":2}')
    assert first == Line(0, b'{"q":1}', "0")
    assert isinstance(bad, Rejected)
    assert bad.reason.startswith(reason)
    assert bad.line == 3, "as an editor counts"
    assert bad.text == body[:200].decode("utf-8", "replace")
    assert last == Line(2, b'{"q":2}', "2")


@settings(deadline=None, max_examples=60)
@given(body=st.binary(max_size=60))
def test_any_bytes_become_lines(body: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = lines_of(Path(folder), body)
        except DatasetError:
            assert not any(line.strip() for line in body.split(b"\n"))
            return
    assert [line.number for line in found if isinstance(line, Line)] == [
        at for at, line in enumerate(found) if isinstance(line, Line)
    ]


def test_a_line_that_is_too_long_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lines", "formats"):
        monkeypatch.setattr(f"matrix_bus.dataset.{module}.MAX_LINE_BYTES", 64)
    for size in (64, 65, 128, 129, 1000):
        head, long, tail = lines_of(tmp_path, b'{"q":1}\n{"q":"' + b"x" * (size - 8) + b'"}\n{"q":2}\n')
        assert isinstance(long, Rejected)
        assert (long.line, long.reason) == (2, "longer than 0 MiB")
        assert (head, tail) == (Line(0, b'{"q":1}', "0"), Line(2, b'{"q":2}', "2"))
    fits = b'{"q":"' + b"x" * (63 - 8) + b'"}'
    assert lines_of(tmp_path, fits + b"\n") == [Line(0, fits, "0")]


def test_compressed_lines(tmp_path: Path) -> None:
    body = b"".join(b'{"q":%d}\n' % q for q in range(1000))
    found = lines_of(tmp_path, COMPRESS(body), "in.jsonl.zst")
    assert found == lines_of(tmp_path, body)
    assert len(found) == 1000


def test_compressed_frames_may_split_a_line(tmp_path: Path) -> None:
    frames = COMPRESS(b'{"q":1}\n{"q"') + COMPRESS(b"") + COMPRESS(b':2}\n{"q":3}\n')
    found = lines_of(tmp_path, frames, "in.jsonl.zst")
    assert [line.body for line in found if isinstance(line, Line)] == [b'{"q":1}', b'{"q":2}', b'{"q":3}']


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"q":1}\n')))
    assert list(read("-")) == [Line(0, b'{"q":1}', "0")]


def unreadable(path: str) -> str:
    with pytest.raises(DatasetError) as caught:
        list(read(path))
    assert path in str(caught.value)
    return str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in unreadable(str(tmp_path / "nothing.jsonl"))
    (tmp_path / "folder").mkdir()
    assert "has no data file" in unreadable(str(tmp_path / "folder"))
    assert "no file matches" in unreadable(str(tmp_path / "folder" / "*.jsonl"))
    assert "has no rows: a dataset is one JSON object per line" in unreadable(written(tmp_path, b""))
    assert "has no rows" in unreadable(written(tmp_path, b" \n\n"))
    assert "cannot read" in unreadable(written(tmp_path, b'{"q":1}\n', "plain.zst"))
    assert "has no rows" in unreadable(written(tmp_path, b"", "empty.zst"))


@pytest.mark.parametrize("left", ["half", "all but one byte", "a second frame's head"])
def test_a_compressed_file_that_was_cut_off(tmp_path: Path, left: str) -> None:
    whole = COMPRESS(b"".join(b'{"q":"%s"}\n' % os.urandom(40).hex().encode() for _ in range(6000)))
    body = {"half": whole[: len(whole) // 2], "all but one byte": whole[:-1]}.get(left, whole + whole[:5])
    assert "cannot read" in unreadable(written(tmp_path, body, "cut.zst"))


# --- fingerprints -------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_size_beginning_and_end(tmp_path: Path) -> None:
    body = bytes(3 << 20)
    bodies = [body, body + b"\0", b"\1" + body[1:], body[:-1] + b"\1", b"", b"x"]
    found = [fingerprint(written(tmp_path, each), len(each)) for each in bodies]
    assert len(set(found)) == len(bodies)
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in found)
    assert fingerprint(written(tmp_path, body, "other"), len(body)) == found[0]


def test_a_dataset_that_cannot_be_read_has_no_identity(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DatasetError, match=r"cannot read|has no data file"):
            identity(str(path))


@pytest.mark.parametrize("size", [0, 1, 100, (1 << 20) - 1, (1 << 20) + 1, 3 << 20])
def test_a_dataset_may_grow_at_its_end_alone(tmp_path: Path, size: int) -> None:
    body = os.urandom(size)

    def known(now: bytes) -> str:
        return identity(written(tmp_path, now))

    was = known(body)
    assert difference(was, known(body)) == ""
    assert difference(was, known(body + b"more")) == ""
    if size:
        assert "are not what they were" in difference(was, known(bytes([body[0] ^ 1]) + body[1:] + b"more"))
        assert "are not what they were" in difference(was, known(bytes([body[0] ^ 1]) + body[1:]))
        assert f"had {size} bytes, now it has {size - 1}" in difference(was, known(body[:-1]))
    assert "now" in difference(was, identity(written(tmp_path, body, "other")))
    assert "given by a program" in difference("", was)
    assert difference("-", "-") == difference("", "") == ""


# --- writing ------------------------------------------------------------------------------------------------

BLOCKS = [[b'{"n":0}'], [b'{"n":1}', b'{"n":2}'], [b'{"n":3,"x":"' + b"y" * 300 + b'"}'], [b'{"n":4}']]
NAMES = ["out.jsonl", "out.jsonl.zst"]
each_name = pytest.mark.parametrize("name", NAMES)


def go_on(output: Output, stop: int | None = None) -> None:
    """Adds what is missing, flushing after each block; leaves after `stop` blocks as a crash would."""
    seq = 0
    for number, block in enumerate(BLOCKS):
        if number == stop:
            output.close()
            return
        for line in block:
            seq += 1
            if seq >= output.next_seq:
                output.add(line, seq)
        output.flush()
    output.finish()


def content(path: Path) -> bytes:
    body = path.read_bytes()
    if path.suffix != ".zst":
        return body
    return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body), read_across_frames=True).read()


def mark_of(path: Path) -> Path:
    return path.with_name(path.name + ".progress")


@each_name
def test_an_output_from_beginning_to_end(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new folder" / name
    output = Output(path, "r1")
    assert (output.next_seq, output.lines, output.kept) == (1, 0, None)
    output.add(BLOCKS[0][0], 5)
    assert path.read_bytes() == b"", "nothing before the flush"
    output.flush()
    assert (output.next_seq, output.lines) == (6, 1)
    assert content(path) == BLOCKS[0][0] + b"\n"
    output.add(BLOCKS[1][0], 6)
    output.finish()
    assert content(path) == BLOCKS[0][0] + b"\n" + BLOCKS[1][0] + b"\n"
    assert sorted(path.parent.iterdir()) == [path], "no mark is left, and no scratch file"


@each_name
def test_an_output_is_continued(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    go_on(Output(path, "r1"), stop=2)
    assert mark_of(path).exists()
    output = Output(path, "r1")
    assert (output.next_seq, output.lines, output.kept) == (4, 3, None)
    go_on(output)
    assert content(path) == b"".join(line + b"\n" for block in BLOCKS for line in block)


def test_what_was_added_and_not_flushed_comes_again(tmp_path: Path) -> None:
    output = Output(tmp_path / "out.jsonl", "r1")
    output.add(b"1", 1)
    output.flush()
    output.add(b"2", 2)
    output.close()
    again = Output(tmp_path / "out.jsonl", "r1")
    assert (again.next_seq, again.lines) == (2, 1)
    again.close()


@each_name
@settings(deadline=None, max_examples=40)
@given(data=st.data(), stop=st.integers(0, len(BLOCKS) - 1))
def test_a_crash_at_any_byte_leaves_no_trace(name: str, data: st.DataObject, stop: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, path = Path(folder) / f"whole-{name}", Path(folder) / name
        go_on(Output(whole, "r1"))
        go_on(Output(path, "r1"), stop=stop)
        size = path.stat().st_size
        at = data.draw(st.integers(0, size), label="cut off at")
        torn = data.draw(
            st.binary(max_size=40) | st.integers(0, 400).map(lambda more: whole.read_bytes()[size : size + more]),
            label="written after the last flush",
        )
        if at < size:
            os.truncate(path, at)
        else:
            with path.open("ab") as file:
                file.write(torn)
        output = Output(path, "r1")
        assert output.kept is None
        assert output.next_seq == (1 if at < size else 1 + sum(map(len, BLOCKS[:stop])))
        go_on(output)
        assert path.read_bytes() == whole.read_bytes()
        assert not mark_of(path).exists()


def test_a_file_that_vanished_is_repeated_from_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    go_on(Output(path, "r1"), stop=2)
    path.unlink()
    output = Output(path, "r1")
    assert (output.next_seq, output.lines, output.kept) == (1, 0, None)
    output.close()


@pytest.mark.parametrize("mark", [b"", b"{", b"[]", b'{"run":1}', b"null"])
def test_a_mark_that_cannot_be_read_counts_for_nothing(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "out.jsonl"
    go_on(Output(path, "r1"), stop=2)
    mark_of(path).write_bytes(mark)
    output = Output(path, "r1")
    assert (output.next_seq, output.lines) == (1, 0)
    go_on(output)
    assert content(path) == b"".join(line + b"\n" for block in BLOCKS for line in block)


def test_a_mark_that_is_no_text_counts_for_nothing(tmp_path: Path) -> None:
    written(tmp_path, b'{"run":"\xff","next_seq":1,"size_bytes":0,"lines":0}', "out.jsonl.progress")
    Output(tmp_path / "out.jsonl", "r1").close()


def test_finished_files_are_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for number, run in enumerate(["r1", "r2", "r2"]):
        output = Output(path, run)
        assert output.kept == (tmp_path / f"out.jsonl.{number}" if number else None)
        assert output.next_seq == 1
        output.add(b"%d" % number, 1)
        output.finish()
    assert [(tmp_path / f"out.jsonl{end}").read_bytes() for end in (".1", ".2", "")] == [b"0\n", b"1\n", b"2\n"]


def test_an_unfinished_file_of_another_run_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    go_on(Output(path, "r1"), stop=2)
    before = path.read_bytes()
    output = Output(path, "r2")
    output.close()
    assert (output.next_seq, path.read_bytes()) == (1, b"")
    assert output.kept is not None
    assert output.kept.read_bytes() == before


def test_an_empty_file_is_not_worth_keeping(tmp_path: Path) -> None:
    output = Output(Path(written(tmp_path, b"", "out.jsonl")), "r1")
    output.close()
    assert output.kept is None


def test_a_folder_is_not_moved(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(DatasetError):
        Output(folder, "r1").close()
    assert (folder / "precious").exists()


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        Output(Path(written(tmp_path, b"", "a file")) / "out.jsonl", "r1").close()


def test_a_disk_that_is_full_is_said_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output = Output(path, "r1")
    go_on(output, stop=1)
    output = Output(path, "r1")
    output.add(b"x" * 100_000, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(DatasetError, match="nothing is lost, collect again"):
            output.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    output._file.close()
    again = Output(path, "r1")
    assert (again.next_seq, again.lines) == (2, 1)
    go_on(again)
    assert content(path) == b"".join(line + b"\n" for block in BLOCKS for line in block)


def test_closing_on_a_full_disk_raises_nothing_of_its_own(tmp_path: Path) -> None:
    output = Output(tmp_path / "out.jsonl", "r1")
    output.add(b"x" * 1000, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(DatasetError):
            output.flush()
        output.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- whole files --------------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def fail(_: int) -> None:
        assert path.read_bytes() == b"old", "until it is surely on the disk"
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DatasetError, match=r"cannot write .*No space left"):
        patch.setattr(os, "fsync", fail)
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.json", b"new")]


def test_a_file_in_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot write"):
        write_atomically(tmp_path / "no" / "x", b"")


def test_json_for_people(tmp_path: Path) -> None:
    class Point(msgspec.Struct):
        x: int

    value: Any = {"a": [1, Point(2)], "ü": None}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": [1, {"x": 2}], "ü": None}
    assert text.startswith('{\n  "a": [')
    assert text.endswith("}\n")


# --- ids ----------------------------------------------------------------------------------------------------------


def test_an_id_that_was_taken(tmp_path: Path) -> None:
    body = b'{"id":"a"}\n{"id":7}\n\n{"id":"7"}\n{"id":null}\n{"id":"a"}\n{"id":"b"}'
    found = lines_of(tmp_path, body)
    assert [line.id for line in found if isinstance(line, Line)] == ["a", "7", "3", "b"]
    assert [(line.line, line.reason) for line in found if isinstance(line, Rejected)] == [
        (4, "the id '7' was taken before, by line 2"),
        (6, "the id 'a' was taken before, by line 1"),
    ]


@given(st.lists(st.text(max_size=3) | st.integers(0, 20), max_size=40))
@settings(deadline=None)
def test_of_equal_ids_the_first_is_taken(ids: list[str | int]) -> None:
    intake = dataset.Intake()
    found = [intake.take({"id": identity}) for identity in ids]
    taken = [line.id for line in found if isinstance(line, Line)]
    assert taken == list(dict.fromkeys(str(identity) for identity in ids))
    assert len(found) == len(ids)


def test_an_id_that_is_too_long(tmp_path: Path) -> None:
    (long,) = lines_of(tmp_path, json.dumps({"id": "x" * (dataset.MAX_ID_CHARS + 1)}).encode())
    assert isinstance(long, Rejected)
    assert str(dataset.MAX_ID_CHARS) in long.reason


def test_a_file_is_repeatable_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path, b'{"q":1}\n')
    with dataset.repeatable(path, twice=True) as again:
        assert again == path


def test_stdin_is_kept_only_to_be_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dataset.repeatable("-", twice=False) as again:
        assert again == "-"
    given_there = written(tmp_path, b'{"q":1}\n{"q":2}\n')
    with open(given_there) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        with dataset.repeatable("-", twice=True) as again:
            assert [len(list(read(again))) for _ in range(2)] == [2, 2]
    assert not os.path.exists(again)
