"""ALiBi (arXiv 2108.12409 §3): no position embedding; scores get a slope in the key's position instead.

    score_(h,i,j) = (q_i · k_j + m_h * p_j) / sqrt(E)            p_j = position of key j in its row, pads excluded

The paper subtracts m_h * (i - j); m_h * p_j differs from that by a constant of the row i, which softmax cannot see.
Slopes for H a power of two: m_h = 2^(-8h/H), h = 1 .. H. Otherwise the slopes of the next lower power P, then every
other one of 2P.

Two conventions of Falcon-RW, which we follow (its weights were trained with them):
the slope term is inside the division by sqrt(E) (BLOOM adds it outside), and m_h and p_j are rounded to **bfloat16**
before their product, which is rounded too, even in an fp32 model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """m (H,) fp32.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> len(alibi_slopes(71))
    71
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-4 * h / power) for h in range(1, 2 * (num_heads - power) + 1, 2)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


def alibi_bias(positions: Tensor, num_heads: int, head_size: int, dtype: torch.dtype) -> Tensor:
    """m_h * p_j / sqrt(E), ready to add to scaled scores: key positions (B or 1, S) int64 -> (B or 1, H, 1, S)."""
    slopes = alibi_slopes(num_heads).to(positions.device, torch.bfloat16)
    bias = slopes[:, None] * positions[:, None, :]  # (B, H, S) bfloat16
    return bias[:, :, None, :].to(dtype) / math.sqrt(head_size)
