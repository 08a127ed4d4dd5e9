"""Parquet files -> rows, through the optional `pyarrow`.

A Parquet column of messages has one type for all rows, so that a field which one message has stands in all of them, as
null. Templates ask whether a field is there (`'tool_calls' in message`), so inside lists and objects a null is taken
for an absent field, as it was before the file was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minillm.errors import InputError


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row with its number, from 1, in the order of the file. A column that is null in a row is None there.

    Raises InputError where pyarrow is not installed, for a file that is damaged or no Parquet, for a value that Python
    has no object for (a date after the year 9999), and for two columns of one name.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: Parquet is read by pyarrow, which is not installed: pip install pyarrow") from None
    line = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):  # as dicts, the rows would have the last one's
                raise InputError(f"{path}: two columns have one name; rename one: {', '.join(names):.200}")
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    line += 1
                    yield line, without_inner_nulls(row)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: row {line + 1} cannot be read ({reason:.200}); get the file again or mend the row"
        ) from error


def without_inner_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Arrow's with those nulls taken out that are inside its fields; a field that is null stays."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
