"""One weight file, open for reading: a safetensors file, or (only where asked for) a pickle.

A tensor is read with plain file reads into memory of its own, not through a memory map:

- resident memory is what was asked for, not whatever part of the file the kernel has mapped;
- a file cut or rewritten while it is read gives an error, where a map would end the process (SIGBUS).

Large tensors are read by several threads, into small pages: with huge ones 2.2 GB took 3.3 s instead of 1.6 (2 cores,
medians of 7), though memory was free, and decoding was 3% faster.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from minillm import memory
from minillm.checkpoint.safetensors_header import Entry, ShapeAndDtype, read_header
from minillm.errors import CheckpointError

_WORTH_THREADS = 2**24  # bytes; below 16 MB starting threads costs more than they win


class TensorFile(Protocol):
    """What both kinds of file offer; `layout` maps each name, in file order, to its shape and dtype."""

    path: Path

    @property
    def layout(self) -> Mapping[str, ShapeAndDtype]: ...

    def read(self, name: str, room: memory.Empty = memory.empty) -> torch.Tensor: ...

    def close(self) -> None: ...


class SafetensorsFile:
    """A safetensors file whose header is checked when it is opened and whose tensors are read one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = io.FileIO(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from None
        try:
            self.layout: dict[str, Entry] = read_header(self._file, path)
        except BaseException:
            self._file.close()
            raise
        self._version = self._current_version()

    def read(self, name: str, room: memory.Empty = memory.empty) -> torch.Tensor:
        """The tensor, contiguous, in memory that `room` gives. Raises `CheckpointError` if the file changed since."""
        entry = self.layout[name]
        tensor = room(entry.shape, entry.dtype)
        try:
            whole = fill(tensor, self._file, entry.begin)
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r}: {error.strerror}; get the file again") from None
        if not whole or self._current_version() != self._version:
            raise CheckpointError(f"{self.path}: changed while tensor {name!r} was read; load the checkpoint again")
        return tensor

    def close(self) -> None:
        self._file.close()

    def _current_version(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


class PickleFile:
    """A `.bin` or `.pth` file, through `torch.load(weights_only=True)`: tensors and nothing else.

    It stays mapped until it is closed and `read` copies out of the map; legacy files that are no zip archive cannot be
    mapped and are read whole. Needs torch >= 2.6 (before, weights_only could be escaped: CVE-2025-32434).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        # What a damaged or hostile pickle raises; torch's own text would advise weights_only=False, so it is not shown.
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError) as error:
            raise CheckpointError(
                f"{path}: torch.load(weights_only=True) refuses it ({type(error).__name__}): damaged, or more than "
                "tensors inside; get the checkpoint as safetensors"
            ) from None
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dict of tensors; convert it")
        for name, value in loaded.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                raise CheckpointError(f"{path}: entry {name!r:.120} is no plain tensor; convert the file")
        self.layout: dict[str, torch.Tensor] = loaded

    def read(self, name: str, room: memory.Empty = memory.empty) -> torch.Tensor:
        """The tensor, copied into contiguous memory of its own."""
        return self.layout[name].detach().clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self.layout = {}


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, whatever its dtype.

    >>> bytes(as_bytes(torch.tensor(1.0)))
    b'\\x00\\x00\\x80?'
    """
    return tensor.view(-1).view(torch.uint8).numpy().data


def fill(tensor: torch.Tensor, file: io.FileIO, offset: int) -> bool:
    """Read the bytes of a contiguous CPU tensor from `offset` of the file; False if the file ends too early.

    Large tensors are read by several threads, each its own stretch: reads release the GIL.
    """
    into = as_bytes(tensor)
    threads = min(torch.get_num_threads(), 8) if hasattr(os, "preadv") and len(into) >= _WORTH_THREADS else 1
    if threads == 1:
        return _fill_stretch(into, file, offset)
    stretch = -(-len(into) // threads)
    with ThreadPoolExecutor(threads) as pool:
        starts = range(0, len(into), stretch)
        return all(pool.map(lambda at: _fill_stretch(into[at : at + stretch], file, offset + at), starts))


def _fill_stretch(into: memoryview, file: io.FileIO, offset: int) -> bool:
    while len(into):  # one read returns at most 2 GB
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [into], offset)
        else:  # Windows
            file.seek(offset)
            count = file.readinto(into) or 0
        if count == 0:
            return False
        into, offset = into[count:], offset + count
    return True
