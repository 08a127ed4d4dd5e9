"""The formulas once more: one operation at a time, in any dtype, sharing nothing with `minillm.model`.

Run in float64 they are the truth that both sides of a comparison are measured against; run in a model's own dtype, the
plain way, they say how far rounding alone leads: the yardstick of the rule of two. All that a decoder computes stands
on this page, each with the order of roundings that the originals have.

    embed      W[tokens]                                            weights   softmax(scores), at least in fp32
    cosine     cos(p f) s     p positions, f frequencies            mixed     softmax(scores) v
    sine       sin(p f) s     fp32 at least; s stretches (yarn)     inner     act(gate) * up, or act(up)
    norm       RMSNorm or LayerNorm, statistics at least in fp32    add       x + y
    linear     x W^T + b                                            parallel_add   x + (mlp + attention)
    rotate     x cos + half(x) sin, half(x) = (-x_2, x_1)           logits    x W_head^T
    scores     (q k + m p) / sqrt(E), -inf where hidden             m, p      ALiBi's slopes and key positions

Where a formula takes `rows` stacked runs at once, positions and masks repeat: one float64 copy of a weight serves all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.config import DecoderConfig
from minillm.verify.operations import Operation

#: Rows of a weight that are widened at a time: a vocabulary in float64 would be larger than the model.
_CHUNK = 4096


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, angles and softmax: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Formula:
    """What one run computes. tokens (B, T) int64 · keep (B, T) bool, True on real tokens · frequencies (d/2,) fp32.

    parameter: name -> tensor in any dtype; a missing bias raises KeyError. stretch: cos and sin are multiplied by it.
    """

    config: DecoderConfig
    parameter: Callable[[str], Tensor]
    tokens: Tensor
    keep: Tensor
    frequencies: Tensor | None = None
    stretch: float = 1.0

    def __call__(self, operation: Operation, inputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The operation of inputs (as recorded) in `dtype`; several runs may be stacked along the first dimension."""
        compute: Callable[..., Tensor] = getattr(self, operation.kind)
        widened = [x.to(dtype if operation.kind != "mixed" or x is not inputs[0] else wide(dtype)) for x in inputs]
        return compute(*widened, **self._named(operation, dtype))

    def _named(self, operation: Operation, dtype: torch.dtype) -> dict[str, object]:
        if operation.kind in ("norm", "linear"):
            return {"name": operation.name}
        return {"dtype": dtype} if operation.kind in ("embed", "cosine", "sine", "mixed") else {}

    # --- positions

    @property
    def positions(self) -> Tensor:
        """Real tokens before each one: (B, T) int64; padding counts as 0."""
        return (self.keep.long().cumsum(dim=1) - 1) * self.keep

    def cosine(self, dtype: torch.dtype) -> Tensor:
        return (self._angles(dtype).cos() * self.stretch).to(dtype)

    def sine(self, dtype: torch.dtype) -> Tensor:
        return (self._angles(dtype).sin() * self.stretch).to(dtype)

    def _angles(self, dtype: torch.dtype) -> Tensor:
        assert self.frequencies is not None
        half = self.positions[..., None].to(wide(dtype)) * self.frequencies.to(wide(dtype))
        return torch.cat((half, half), dim=-1)  # (B, T, d)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.split(x)  # (B, H, T, E)
        cos, sin = (self._for_rows(table, len(x))[:, None] for table in (cos, sin))
        size = cos.shape[-1]
        turning, rest = heads[..., :size], heads[..., size:]
        half = torch.cat((-turning[..., size // 2 :], turning[..., : size // 2]), dim=-1)
        return torch.cat((turning * cos + half * sin, rest), dim=-1)

    # --- linear parts

    def embed(self, dtype: torch.dtype) -> Tensor:
        return self.parameter("embed.weight")[self.tokens].to(dtype)

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, eps = self.parameter(f"{name}.weight"), self.config.norm_eps
        exact = x.to(wide(x.dtype))
        if self.config.norm == "rms":
            unit = exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt()
            return weight.to(x.dtype) * unit.to(x.dtype)
        centred = exact - exact.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return (unit * weight.to(exact.dtype) + self.parameter(f"{name}.bias").to(exact.dtype)).to(x.dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        product = times(x, self.parameter(f"{name}.weight"))
        bias = self._bias(name)
        return product if bias is None else product + bias.to(x.dtype)

    def _bias(self, name: str) -> Tensor | None:
        has = self.config.attention_bias if ".attention." in name else self.config.mlp_bias
        return self.parameter(f"{name}.bias") if has else None

    def logits(self, x: Tensor) -> Tensor:
        if self.config.head == "scalar":
            return times(x, self.parameter("lm_head.score.weight")).squeeze(-1)
        return times(x, self.parameter("embed.weight" if self.config.tied_embeddings else "lm_head.weight"))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def parallel_add(self, x: Tensor, mlp: Tensor, attention: Tensor) -> Tensor:
        return x + (mlp + attention)

    # --- attention

    def split(self, x: Tensor) -> Tensor:
        """(B, T, H E) -> (B, H, T, E), for any number of heads; what is split already is left alone."""
        return x if x.ndim == 4 else x.unflatten(-1, (-1, self.config.head_size)).transpose(1, 2)

    def shared(self, x: Tensor) -> Tensor:
        """Key/value heads (B, G, S, E) -> the one that each query head reads (B, H, S, E)."""
        return x.repeat_interleave(self.config.num_heads // x.shape[1], dim=1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = self.split(q), self.shared(self.split(k))
        scores = q @ k.mT / math.sqrt(self.config.head_size)  # (B, H, T, S)
        if self.config.position == "alibi":
            scores = scores + self._for_rows(self.alibi(), len(q)).to(q.dtype) / math.sqrt(self.config.head_size)
        return scores.masked_fill(~self._for_rows(self.visible(), len(q)), -math.inf)

    def visible(self) -> Tensor:
        """Which keys each query may see: (B, 1, T, S) bool; padding sees itself, so that no row is empty."""
        index = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        causal, itself = index <= index[:, None], index == index[:, None]
        return ((causal & self.keep[:, None, :]) | itself)[:, None]

    def alibi(self) -> Tensor:
        """m_h p_j before the division by sqrt(E): (B, H, 1, S), slope, position and product rounded to bfloat16."""
        slopes = slopes_of(self.config.num_heads).to(self.tokens.device, torch.bfloat16)
        return slopes[:, None, None] * self.positions[:, None, None, :].to(torch.bfloat16)

    def weights(self, scores: Tensor) -> Tensor:
        return scores.to(wide(scores.dtype)).softmax(dim=-1).to(scores.dtype)

    def mixed(self, scores: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        mixture = scores.softmax(dim=-1).to(dtype) @ self.shared(self.split(v))  # (B, H, T, E)
        return mixture.transpose(1, 2).flatten(2)

    # --- feed-forward

    def inner(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        activated = ACTIVATIONS[self.config.activation](gate.to(wide(gate.dtype))).to(gate.dtype)
        return activated if up is None else activated * up

    def _for_rows(self, table: Tensor, rows: int) -> Tensor:
        return table if table.shape[0] in (1, rows) else table.repeat(rows // table.shape[0], *[1] * (table.ndim - 1))


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in x's dtype, a few thousand rows of W at a time: (.., K), (N, K) -> (.., N)."""
    if weight.dtype == x.dtype:
        return x @ weight.T
    return torch.cat([x @ part.to(x.dtype).T for part in weight.split(_CHUNK)], dim=-1)


def slopes_of(heads: int) -> Tensor:
    """ALiBi's slopes, fp32 (H,): 2^(-8/P), 2^(-16/P), ..; P the power of two up to H, then every other one of 2P.

    >>> slopes_of(6).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    """
    power = 1 << (heads.bit_length() - 1)
    exponents = [-8 * (h + 1) / power for h in range(power)] + [-4 * (2 * h + 1) / power for h in range(heads - power)]
    return torch.tensor([2.0**e for e in exponents], dtype=torch.float32)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
}
