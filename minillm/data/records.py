"""Data files -> records: one dict of fields each, with the file and line that an error can name.

| file | is |
|---|---|
| .json, .jsonl | a list of objects `[{...}, {...}]`, or one object a line; what stands first in the file decides |
| .json.gz, .jsonl.gz | the same, compressed |
| .csv, .tsv | a line of names, then one record a line (a quoted cell may go over several) |
| .parquet | rows of columns, read by pyarrow (`pip install pyarrow`); its "lines" are the rows, from 1 |
| .txt | one document in the field `text`: the file; or each paragraph or line of it, if asked for |

`hub:owner/name` stands for the files of a data set of the hub (`minillm.data.hub_files`), unless a file or folder has
that name. Rows that are in memory already come in through `number`.

What is broken is an error, never a gap: a file that lost its end in a copy must not train a model on the rest.

Lines end where an editor says so: a U+2028 inside a string, which `str.splitlines` would cut at, ends none.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from minillm.data import hub_files, parquet
from minillm.errors import InputError, nearest

TextBy = Literal["document", "paragraph", "line"]
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".tsv", ".parquet", ".txt")

_SPACE = re.compile(r"[ \t\r\n]*")  # JSON's own four, unlike str.isspace
_FULL = r"[^\S\n]*\S[^\n]*"  # a line that is not blank
#: Each begins at an anchor: begun anywhere in a run of blanks, it would take the square of the run's length.
_UNIT = {
    "document": re.compile(r"\A(?=\s*\S).*", re.S),
    "paragraph": re.compile(rf"^{_FULL}(?:\n{_FULL})*", re.M),
    "line": re.compile(rf"^{_FULL}", re.M),
}


class Record(NamedTuple):
    """One entry of a data file: its fields, and where it begins. Lines count from 1."""

    fields: Mapping[str, Any]
    file: str
    line: int

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.file} line {self.line}"


def read_records(source: Path | str | Sequence[Path | str], *, text_by: TextBy = "document") -> list[Record]:
    """Every record of a file, of a folder's data files in order of path, of a data set of the hub, or of several of
    these, one after the other.

    A folder is read to any depth; hidden files and other suffixes than `SUFFIXES` are left out.
    text_by: what is one record of a .txt file.
    Raises `InputError`, naming the file and the line, for what is missing, empty, not UTF-8, or malformed; for what the
    hub does not give; and for a Parquet file where pyarrow is not installed.
    """
    if text_by not in get_args(TextBy):
        raise InputError(f"text_by is {text_by!r}; choose {', '.join(get_args(TextBy))}")
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise InputError("no data file is named; give a file or a folder")
    return [record for each in sources for file in _files(each) for record in _read(file, text_by)]


def number(rows: Iterable[Mapping[str, Any]], *, name: str) -> list[Record]:
    """Records of rows that are in memory, counted from 1 under a name that errors show.

    This is the way in for whatever yields dicts, such as a split of a hub data set: `number(split, name="alpaca")`.
    Such a split is Arrow's, as a Parquet file is, and what is null within a field is absent here too.
    Raises `InputError` for a row that is no dict, and for none at all.
    """
    checked = ((line, _checked(row, name, line)) for line, row in enumerate(rows, 1))
    records = [Record(parquet.without_inner_nulls(row), name, line) for line, row in checked]
    if not records:
        raise InputError(f"{name}: no rows; give a data set that has some")
    return records


def _files(source: Path | str) -> list[Path]:
    path = Path(source)
    if str(source).startswith(hub_files.PREFIX) and not path.exists():
        return hub_files.fetch(str(source), SUFFIXES)
    if path.is_dir():
        below = (Path(here, name) for here, folders, names in _walk(path) for name in names)
        found = sorted((file for file in below if file.name.endswith(SUFFIXES) and file.is_file()), key=Path.as_posix)
        if not found:
            raise InputError(f"{path}: no data file in this folder; its name must end in {', '.join(SUFFIXES)}")
        return found
    if not path.exists():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file or folder{nearest(path.name, beside)}")
    if not path.name.endswith(SUFFIXES) or not path.is_file():
        raise InputError(f"{path}: not a data file: its name must end in {', '.join(SUFFIXES)}")
    return [path]


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield here, folders, [name for name in names if not name.startswith(".")]


def _read(path: Path, text_by: TextBy) -> list[Record]:
    numbered = parquet.rows(path) if path.suffix == ".parquet" else _numbered(path, _text(path), text_by)
    records = [Record(_checked(fields, path, line), str(path), line) for line, fields in numbered]
    if not records:
        raise InputError(f"{path}: no records in this file; fill it or leave it out")
    return records


def _numbered(path: Path, text: str, text_by: TextBy) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".txt":
        return _passages(text, _UNIT[text_by])
    if path.suffix in (".csv", ".tsv"):
        return _csv(text, path, "\t" if path.suffix == ".tsv" else ",")
    return _json_list(text, path) if text.lstrip().startswith("[") else _json_lines(text, path)


def _text(path: Path) -> str:
    """The file as UTF-8, with or without a byte-order mark; line ends as they are."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:  # the last two: a .gz that is torn or broken
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); mend it or leave it out") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path} line {line}: not UTF-8 ({error.reason}); convert the file") from error


def _checked(fields: Any, file: Path | str, line: int) -> Mapping[str, Any]:
    if not isinstance(fields, Mapping):
        kind = type(fields).__name__
        raise InputError(f"{file} line {line}: a record is an object with named fields, not {kind}; mend or remove it")
    return fields


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except (ValueError, RecursionError) as error:
                raise _not_json(path, line, error) from error


def _json_list(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The items of one list, each decoded on its own, so that the line on which it begins is known."""
    decode = json.JSONDecoder().raw_decode
    line, counted, at = 1, 0, _skip(text, text.index("[") + 1)
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, getattr(error, "lineno", line), error) from error
        yield line, value
        at = _skip(text, end)
        more = text[at : at + 1] == ","
        at = _skip(text, at + 1) if more else at
    if text[at : at + 1] != "]" or text[at + 1 :].strip():
        raise _not_json(path, 1 + text.count("\n", 0, at), "a comma, or one ] at the end, is missing")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _not_json(path: Path, line: int, error: object) -> InputError:
    why = getattr(error, "msg", None) or " ".join(str(error).split())
    return InputError(f"{path} line {line}: not JSON ({why}); one record a line, or all in one list: mend or remove it")


def _csv(text: str, path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(filter(None, reader), [])  # blank lines are [], here and below
        line = reader.line_num
        if len(set(names)) < len(names) or not all(names):
            raise InputError(
                f"{path} line {line}: a column has no name, or another's; name each one: {', '.join(names)}"
            )
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(names):
                raise InputError(f"{path} line {line}: {len(cells)} cells for {len(names)} columns; mend or remove it")
            if cells:
                yield line, dict(zip(names, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: {error}; mend or remove the record, or use JSONL") from error


def _passages(text: str, unit: re.Pattern[str]) -> Iterator[tuple[int, Any]]:
    text, line, counted = text.replace("\r\n", "\n"), 1, 0
    for found in unit.finditer(text):
        line, counted = line + text.count("\n", counted, found.start()), found.start()
        yield line, {"text": found.group()}
