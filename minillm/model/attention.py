"""Causal self-attention with any number of key/value heads (arXiv 1706.03762 §3.2, 1911.02150, 2305.13245).

    scores_(h,i,j) = q_(h,i) · k_(g,j) / sqrt(E)        g = h // (H/G): query heads h share key/value head g
    weights        = softmax over the keys j that query i may see
    out_(h,i)      = sum_j weights_(h,i,j) v_(g,j)

`attention_ref` is that formula. `attend` is what runs without a cache: torch's fused kernel, whose bits are those of
transformers; where a gradient of plain causal attention is wanted, our own pair of kernels (`ops/attention_training`).
For a single query token the H/G heads of a group stand in the place of query tokens, so that each cached key and value
is read once and nothing is expanded (measured, one token of 71 heads over 1 cached head of 544 tokens, bf16: 2.1 ms
expanded, 0.15 ms folded). With a cache, where text is written, `attend_cached` takes our own kernel if it serves: the
same formula, 8 times faster over a prompt of 512 tokens, other roundings.

Masks say what True means: `visible` (.., T, S), True where the query may look. A float mask is added to the scaled
scores (ALiBi). None means plain causal: all T tokens are new, or a single one that sees everything before it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import DecoderConfig
from minillm.model.cache import LayerCache
from minillm.model.linear import make_linear, project
from minillm.model.rope import rotate
from minillm.ops import attention as kernel
from minillm.ops import attention_training


def visible_keys(keep: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """Which of S keys each of the last T positions may see: keep (B, S) bool or None -> (B or 1, 1, T, S) bool.

    Query i sees key j where j <= i and keep_j. Every query also sees itself, so that the row of a padding token is not
    empty: softmax over nothing is NaN, and NaN times zero would reach the gradients of real tokens.
    """
    key = torch.arange(keys, device=device)
    query = key[keys - queries :, None]
    causal = key <= query  # (T, S)
    if keep is None:
        return causal[None, None]
    return ((causal & keep[:, None, :]) | (key == query))[:, None]


def visible_within(segments: Tensor) -> Tensor:
    """Which tokens of a packed row each may see: those before it in its segment; (B, T) int -> (B, 1, T, T) bool."""
    place = torch.arange(segments.shape[1], device=segments.device)
    return ((place <= place[:, None]) & (segments[:, None, :] == segments[:, :, None]))[:, None]


def attention_ref(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The formula, at least in fp32: q (B, H, T, E) · k, v (B, G, S, E) · mask as above -> (B, H, T, E)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(repeats, dim=1) for x in (k, v))  # (B, H, S, E)
    if mask is None:
        mask = visible_keys(None, q.shape[2], k.shape[2], q.device)
    bias = (
        torch.zeros((), dtype=wide, device=q.device).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
    )
    scores = q.to(wide) @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias  # (B, H, T, S)
    return (scores.softmax(dim=-1) @ values).to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attention_ref`, fast: same arguments, same result up to rounding."""
    groups, keys = k.shape[1:3]
    batch, heads, queries, size = q.shape
    if mask is None and attention_training.serves(q, k, v):
        return attention_training.attend(q, k, v)
    if queries == 1:
        folded = q.reshape(batch, groups, heads // groups, size)  # (B, G, H/G, E)
        if mask is not None and mask.shape[1] == heads:
            mask = mask.reshape(-1, groups, heads // groups, keys)
        y = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
        return y.reshape(batch, heads, 1, size)  # no view: some of torch's kernels lay y out as (B, H/G, G, E)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=groups != heads)


def attend_cached(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` by the native kernel: plain causal, or one query token with any mask that the decoder makes."""
    if not kernel.serves(q, k, v) or (mask is not None and q.shape[2] > 1):
        return attend(q, k, v, mask)
    if mask is None:
        return kernel.attend(q, k, v)
    if mask.dtype == torch.bool:
        return kernel.attend(q, k, v, keep=mask[:, 0, 0].expand(q.shape[0], -1).contiguous())
    return kernel.attend(q, k, v, bias=mask.contiguous())


class Attention(nn.Module):
    """x (B, T, D) -> (B, T, D): project to q, k, v, turn q and k, remember k and v, attend, project back."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_size = config.num_heads, config.num_kv_heads, config.head_size
        width, size, bias = config.hidden_size, config.head_size, config.attention_bias
        self.q_proj = make_linear(config, width, config.num_heads * size, bias=bias)
        self.k_proj = make_linear(config, width, config.num_kv_heads * size, bias=bias)
        self.v_proj = make_linear(config, width, config.num_kv_heads * size, bias=bias)
        self.o_proj = make_linear(config, config.num_heads * size, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        batch, queries, _ = x.shape
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(batch, queries, self.num_heads, self.head_size).transpose(1, 2)  # (B, H, T, E)
        k = k.view(batch, queries, self.num_kv_heads, self.head_size).transpose(1, 2)  # (B, G, T, E)
        v = v.view(batch, queries, self.num_kv_heads, self.head_size).transpose(1, 2)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is None:
            y = attend(q, k, v, mask)
        else:
            k, v = cache.write(k, v)  # (B, G, S, E)
            y = attend_cached(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(batch, queries, self.num_heads * self.head_size))
