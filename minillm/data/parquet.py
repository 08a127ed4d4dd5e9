"""Parquet files -> rows, through the optional `pyarrow`.

A Parquet column of messages has one type for all rows, so that a field which one message has stands in all of them, as
null. Templates ask whether a field is there (`'tool_calls' in message`), so inside lists and objects a null is taken
for an absent field, as it was before the file was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm.errors import InputError


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row with its number, from 1, in the order of the file. A column that is null in a row is None there.

    Raises InputError where pyarrow is not installed, and for a file that is damaged or no Parquet.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: Parquet is read by pyarrow, which is not installed: pip install pyarrow") from None
    line = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    line += 1
                    yield line, {name: _without_nulls(value) for name, value in row.items()}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: row {line + 1} cannot be read ({reason:.200}); get the file again") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
