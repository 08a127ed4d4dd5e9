"""Memory for large tensors on the CPU.

empty   from the system itself. malloc keeps what is freed for later; a loading that makes a small tensor of every
        large one (int8 of bf16) leaves holes there, into which the next large one does not fit: 1.2 GB of int8
        weights took 1.8 GB. So a large tensor has pages of its own, which the system gets back when it is let go
huge    the same in pages of 2 MB, if the system has them at hand, for weights that every token reads: decoding is 2
        to 4% faster
Room    memory that is used again, for tensors that are in hand for a moment: a fresh page costs more than filling it
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

Empty = Callable[[Sequence[int], torch.dtype], Tensor]

_WORTH_PAGES = 2**20  # bytes


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU; a large tensor in pages of its own."""
    return _in_pages(shape, dtype, None)


def huge(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`empty`, in huge pages where the system knows them (Linux)."""
    return _in_pages(shape, dtype, getattr(mmap, "MADV_HUGEPAGE", None))


def _in_pages(shape: Sequence[int], dtype: torch.dtype, advice: int | None) -> Tensor:
    count = prod(shape) * dtype.itemsize
    if count < _WORTH_PAGES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    # private: what Python maps by default is shared, which is slower to fill and never in huge pages
    kind = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    pages = mmap.mmap(-1, count, **kind)
    if advice is not None:
        pages.madvise(advice)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


class Room:
    """One piece of memory, as large as the largest tensor it was asked for; each tensor takes the place of the last."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that lasts until the next call."""
        count = prod(shape) * dtype.itemsize
        if count > len(self._bytes):
            self._bytes = torch.empty(0, dtype=torch.uint8)  # let go of the old before asking for the new
            self._bytes = empty((count,), torch.uint8)
        return self._bytes[:count].view(dtype).view(*shape)
