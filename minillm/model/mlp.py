"""The position-wise feed-forward layer, in two shapes.

gated   y = W_down (act(W_gate x) * (W_up x))         SwiGLU for act = silu, arXiv 2002.05202 eq. 6
plain   y = W_down act(W_up x)                        arXiv 1706.03762 eq. 2
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import DecoderConfig
from minillm.model.linear import make_linear, project
from minillm.ops import block, lean

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,  # x * sigmoid(x)
    "gelu": F.gelu,  # x * Phi(x), with erf
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class GatedMLP(nn.Module):
    """x (B, T, D) -> (B, T, D) through two widths F multiplied with each other."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.ffn_size, config.mlp_bias
        self.gate_proj = make_linear(config, width, inner, bias=bias)
        self.up_proj = make_linear(config, width, inner, bias=bias)
        self.down_proj = make_linear(config, inner, width, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        if (
            self.activation is F.silu
            and lean.wanted(gate, up)
            and (y := _kept_small(self.down_proj, gate, up)) is not None
        ):
            return y
        return self.down_proj(self.gated(gate, up))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up, both (B, T, F)."""
        if self.activation is F.silu and block.few_rows(gate):
            return block.swiglu(gate, up)
        if self.activation is F.silu and gate.dtype == up.dtype and lean.wanted(gate, up):
            return lean.swiglu(gate, up)
        activated = self.activation(gate)
        # without gradients the product takes the place of what only it reads: fresh pages cost as much as the product
        return activated * up if torch.is_grad_enabled() else activated.mul_(up)


def _kept_small(down: nn.Module, gate: Tensor, up: Tensor) -> Tensor | None:
    """down(silu(gate) * up) from a layer that can compute the product again in the backward pass; None from others."""
    of_swiglu = getattr(down, "of_swiglu", None)
    return None if of_swiglu is None else of_swiglu(gate, up)


class PlainMLP(nn.Module):
    """x (B, T, D) -> (B, T, D) through one width F."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.ffn_size, config.mlp_bias
        self.up_proj = make_linear(config, width, inner, bias=bias)
        self.down_proj = make_linear(config, inner, width, bias=bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


def make_mlp(config: DecoderConfig) -> GatedMLP | PlainMLP:
    """The feed-forward layer that the config names."""
    return GatedMLP(config) if config.mlp == "gated" else PlainMLP(config)
