"""One layer of the decoder: attention and feed-forward around a residual stream, in two topologies.

    sequential (Llama, Falcon-RW)          parallel (Falcon-7B: one norm; Falcon-40B: two)

        x ──────────────┐                      x ─────────────────────────┐
        │               │                      ├───────────────┐          │
    attention_norm      │                  attention_norm   mlp_norm      │
        │               │                      │          (or the same)   │
    attention           │                  attention         mlp          │
        │               │                      │               │          │
        +───────────────┘                      └───────+───────┘          │
        ├───────────────┐                              │                  │
    mlp_norm            │                              +──────────────────┘
        │               │                              │
       mlp              │
        │               │                  the two branches are added first, then the residual:
        +───────────────┘                  in bf16 another order gives other bits

Norms stand before the branch (pre-norm), so the residual stream itself is never rescaled.
"""

from __future__ import annotations

from torch import Tensor, nn

from minillm.config import DecoderConfig
from minillm.model.attention import Attention
from minillm.model.cache import LayerCache
from minillm.model.mlp import make_mlp
from minillm.model.norms import make_norm
from minillm.model.step import one_call


class SequentialBlock(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))` on x (B, T, D)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        if cache is not None and (y := one_call(self, x, rotation, mask, cache)) is not None:
            return y
        x = x + self.attention(self.attention_norm(x), rotation, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class ParallelBlock(nn.Module):
    """`x += mlp(norm(x)) + attention(norm(x))` on x (B, T, D); with one norm, `mlp_norm` is None."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config) if config.parallel_norms == 2 else None
        self.mlp = make_mlp(config)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        normed = self.attention_norm(x)
        attended = self.attention(normed, rotation, mask, cache)
        return x + (self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x)) + attended)


def make_block(config: DecoderConfig) -> SequentialBlock | ParallelBlock:
    """The block that the config names."""
    return SequentialBlock(config) if config.block == "sequential" else ParallelBlock(config)
