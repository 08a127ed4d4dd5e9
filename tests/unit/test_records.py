"""Data files: what is read from each kind, on which line it stood, and what is said of a broken one."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from minillm.data.records import Record, number, read_records
from minillm.errors import InputError


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(folder: Path, name: str, content: str | bytes, **options: Any) -> list[tuple[int, dict[str, Any]]]:
    path = file(folder, name, content)
    found = read_records(path, **options)
    assert {record.file for record in found} == {str(path)}
    return [(record.line, dict(record.fields)) for record in found]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_is_known_by_its_beginning(tmp_path: Path, name: str) -> None:
    """Hubs are full of `.json` files that hold one object a line."""
    rows = [{"text": "a, ] [\n"}, {"text": {"b": [1, 2]}}, {"text": "}\\"}]
    expected = list(zip([1, 2, 3], rows, strict=True))
    assert read(tmp_path, name, "\n".join(map(json.dumps, rows))) == expected
    assert read(tmp_path, name, "[" + ",\n".join(map(json.dumps, rows)) + "]\n") == expected


def test_items_of_an_indented_list_have_the_line_of_their_brace(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "x\ny"}, {"a": 2, "b": ""}]
    found = read(tmp_path, "a.json", "\n" + json.dumps(rows, indent=2))
    assert found == [(3, rows[0]), (7, rows[1])]


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    """U+2028 and U+0085 inside a string end no line, CR LF ends one, blank ones count, a byte-order mark is none."""
    content = '\ufeff{"t": "a\u2028b\u0085c"}\r\n\r\n{"t": "d"}\r\n'
    assert read(tmp_path, "a.jsonl", content) == [(1, {"t": "a\u2028b\u0085c"}), (3, {"t": "d"})]


def test_csv_cells_may_hold_commas_quotes_and_lines(tmp_path: Path) -> None:
    content = 'prompt,completion\r\n"a, ""b""\nc",d\r\n\r\ne,\r\n'
    assert read(tmp_path, "a.csv", content) == [
        (2, {"prompt": 'a, "b"\nc', "completion": "d"}),
        (5, {"prompt": "e", "completion": ""}),
    ]
    assert read(tmp_path, "a.tsv", "a\tb\n1,2\t3") == [(2, {"a": "1,2", "b": "3"})]
    assert read(tmp_path, "b.csv", "\n\na\n1\n") == [(4, {"a": "1"})]  # the names are the first line that has any


@pytest.mark.parametrize(
    ("text_by", "expected"),
    [
        ("document", [(1, "\n  a\n b\n \n\n\nc\n")]),
        ("paragraph", [(2, "  a\n b"), (7, "c")]),
        ("line", [(2, "  a"), (3, " b"), (7, "c")]),
    ],
)
def test_a_text_is_one_document_unless_asked(tmp_path: Path, text_by: str, expected: list[tuple[int, str]]) -> None:
    content = "\r\n  a\r\n b\r\n \r\n\r\n\r\nc\r\n"
    found = read(tmp_path, "a.txt", content, text_by=text_by)
    assert found == [(line, {"text": text}) for line, text in expected]


@pytest.mark.parametrize("text_by", ["document", "paragraph", "line"])
def test_a_run_of_blanks_costs_its_length_and_not_the_square(tmp_path: Path, text_by: str) -> None:
    """The square of this many took a quarter of an hour."""
    blanks = " " * 600_000
    assert read(tmp_path, "a.txt", f"a\n{blanks}\n\nb{blanks}c\n{blanks}", text_by=text_by)[0][0] == 1
    with pytest.raises(InputError, match="no records"):
        read(tmp_path, "b.txt", blanks + "\n" * 100, text_by=text_by)


def test_a_folder_is_its_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", ".hidden/c.jsonl", ".d.jsonl", "README.md"):
        file(tmp_path, name, json.dumps({"name": name}))
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")  # reading it would wait for ever
    assert [record.fields["name"] for record in read_records(tmp_path)] == ["a/z.jsonl", "b.jsonl"]
    twice = read_records([tmp_path / "b.jsonl", str(tmp_path)])
    assert [record.fields["name"] for record in twice] == ["b.jsonl", "a/z.jsonl", "b.jsonl"]


GOOD = '{"a": 1}'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", f"{GOOD}\n\n{GOOD[:-1]}\n{GOOD}", r"line 3: not JSON \(Expecting ',' delimiter\)"),
        ("a.jsonl", f"{GOOD}\n{GOOD} {GOOD}", r"line 2: not JSON \(Extra data\)"),
        ("a.jsonl", f"{GOOD}\n[1]", "line 2: a record is an object with named fields, not list"),
        ("a.json", json.dumps({"data": [1]}, indent=1), "line 1: not JSON .*all in one list"),
        ("a.json", f"[{GOOD},\n{GOOD},\n", r"line 3: not JSON \(Expecting value\)"),
        ("a.json", f"[{GOOD},\n{GOOD}\n", "line 3: not JSON .*is missing"),
        ("a.json", f"[{GOOD},\n{GOOD}\n{GOOD}]", "line 3: not JSON .*is missing"),
        ("a.json", f"[{GOOD},\n]", "line 2: not JSON"),
        ("a.json", f"[{GOOD}]\n]", "line 1: not JSON .*is missing"),
        ("a.json", '[{"a":\n"b}]', r"line 2: not JSON \(Unterminated string"),
        ("a.json", f"[{GOOD},\n3]", "line 2: a record is an object with named fields, not int"),
        ("a.json", f"[{GOOD},\n" + "[" * 100_000, "line 2: not JSON .*recursion"),
        ("a.jsonl", f"{GOOD}\n" + '{"a":' * 100_000, "line 2: not JSON .*recursion"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3: 1 cells for 2 columns"),
        ("a.csv", "a,b\n1,2,3\n", "line 2: 3 cells for 2 columns"),
        ("a.csv", 'a,b\n1,"2\n3\n', "line 3: unexpected end of data"),
        ("a.csv", "a,a\n1,2\n", "line 1: a column has no name, or another's"),
        ("a.csv", "a,\n1,2\n", "line 1: a column has no name, or another's"),
        ("a.csv", "a\n" + "x" * 200_000, "line 2: field larger than field limit .*JSONL"),
        ("a.jsonl", f"{GOOD}\n{GOOD}\n".encode() + b'{"a": "\xe4"}', "line 3: not UTF-8"),
        *((f"a.{kind}", empty, "no records") for kind in ("jsonl", "json", "csv", "txt") for empty in ("", " \n\n")),
        ("a.json", "[ ]", "no records"),
        ("a.csv", "a,b\n", "no records"),
        (
            "a.jsonl.gz",
            gzip.compress(f"{GOOD}\n\n[1]".encode(), mtime=0),
            "line 3: a record is an object with named fields",
        ),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99, mtime=0)[:-20], "cannot be read .*end-of-stream"),
        ("a.jsonl.gz", f"{GOOD}", "cannot be read .*[Nn]ot a gzipped file"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:10] + b"\xff" * 30, "cannot be read .*decompressing"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "no records"),
        ("a.xlsx", "PK", "must end in .json, .jsonl, .json.gz, .jsonl.gz, .csv, .tsv, .parquet, .txt"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        read(tmp_path, name, content)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_compressed_json(tmp_path: Path) -> None:
    lines = b'{"t": "\xc3\xb1"}\n\n{"t": "d"}\n'
    assert read(tmp_path, "a.jsonl.gz", gzip.compress(lines)) == [(1, {"t": "ñ"}), (3, {"t": "d"})]
    assert read(tmp_path, "b.json.gz", gzip.compress(b'[{"t": 1}]')) == [(1, {"t": 1})]
    assert [record.file for record in read_records(tmp_path)] == [str(tmp_path / "a.jsonl.gz")] * 2 + [
        str(tmp_path / "b.json.gz")
    ]


def test_missing_sources_are_named(tmp_path: Path) -> None:
    file(tmp_path, "train.jsonl", GOOD)
    with pytest.raises(InputError, match=r"no such file or folder \(nearest: train.jsonl\)"):
        read_records(tmp_path / "trian.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no data file in this folder"):
        read_records(tmp_path / "empty")
    with pytest.raises(InputError, match="no data file is named"):
        read_records([])
    with pytest.raises(InputError, match="text_by is 'word'; choose document, paragraph, line"):
        read_records(tmp_path, text_by="word")  # type: ignore[arg-type]


def test_rows_in_memory_are_counted() -> None:
    found = number(({"a": i} for i in range(2)), name="alpaca")
    assert found == [Record({"a": 0}, "alpaca", 1), Record({"a": 1}, "alpaca", 2)]
    assert found[1].place == "alpaca line 2"
    turn = {"role": "user", "content": "a", "tool_calls": None}  # as the datasets library has it
    (chat,) = number([{"messages": [turn], "tools": None}], name="chat")
    assert chat.fields == {"messages": [{"role": "user", "content": "a"}], "tools": None}
    with pytest.raises(InputError, match="alpaca: no rows"):
        number([], name="alpaca")
    with pytest.raises(InputError, match=r"alpaca line 1: .*not str"):
        number(["a"], name="alpaca")  # type: ignore[list-item]
