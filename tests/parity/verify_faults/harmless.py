"""Other ways to compute the same: rounding may differ, and `minillm verify` may not call any of them a fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.model import attention
from minillm.model.block import ParallelBlock
from minillm.model.rope import rotate
from tests.parity.verify_faults.planted import Bench, Plant, attend, forward, output, parts


class Harmless(NamedTuple):
    """A change that is none, for one variant in every dtype."""

    variant: str
    plant: Plant


def _keys(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """In the model's own dtype, softmax in fp32, as transformers' eager attention."""
    scores = q @ _keys(k, q.shape[1]).mT / math.sqrt(q.shape[-1])
    least = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ _keys(v, q.shape[1])


def _block_by_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax kept up to date over blocks of 16 keys (arXiv 2205.14135, algorithm 1)."""
    k, v = (_keys(x, q.shape[1]).float() for x in (k, v))
    largest = torch.full((*q.shape[:3], 1), -1e30)
    total, mixed = torch.zeros_like(largest), torch.zeros(q.shape)
    for start in range(0, k.shape[2], 16):
        here = slice(start, start + 16)
        scores = (q.float() @ k[:, :, here].mT / math.sqrt(q.shape[-1])).masked_fill(~mask[..., here], -math.inf)
        now = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        powers, shrink = (scores - now).exp(), (largest - now).exp()
        total, mixed = total * shrink + powers.sum(-1, keepdim=True), mixed * shrink + powers @ v[:, :, here]
        largest = now
    return (mixed / total).to(q.dtype)


def _masked(value: float) -> Plant:
    """A float mask that hides by adding `value`."""

    def hide(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        added = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, max(value, torch.finfo(q.dtype).min))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added, enable_gqa=True)

    return attend(hide)


def _rotate(turn: Callable[..., Tensor]) -> Plant:
    return lambda bench: bench.patch.setattr(attention, "rotate", turn)


def _as_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs as complex numbers in fp32, as Meta's code turns them."""
    half = cos.shape[-1] // 2
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos[..., :half].float(), sin[..., :half].float())
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def _double_angles(bench: Bench) -> None:
    rotary: Any = bench.ours.rotary

    def tables(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angle = positions[:, None, :, None].double() * rotary._fixed.double()
        angle = torch.cat((angle, angle), dim=-1)
        return (angle.cos() * rotary._scale).to(dtype), (angle.sin() * rotary._scale).to(dtype)

    rotary.forward = tables


def _rms(norm: Any, right: Any, x: Tensor) -> Tensor:
    """torch's own, the weight inside the rounding."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _layer_norm(norm: Any, right: Any, x: Tensor) -> Tensor:
    """Var(x) = mean(x^2) - mean(x)^2, in fp32."""
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    unit = (wide - mean) * torch.rsqrt(wide.square().mean(-1, keepdim=True) - mean.square() + norm.eps)
    return (unit * norm.weight.float() + norm.bias.float()).to(x.dtype)


def _in_one_product(self: Any, x: Tensor, rotation: Any, mask: Any, cache: Any) -> Tensor:
    """q, k and v of one matmul: no module of them runs."""
    batch, length, _ = x.shape
    projections = (self.q_proj, self.k_proj, self.v_proj)
    fused = x @ torch.cat([p.weight for p in projections]).T
    q, k, v = (
        y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        for y in fused.split([len(p.weight) for p in projections], dim=-1)
    )
    if rotation is not None:
        q, k = rotate(q, *rotation), rotate(k, *rotation)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


def _fused(bench: Bench) -> None:
    bench.patch.setattr(attention.Attention, "forward", _in_one_product)


def _in_two_parts(linear: Any, right: Any, x: Tensor) -> Tensor:
    """Columns split over two devices, their products added in fp32."""
    half = x.shape[-1] // 2
    w = linear.weight
    parts = F.linear(x[..., :half], w[:, :half]).float() + F.linear(x[..., half:], w[:, half:]).float()
    return parts.to(x.dtype) if linear.bias is None else (parts + linear.bias.float()).to(x.dtype)


def _stream_first(self: Any, x: Tensor, *rest: object) -> Tensor:
    """(x + attention) + mlp where the original has x + (mlp + attention)."""
    normed = self.attention_norm(x)
    attended = self.attention(normed, *rest)
    return (x + attended) + self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x))


def _reordered(bench: Bench) -> None:
    bench.patch.setattr(ParallelBlock, "forward", _stream_first)


def _one_rounding(linear: Any, right: Any, x: Tensor) -> Tensor:
    """The bias inside the product's rounding."""
    return F.linear(x, linear.weight, linear.bias)


HARMLESS: dict[str, Harmless] = {
    "attention by hand": Harmless("llama_gqa_8_2", attend(_by_hand)),
    "attention by hand, ALiBi": Harmless("falcon_rw", attend(_by_hand)),
    "attention by hand, 40B": Harmless("falcon_40b", attend(_by_hand)),
    "attention by its definition": Harmless("falcon_7b", attend(attention.attention_ref)),
    "attention block by block": Harmless("llama_mha", attend(_block_by_block)),
    "hidden by the least number": Harmless("llama_mha", _masked(-math.inf)),
    "hidden by -1e9": Harmless("llama_mha", _masked(-1e9)),
    "hidden by -1e4": Harmless("falcon_40b", _masked(-1e4)),
    "turned as complex numbers": Harmless("llama_gqa_8_4", _rotate(_as_complex)),
    "angles in float64": Harmless("falcon_40b", _double_angles),
    "torch's RMSNorm": Harmless("llama_mha", forward(parts("norm"), _rms)),
    "variance from squares": Harmless("falcon_40b", forward(parts("norm"), _layer_norm)),
    "q, k, v in one product": Harmless("llama_gqa_8_2", _fused),
    "q, k, v in one product, 7B": Harmless("falcon_7b", _fused),
    "products in two parts": Harmless("mistral", forward(parts("proj"), _in_two_parts)),
    "the stream first": Harmless("falcon_7b", _reordered),
    "the stream first, 40B": Harmless("falcon_40b", _reordered),
    "one rounding with the bias": Harmless("falcon_rw", forward(parts("proj"), _one_rounding)),
    "logits in fp32": Harmless("llama_gqa_8_2", output(lambda bench: bench.ours, Tensor.float)),
}
