"""Datasets of every form: what is in them, what is selected of it, and what is wrong with some."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from matrix_bus.config import InputConfig
from matrix_bus.dataset import (
    Intake,
    Line,
    Rejected,
    Selection,
    Shard,
    difference,
    files_of,
    identity,
    mixed,
    read,
)
from matrix_bus.errors import DatasetError, RowError, UsageError

ROWS: list[dict[str, Any]] = [{"q": f"question {n}", "meta": {"n": n}} for n in range(700)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def save_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, **options)


def save_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(
            {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
            for row in rows
        )


def save_dataset(path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(path))


FORMS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(jsonl(ROWS)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(ROWS))),
    "rows.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(jsonl(ROWS))),
    "rows.csv": lambda path: save_csv(path, ROWS),
    "rows.tsv": lambda path: save_csv(path, ROWS, "\t"),
    "rows.parquet": lambda path: save_parquet(path, ROWS, row_group_size=300),
    "saved": lambda path: save_dataset(path, ROWS),
}


def bodies(found: Iterator[Line | Rejected]) -> list[dict[str, Any]]:
    rows = []
    for line in found:
        assert isinstance(line, Line), line
        rows.append(json.loads(line.body))
    return rows


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    FORMS[name](tmp_path / name)
    lines = list(read(str(tmp_path / name), select=Selection(InputConfig(), parsed=["meta"])))
    assert bodies(iter(lines)) == ROWS
    assert [line.number for line in lines if isinstance(line, Line)] == list(range(len(ROWS)))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_can_be_selected_from(tmp_path: Path, name: str) -> None:
    FORMS[name](tmp_path / name)
    config = InputConfig(skip=10, limit=5, fields=["q"], rename={"n": "meta.n"})
    found = list(read(str(tmp_path / name), select=Selection(config)))
    if name in ("rows.csv", "rows.tsv"):  # a cell is text unless the workflow wants something else
        config = InputConfig(skip=10, limit=5, fields=["q"])
        found = list(read(str(tmp_path / name), select=Selection(config)))
        assert bodies(iter(found)) == [{"q": f"question {n}"} for n in range(10, 15)]
    else:
        assert bodies(iter(found)) == [{"q": f"question {n}", "n": n} for n in range(10, 15)]
    assert [line.number for line in found if isinstance(line, Line)] == list(range(10, 15))


def test_a_folder_is_its_data_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "a.jsonl").write_bytes(b'{"q":1}\n')
    (tmp_path / "b" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"q":2}\n'))
    save_csv(tmp_path / "z.csv", [{"q": "3"}])
    for other in ("_SUCCESS", ".a.jsonl.crc", "readme.md", "_temporary/d.jsonl"):
        (tmp_path / other).write_bytes(b"no row\n")
    assert bodies(read(str(tmp_path))) == [{"q": 1}, {"q": 2}, {"q": "3"}]
    assert bodies(read(str(tmp_path / "[ab]*" / "*.jsonl*"))) == [{"q": 2}]


def test_a_rejected_line_says_which_of_several_files_it_is_in(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(b'{"id":"x"}\nbroken\n')
    found = [line for line in read(str(tmp_path)) if isinstance(line, Rejected)]
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert [(line.file, line.line) for line in found] == [(a, 2), (b, 1), (b, 2)]
    assert found[1].reason == f"the id 'x' was taken before, by line {a}:1"


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 7))
def test_shards_share_all_lines_and_reject_each_once(good: list[bool], count: int) -> None:
    raw = [b'{"id":%d}' % (n // 2) if fine else b"no" for n, fine in enumerate(good)]
    whole = Intake()
    expected = [whole.take_line(line) for line in raw]
    shared: list[Any] = [None] * len(raw)
    for index in range(1, count + 1):
        intake = Intake(select=Selection(InputConfig(), Shard(index, count)))
        for at, line in enumerate(raw):
            if (taken := intake.take_line(line)) is not None:
                assert shared[at] is None
                shared[at] = taken
    assert shared == expected


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2", "1/2/3"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(UsageError, match="2/4 is the second of four"):
        Shard.parse(text)


def test_reading_ends_with_the_last_line_that_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"q":1}\n{"q":2}\n')
    (tmp_path / "b.jsonl.zst").write_bytes(b"never read")
    assert bodies(read(str(tmp_path), select=Selection(InputConfig(limit=2)))) == [{"q": 1}, {"q": 2}]


META = {"url": "u", "deep": {"x": None}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (InputConfig(), {"id": 7, "text": "t", "a.b": 0, "meta": META}),
        (InputConfig(fields=["text", "absent"]), {"id": 7, "text": "t"}),
        (
            InputConfig(rename={"page": "text"}),
            {"id": 7, "page": "t", "a.b": 0, "meta": {"url": "u", "deep": {"x": None}}},
        ),
        (InputConfig(fields=["text"], rename={"id": "meta.url"}), {"id": "u", "text": "t"}),
        (
            InputConfig(fields=["id"], rename={"x": "meta.deep.x", "y": "a.b", "z": "meta.no.way"}),
            {"id": 7, "x": None, "y": 0},
        ),
        (InputConfig(fields=["id"], rename={"text": "id"}), {"text": 7}),
    ],
)
def test_fields_are_chosen_and_renamed(config: InputConfig, expected: dict[str, Any]) -> None:
    body = b'{"id":7,"text":"t","a.b":0,"meta":{"url":"u","deep":{"x":null}}}'
    assert json.loads(Selection(config).reshape(body)) == expected


@given(st.lists(st.integers(), max_size=50), st.integers(0, 20), st.integers())
def test_mixing_loses_nothing_and_repeats(items: list[int], size: int, seed: int) -> None:
    found = list(mixed(items, size, seed)) if size else items
    assert sorted(found) == sorted(items)
    assert not size or found == list(mixed(items, size, seed))


def test_mixing_mixes() -> None:
    found = list(mixed(range(1000), 500, 1))
    assert found != list(range(1000))
    assert any(n >= 500 for n in found[:300])


# --- CSV ----------------------------------------------------------------------------------------------------


def test_a_cell_is_text_unless_its_field_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,zip,n,tags\n1,01234,5,"[""x""]"\n2,,,\n3,1,many,x\n')
    found = bodies(read(str(tmp_path / "a.csv"), select=Selection(InputConfig(), parsed=["n", "tags"])))
    assert found[0] == {"id": "1", "zip": "01234", "n": 5, "tags": ["x"]}
    assert found[1] == {"id": "2", "zip": "", "n": None, "tags": None}
    assert found[2] == {"id": "3", "zip": "1", "n": "many", "tags": "x"}  # for the check to refuse


def test_bad_records_of_csv_are_rejected_alone(tmp_path: Path) -> None:
    body = b'q,a\n1,2\n\n"multi\nline",x\nonly one\n\xff,bad\n"un"closed,1\n3,4\n'
    (tmp_path / "a.csv").write_bytes(body)
    found = list(read(str(tmp_path / "a.csv")))
    assert [json.loads(line.body) for line in found if isinstance(line, Line)] == [
        {"q": "1", "a": "2"},
        {"q": "multi\nline", "a": "x"},
        {"q": "3", "a": "4"},
    ]
    rejected = [line for line in found if isinstance(line, Rejected)]
    assert [line.line for line in rejected] == [6, 7, 8]
    assert rejected[0].reason == "1 fields, where the first line names 2"
    assert "surrogate" in rejected[1].reason or "UTF-8" in rejected[1].reason
    assert rejected[2].reason.startswith("not CSV")


def test_a_quote_that_never_ends(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'q\n1\n"2\n3\n')
    found = list(read(str(tmp_path / "a.csv")))
    assert isinstance(found[0], Line)
    assert isinstance(found[1], Rejected)
    assert len(found) == 2


def test_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"q,q\n1,2\n")
    with pytest.raises(DatasetError, match="several columns named q"):
        list(read(str(tmp_path / "a.csv")))


# --- files that are broken ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in FORMS if name not in ("rows.jsonl", "rows.csv", "rows.tsv", "saved")]
)
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_said(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    FORMS[name](path)
    body = path.read_bytes()
    path.write_bytes(body[: int(len(body) * kept)])
    found: list[Line | Rejected] = []
    with pytest.raises(DatasetError, match="cannot read") as caught:
        found.extend(read(str(path)))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", [name for name in FORMS if name.endswith((".gz", ".zst", ".parquet"))])
def test_damage_is_said_or_rejected_and_nothing_else_is_raised(tmp_path: Path, name: str) -> None:
    FORMS[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for at in random.Random(1).sample(range(len(whole)), 60):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        (tmp_path / name).write_bytes(damaged)
        try:
            for line in read(str(tmp_path / name)):
                assert isinstance(line, Line | Rejected)
        except DatasetError as error:
            assert "cannot read" in str(error)


def test_a_saved_dataset_with_splits_or_without_its_files(tmp_path: Path) -> None:
    import datasets

    split = datasets.Dataset.from_list([{"q": "1"}])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DatasetError, match=r"several splits: name one of .*two/train, .*two/test"):
        list(read(str(tmp_path / "two")))
    assert bodies(read(str(tmp_path / "two" / "train"))) == [{"q": "1"}]
    for file in (tmp_path / "two" / "test").glob("*.arrow"):
        file.unlink()
    with pytest.raises(DatasetError, match="cannot read"):
        list(read(str(tmp_path / "two" / "test")))


def test_a_null_or_a_text_that_is_no_unicode_in_a_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.py_buffer(b"fine\xff\xfeok")
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 4, 6, 8)))
    bad = pa.StringArray.from_buffers(3, offsets, buffer)
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    save_parquet(tmp_path / "b.parquet", [{"text": None}, {"text": "x"}])

    def check(body: bytes) -> None:
        if json.loads(body)["text"] is None:
            raise RowError("no text")

    found = list(read(str(tmp_path), check))
    assert [line.number for line in found if isinstance(line, Line)] == [0, 2, 4]
    rejected = [line for line in found if isinstance(line, Rejected)]
    assert [(Path(line.file).name, line.line) for line in rejected] == [("a.parquet", 2), ("b.parquet", 1)]
    assert "cannot be read" in rejected[0].reason


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(ROWS))
    lines = read(str(path))
    next(lines)
    with open(path, "ab") as file:
        file.write(b'{"q":"one more"}\n')
    with pytest.raises(DatasetError, match="was changed while it was being read"):
        list(lines)


def test_a_pipe_has_lines(tmp_path: Path) -> None:
    import threading

    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(b'{"q":1}\n'))
    writer.start()
    assert bodies(read(str(tmp_path / "pipe"))) == [{"q": 1}]
    writer.join()


def test_deep_nesting_in_a_table_or_a_renamed_field(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.csv").write_text(f"q\n{deep}\n")
    (found,) = read(str(tmp_path / "a.csv"), select=Selection(InputConfig(), parsed=["q"]))
    assert isinstance(found, Line | Rejected)
    intake = Intake(select=Selection(InputConfig(rename={"x": "q.y.z"})))
    assert isinstance(intake.take_line(b'{"q":' + deep.encode() + b"}"), Rejected)


# --- what a dataset is recognised by ------------------------------------------------------------------------


def test_files_may_be_added_behind_the_others_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(b'{"q":1}\n')
    old = identity(str(tmp_path))
    assert difference(old, identity(str(tmp_path))) == ""
    (tmp_path / "c.jsonl").write_bytes(b'{"q":2}\n')
    assert difference(old, identity(str(tmp_path))) == ""
    (tmp_path / "a.jsonl").write_bytes(b'{"q":3}\n')
    assert "first 2 files" in difference(old, identity(str(tmp_path)))
    (tmp_path / "a.jsonl").write_bytes(b'{"q":1}\n')
    (tmp_path / "aa.jsonl").write_bytes(b'{"q":0}\n')
    assert "first 2 files" in difference(old, identity(str(tmp_path)))
    (tmp_path / "aa.jsonl").unlink()
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "c.jsonl").unlink()
    assert "first 2 files" in difference(old, identity(str(tmp_path)))


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_bytes(b'{"q":1}\n')
    old = identity(str(tmp_path / "d"))
    (tmp_path / "d" / "a.jsonl").unlink()
    (tmp_path / "d").rmdir()
    (tmp_path / "d").write_bytes(b'{"q":1}\n')
    assert "was 1 files, now it is one file" in difference(old, identity(str(tmp_path / "d")))


def test_a_pattern_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_bytes(b'{"q":1}\n')
    assert files_of(str(tmp_path / "a[1].jsonl")) == [str(tmp_path / "a[1].jsonl")]
