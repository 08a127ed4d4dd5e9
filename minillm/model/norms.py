"""Normalisation over the model width: RMSNorm and LayerNorm.

    RMSNorm    y = w * x / sqrt(mean(x^2) + eps)                    arXiv 1910.07467 eq. 4
    LayerNorm  y = w * (x - mean(x)) / sqrt(var(x) + eps) + b       arXiv 1607.06450 eq. 4, var over D (biased)

The statistics are taken in at least fp32 whatever the dtype of x. RMSNorm rounds the normalised x back to x's dtype
*before* the product with w, as Llama does: in bf16 the other order gives other bits. A few rows, as in decoding, go
through one native call; many through torch, whose sums have the order that other libraries' have, bit for bit; and
training through the same with a backward pass written by hand (`minillm.ops.lean`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import DecoderConfig
from minillm.ops import block, lean


class RMSNorm(nn.Module):
    """`y = w * (x / sqrt(mean(x^2) + eps))`, x (..., D) of any float dtype -> (..., D) of the same dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if lean.wanted(x, self.weight):
            return lean.rms_norm(x, self.weight, self.eps)
        return block.rms_norm(x, self.weight, self.eps) if block.few_rows(x) else self.in_torch(x)

    def in_torch(self, x: Tensor) -> Tensor:
        """The definition."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class LayerNorm(nn.Module):
    """`y = w * (x - mean) / sqrt(var + eps) + b`, x (..., D) -> (..., D); torch's kernel keeps statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def make_norm(config: DecoderConfig) -> RMSNorm | LayerNorm:
    """The norm that the config names, over the model width D."""
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.hidden_size, config.norm_eps)
