"""The linear layer, and the one way in which checkpoints disagree about it.

    y = x W^T + b          x (..., K) · W (N, K) · b (N,) -> (..., N)

torch rounds once, after the bias. Falcon's reference code rounds the product, then adds the bias and rounds again;
`separate_bias` repeats that, so that bf16 logits agree to the last bit. In fp32 the difference is one part in 10^7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import DecoderConfig
from minillm.ops import block, matmul
from minillm.ops.step import Floating


def times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. A few rows, as in decoding, stream the weights through a kernel of our own: torch's leaves half of the
    memory's speed unused there. So do many rows in fp32, where torch's may leave half of the processor's unused."""
    if matmul.serves(x, weight):
        return matmul.linear(x, weight, bias)
    if block.streams(x) and weight.dtype == x.dtype and weight.is_contiguous():
        return block.linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`x W^T + b`, rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        return times(x, self.weight, self.bias)

    def native(self) -> Floating:
        """As `minillm.model.step` takes it."""
        return Floating(self.weight.detach(), None if self.bias is None else self.bias.detach())


class SeparateBiasLinear(nn.Linear):
    """`(x W^T) + b` with two roundings."""

    def forward(self, x: Tensor) -> Tensor:
        product = times(x, self.weight)
        return product if self.bias is None else product + self.bias


def project(x: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """Each linear of the same x: q, k and v; gate and up. A quantised kind rounds x once for all of them.

    A kind that can do so has `together(linears, x)`. It is passed over where a linear has hooks (they want to see its
    own call), and where kinds differ, as when some are wrapped by an adapter.
    """
    together = getattr(type(linears[0]), "together", None)
    if together is None or torch.compiler.is_compiling():
        return [linear(x) for linear in linears]
    if any(type(each) is not type(linears[0]) or is_watched(each) for each in linears):
        return [linear(x) for linear in linears]
    found: Sequence[Tensor] = together(linears, x)
    return found


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see this module run, forward or backward, or has it run otherwise."""
    own = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(own.get(name) for name in hooks) or "forward" in own


def make_linear(config: DecoderConfig, inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """A float linear of the config's kind. int8, NF4 and LoRA replace or wrap it after construction."""
    kind = SeparateBiasLinear if config.separate_bias else Linear
    return kind(inputs, outputs, bias=bias)
