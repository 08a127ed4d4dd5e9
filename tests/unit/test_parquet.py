"""Parquet through pyarrow: the same rows as JSON, and what is said where pyarrow or the file is of no use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from minillm.data.examples import make_examples
from minillm.data.formats import parse, recognise
from minillm.data.records import read_records
from minillm.errors import InputError
from tests import tiny_checkpoint

CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_rows_are_counted_over_all_groups(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": None if i == 1 else "ñ"} for i in range(7)]
    found = read_records(write(tmp_path / "a.parquet", rows, row_group_size=2))
    assert [dict(record.fields) for record in found] == rows
    assert [record.line for record in found] == list(range(1, 8))
    assert found[6].place == f"{tmp_path / 'a.parquet'} line 7"


@pytest.mark.parametrize("rows", [
    [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     {"messages": [{"role": "user", "content": "c"}, CALL]}],
    [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
    [{"instruction": "i", "input": "", "output": "o"}],
    [{"text": "t"}],
])  # fmt: skip
def test_every_format_means_the_same_as_in_json(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Arrow gives every message every field; what is null in one was never there."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs, ours = read_records(tmp_path / "a.jsonl"), read_records(write(tmp_path / "a.parquet", rows))
    name = recognise(ours)
    assert name == recognise(theirs)
    for one, other in zip(ours, theirs, strict=True):
        plain = json.loads(json.dumps(parse(other, name)), object_hook=without_nulls)
        assert json.loads(json.dumps(parse(one, name))) == plain


def without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def test_unusable_rows_are_named(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": None}, {"prompt": "p", "completion": " "}]
    path = write(tmp_path / "a.parquet", rows)
    _, tally = make_examples(read_records(path), tiny_checkpoint.tokenizer(), context=50)
    assert tally.used == 1
    assert tally.unusable == [
        (f"{path} line 2", "`completion` is missing"),
        (f"{path} line 3", "`completion` is empty"),
    ]


def test_what_no_dict_of_python_holds_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow.parquet import write_table

    far = pyarrow.array([0, 10**7], pyarrow.int32()).cast(pyarrow.date32())  # a day in the year 29349
    write_table(pyarrow.table({"text": ["a", "b"], "day": far}), tmp_path / "far.parquet")
    with pytest.raises(InputError, match=r"far\.parquet: row \d cannot be read \(date value out of range\)"):
        read_records(tmp_path / "far.parquet")
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    write_table(pyarrow.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "two.parquet")
    with pytest.raises(InputError, match="two columns have one name; rename one: text, text"):
        read_records(tmp_path / "two.parquet")


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.parquet line 1: fields of no known format \(prompt, chosen\)"):
        recognise(read_records(write(tmp_path / "a.parquet", [{"prompt": "p", "chosen": "c"}])))


def test_no_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: no records in this file"):
        read_records(tmp_path / "a.parquet")


@pytest.mark.parametrize("damage", [slice(0, -100), slice(50, None), slice(0, 4), slice(0, 0)])
def test_a_torn_file_is_one_line(tmp_path: Path, damage: slice) -> None:
    whole = write(tmp_path / "whole.parquet", [{"text": f"{i:05d}"} for i in range(100)]).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[damage])
    with pytest.raises(InputError, match=r"a.parquet: row 1 cannot be read \(.*\); get the file again") as caught:
        read_records(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


def test_a_page_that_is_broken_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"text": f"{i:05d}"} for i in range(100)], compression="gzip")
    content = bytearray(path.read_bytes())
    content[60:90] = b"\xff" * 30
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a.parquet: row 1 cannot be read"):
        read_records(path)


def test_without_pyarrow_the_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"a.parquet: .*not installed: pip install pyarrow$"):
        read_records(tmp_path / "a.parquet")
