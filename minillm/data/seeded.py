"""Orders drawn from a seed, the same on every machine and after every resumption."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def drawn(count: int, *origin: int | str) -> Tensor:
    """0 .. count - 1, int64, in an order that is a function of `origin` alone: a seed, an epoch, what the order is for.

    >>> sorted(drawn(4, 0, "epoch", 7).tolist())
    [0, 1, 2, 3]
    """
    digest = hashlib.sha256(" ".join(map(str, origin)).encode()).digest()
    # 32 bits: torch's generator ignores those above, so a seed shifted up would be no seed at all
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.randperm(count, generator=generator)


def permutation(count: int, *origin: int | str) -> list[int]:
    """`drawn` as a list."""
    order: list[int] = drawn(count, *origin).tolist()
    return order
