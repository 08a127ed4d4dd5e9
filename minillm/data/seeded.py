"""Orders drawn from a seed, the same on every machine and after every resumption."""

from __future__ import annotations

import hashlib

import torch


def permutation(count: int, *origin: int | str) -> list[int]:
    """0 .. count - 1 in an order that is a function of `origin` alone: a seed, an epoch, what the order is for.

    >>> sorted(permutation(4, 0, "epoch", 7))
    [0, 1, 2, 3]
    """
    digest = hashlib.sha256(" ".join(map(str, origin)).encode()).digest()
    # 32 bits: torch's generator ignores those above
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return [int(i) for i in torch.randperm(count, generator=generator)]
