"""The linear layer, and the one way in which checkpoints disagree about it.

    y = x W^T + b          x (..., K) · W (N, K) · b (N,) -> (..., N)

torch rounds once, after the bias. Falcon's reference code rounds the product, then adds the bias and rounds again;
`separate_bias` repeats that, so that bf16 logits agree to the last bit. In fp32 the difference is one part in 10^7.
"""

from __future__ import annotations

from torch import Tensor, nn

from minillm.config import DecoderConfig


class SeparateBiasLinear(nn.Linear):
    """`(x W^T) + b` with two roundings."""

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


def make_linear(config: DecoderConfig, inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """A float linear of the config's kind. int8, NF4 and LoRA replace or wrap it after construction."""
    kind = SeparateBiasLinear if config.separate_bias else nn.Linear
    return kind(inputs, outputs, bias=bias)
