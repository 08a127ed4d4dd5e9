"""The safetensors format: where every tensor of a file lies, checked before one of its bytes is believed.

    | 8 bytes          | n bytes                                                  | the rest              |
    | n, little-endian | {"wq": {"dtype": "BF16", "shape": [8, 8],                | the bytes of every    |
    | unsigned         |   "data_offsets": [0, 128]}, ..., "__metadata__": {...}} | tensor, end to end    |

Offsets count from the start of the data. The format allows neither holes nor overlaps, so that a file can hide
nothing and no tensor can alias another.

Source: github.com/huggingface/safetensors, README ("Format"). Where we differ: the library answers a bad file with the
name of a check ("MetadataIncompleteBuffer"); here the file, the tensor and the mend are named. A key that stands twice
in the header is refused (the library keeps the last).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from minillm.errors import CheckpointError

HEADER_LIMIT = 100_000_000  # bytes; the library's own limit, against a header that eats the memory

# In the order in which the library lays tensors out in a file (wide types first keeps every tensor aligned).
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),  # torch >= 2.7
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


class ShapeAndDtype(Protocol):
    """All that a layout needs to know of a tensor: a real tensor will do, a meta tensor, or an `Entry`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: what it is, and its bytes `[begin, end)` counted from the start of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int


def count_bytes(tensor: ShapeAndDtype) -> int:
    """The bytes that a tensor takes in a file.

    >>> count_bytes(torch.empty(3, 5, dtype=torch.bfloat16, device="meta"))
    30
    """
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def read_header(file: BinaryIO, path: Path) -> dict[str, Entry]:
    """The tensors of an open safetensors file, in the order of their bytes. `path` is for the messages.

    Raises `CheckpointError` for a file that is cut short, has bytes too many, or whose header is no JSON object of
    known dtypes, shapes of whole numbers and gapless offsets. A file cut short names the first tensor that is cut.
    """
    size = os.fstat(file.fileno()).st_size
    header, start = _read_json(file, path, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings; write the file again")
    entries = {name: _entry(path, name, value, start) for name, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_gapless(path, entries, start=start, size=size)
    return entries


def write_header(layout: Mapping[str, ShapeAndDtype], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The bytes that open a file with these tensors, and the order in which their own bytes must follow.

    Byte for byte what the library writes: wide dtypes first, then by name; spaces up to a multiple of 8.

    >>> write_header({"a": torch.empty(2)}, {})[0][8:]
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '

    Raises `CheckpointError` for a dtype that the format has no name for.
    """
    for name, tensor in layout.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                f"tensor {name!r} is {tensor.dtype}, which safetensors cannot hold; convert it before saving"
            )
    order = sorted(layout, key=lambda name: (_RANK[layout[name].dtype], name.encode()))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        end = offset + count_bytes(layout[name])
        dtype, shape = _NAMES[layout[name].dtype], list(layout[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def parse_json_object(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in which no key stands twice: two readers could otherwise see two different checkpoints."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for name, value in pairs:
            if name in names:
                raise CheckpointError(f"{path}: the name {name!r:.120} stands twice; write the file again")
            names[name] = value
        return names

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, a number of 5,000 digits
        raise CheckpointError(f"{path}: no valid JSON ({error}); the file is damaged, get it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(found).__name__}; get the file again")
    return found


def _read_json(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    if prefix == b"version ":  # "version https://git-lfs.github.com/spec/v1"
        raise CheckpointError(f"{path}: is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    length = int.from_bytes(prefix, "little")
    if len(prefix) == 8 and length > HEADER_LIMIT:
        raise CheckpointError(
            f"{path}: claims a header of {length:,} bytes (at most {HEADER_LIMIT:,}); this is no safetensors file"
        )
    text = file.read(length)
    if len(prefix) < 8 or len(text) < length:
        raise CheckpointError(f"{path}: is cut short inside its header ({size:,} bytes); get the file again")
    return parse_json_object(text, path), 8 + length


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    where = f"{path}: tensor {name!r:.120}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets; get the file again")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {dtype!r:.40}; minillm reads {', '.join(DTYPES)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has a shape or data_offsets that are not whole numbers; get the file again")
    if math.prod(max(length, 1) for length in shape) >= 2**63:  # a dimension of 0 must not hide an overflow in torch
        raise CheckpointError(f"{where} has a shape too large for any machine; get the file again")
    entry = Entry(tuple(shape), DTYPES[dtype], start + offsets[0], start + offsets[1])
    if entry.end - entry.begin != count_bytes(entry):
        raise CheckpointError(
            f"{where} of shape {shape} and dtype {dtype} takes {count_bytes(entry):,} bytes, but its data_offsets "
            f"span {entry.end - entry.begin:,}; get the file again"
        )
    return entry


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_gapless(path: Path, entries: Mapping[str, Entry], *, start: int, size: int) -> None:
    end = start
    for name, entry in entries.items():
        if entry.begin != end:
            fault = "overlaps the tensor before it" if entry.begin < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r:.120} {fault}; get the file again")
        end = entry.end
    if end > size:
        cut = next(name for name, entry in entries.items() if entry.end > size)
        raise CheckpointError(
            f"{path}: is cut short: {size:,} bytes of {end:,}, and tensor {cut!r:.120} is the first one cut; "
            "get the file again"
        )
    if end < size:
        raise CheckpointError(f"{path}: has {size - end:,} bytes after its last tensor; get the file again")
