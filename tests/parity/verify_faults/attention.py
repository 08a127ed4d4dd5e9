"""Faults of positions, rotation, scores, mask, softmax and mixing, in our code and in our reading of the settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.model import attention, decoder
from minillm.model.alibi import alibi_bias, alibi_slopes
from minillm.model.rope import rotate
from tests.parity.verify_faults.planted import Bench, Plant, Planted, attend, misread, output, part, through

# --- positions


def _positions(change: Callable[[Tensor], Tensor]) -> Plant:
    def plant(bench: Bench) -> None:
        right = decoder._positions
        bench.patch.setattr(decoder, "_positions", lambda *args: change(right(*args)))

    return plant


def _pads_counted(positions: Tensor) -> Tensor:
    return torch.arange(positions.shape[1]).expand_as(positions)


def _a_gap(positions: Tensor) -> Tensor:
    return positions + (positions >= 30)


# --- rotary tables and rotation


def _rotary(change: Callable[[Any], None]) -> Plant:
    return lambda bench: change(bench.ours.rotary)


def _table(change: Callable[[Tensor, int], Tensor]) -> Plant:
    """Other frequencies: change(f, d)."""

    def wrong(rotary: Any) -> None:
        rotary._fixed = change(rotary._fixed, 2 * len(rotary._fixed))

    return _rotary(wrong)


def _of_the_width(frequency: Tensor, size: int) -> Tensor:
    """Exponents 2i/D where 2i/d is right."""
    return 10_000.0 ** (-torch.arange(0, size, 2) / 64)


def _no_two(frequency: Tensor, size: int) -> Tensor:
    """Exponents i/d where 2i/d is right."""
    return 10_000.0 ** (-torch.arange(size // 2) / size)


def _tables(change: Callable[[Tensor], Tensor]) -> Plant:
    """Change cos and sin alike."""
    return output(part("rotary"), lambda tables: tuple(map(change, tables)))


def _neighbours(table: Tensor) -> Tensor:
    """f0 f0 f1 f1 .. where f0 f1 .. f0 f1 .. is right."""
    return table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1)


def _angles_in_bfloat16(bench: Bench) -> None:
    def wrong(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angle = positions[:, None, :, None].bfloat16() * bench.ours.rotary._fixed.bfloat16()
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    bench.ours.rotary.forward = wrong


def _rotate(wrong: Callable[[Tensor, Tensor, Tensor], Tensor], heads: int | None = None) -> Plant:
    """Turn in another way; only what has so many heads, if given."""

    def plant(bench: Bench) -> None:
        def chosen(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return wrong(x, cos, sin) if heads in (None, x.shape[1]) else rotate(x, cos, sin)

        bench.patch.setattr(attention, "rotate", chosen)

    return plant


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Meta's pairs (2i, 2i + 1) on Hugging Face's rows."""
    half = cos.shape[-1] // 2
    even, odd, c, s = x[..., ::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)


def _half_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Only the first half of each head, as GPT-NeoX turns a share."""
    size = x.shape[-1] // 2
    return torch.cat((rotate(x[..., :size], cos[..., :size], sin[..., :size]), x[..., size:]), dim=-1)


def _normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _one_late(x: Tensor) -> Tensor:
    """Along tokens, the first one repeated."""
    return torch.cat((x[:, :, :1], x[:, :, :-1]), dim=2)


# --- scores and mask


def _keys(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1], **options)


def _scaled(scale: float) -> Plant:
    return attend(lambda q, k, v, mask: _fused(q, k, v, mask, scale=scale))


def _masked(change: Callable[[Tensor], Tensor | None]) -> Plant:
    """Another mask (B, 1, T, S): bool, or float to add."""
    return attend(lambda q, k, v, mask: _fused(q, k, v, change(mask)))


def _square(mask: Tensor, diagonal: int) -> Tensor:
    """Causal up to a diagonal: (T, S) bool."""
    return torch.ones(mask.shape[-2:], dtype=torch.bool).tril(diagonal)


def _sees_the_next(mask: Tensor) -> Tensor:
    return _square(mask, 1) & mask[:, :, -1:]


def _blind_to_itself(mask: Tensor) -> Tensor:
    """But for a row that would be empty."""
    strict = mask & _square(mask, -1)
    return strict | (mask & ~strict.any(dim=-1, keepdim=True))


def _window(mask: Tensor) -> Tensor:
    return mask & ~_square(mask, -16)


def _hidden_by_ten(mask: Tensor) -> Tensor:
    """-10 is not enough to hide a key."""
    return torch.zeros(mask.shape).masked_fill(~mask, -10.0)


def _pads_on_the_right(mask: Tensor) -> Tensor:
    """The padding mask of a batch padded on the other side."""
    return (_square(mask, 0) & mask[:, :, -1:].flip(-1)) | torch.eye(mask.shape[-1], dtype=torch.bool)


def _multiplied(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Hidden scores are 0 instead of -inf."""
    scores = q @ _keys(k, q.shape[1]).mT / math.sqrt(q.shape[-1]) * mask
    return F.softmax(scores, dim=-1) @ _keys(v, q.shape[1])


def _groups_repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Query head h reads key/value head h mod G."""
    times = q.shape[1] // k.shape[1]
    return _fused(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), mask)


def _values_repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Right weights, wrong values."""
    times = q.shape[1] // v.shape[1]
    return _fused(q, _keys(k, q.shape[1]), v.repeat(1, times, 1, 1), mask)


# --- ALiBi


def _alibi(wrong: Callable[[Tensor, int, int, torch.dtype], Tensor]) -> Plant:
    return lambda bench: bench.patch.setattr(decoder, "alibi_bias", wrong)


def _times(factor: float) -> Plant:
    return _alibi(lambda *args: factor * alibi_bias(*args))


def _not_rounded(positions: Tensor, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    return (alibi_slopes(heads)[:, None] * positions[:, None, :])[:, :, None, :] / math.sqrt(size)


def _slopes_of_a_power(positions: Tensor, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    """2^(-8h/H) also where H is no power of two."""
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)]).bfloat16()
    return (slopes[:, None] * positions[:, None, :])[:, :, None, :].to(dtype) / math.sqrt(size)


def _slopes_reversed(positions: Tensor, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    return alibi_bias(positions, heads, size, dtype).flip(1)


# --- softmax and mixing


def _softmax(weigh: Callable[[Tensor], Tensor]) -> Plant:
    """Attention by hand: weigh(scores) gives the weights (B, H, T, S)."""

    def wrong(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ _keys(k, q.shape[1]).mT / math.sqrt(q.shape[-1])
        added = mask if mask.dtype != torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -math.inf).to(q.dtype)
        return weigh(scores + added).to(q.dtype) @ _keys(v, q.shape[1])

    return attend(wrong)


def _shares(powers: Tensor, more: float = 0.0) -> Tensor:
    return powers / (powers.sum(dim=-1, keepdim=True) + more)


def _shifted_scores(scores: Tensor) -> Tensor:
    return scores - scores.amax(dim=-1, keepdim=True)


def _mixed(change: Callable[[Tensor], Tensor]) -> Plant:
    """What leaves attention is laid out wrongly: change (B, H, T, E) -> (B, T, H E)."""

    def wrong(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        batch, heads, length, size = q.shape
        return change(_fused(q, k, v, mask)).reshape(batch, length, heads, size).transpose(1, 2)

    return attend(wrong)


_ROTATED, _K_ROTATED, _SCORES, _WEIGHTS, _MIXED = (
    f"blocks.0.attention.{name}" for name in ("q_rotated", "k_rotated", "scores", "weights", "mixed")
)
#: Some roundings show beyond position 256 only.
_HALF, _LONG = torch.bfloat16, 320

ATTENDED: dict[str, Planted] = {
    # positions
    "all positions one late": Planted("llama_gqa_8_2", _positions(lambda p: p + 1), "rotary.cos", "positions"),
    "a gap in the positions": Planted("falcon_40b", _positions(_a_gap), "rotary.cos", "positions"),
    "pads counted as positions": Planted("llama_mha", _positions(_pads_counted), "rotary.cos", "positions"),
    "pads counted as positions, ALiBi": Planted("falcon_rw", _positions(_pads_counted), _SCORES, "positions|alibi"),
    "a gap in the positions, ALiBi": Planted("falcon_7b_alibi", _positions(_a_gap), _SCORES, "positions|alibi"),
    # theta and scaling
    "theta 10000 for 1e6": Planted("llama_rope_theta", misread(rope_theta=10_000.0), "rotary.cos", "theta"),
    "theta 10000 for 5e5": Planted("falcon_11b", misread(rope_theta=10_000.0), "rotary.cos", "theta"),
    "theta 1e6 for 10000": Planted("falcon_7b", misread(rope_theta=1e6), "rotary.cos", "theta"),
    "exponents of the model's width": Planted("llama_mha", _table(_of_the_width), "rotary.cos", "theta"),
    "exponents without their 2": Planted("falcon_40b", _table(_no_two), "rotary.cos", "theta"),
    "linear scaling dropped": Planted("llama_rope_linear", misread(rope_scaling=None), "rotary.cos", "scaling"),
    "dynamic scaling dropped": Planted(
        "llama_rope_dynamic", misread(rope_scaling=None), "rotary.cos", "scaling", length=90
    ),
    "llama3 scaling dropped": Planted("llama_rope_llama3", misread(rope_scaling=None), "rotary.cos", "scaling"),
    "yarn scaling dropped": Planted("falcon_rope_yarn", misread(rope_scaling=None), "rotary.cos", "scaling"),
    "longrope scaling dropped": Planted("llama_rope_longrope", misread(rope_scaling=None), "rotary.cos", "scaling"),
    "llama3 factor 32 for 8": Planted(
        "llama_rope_llama3", misread(rope_scaling=lambda s: replace(s, factor=32.0)), "rotary.cos", "scaling|frequencies"
    ),
    "linear factor upside down": Planted(
        "falcon_rope_linear", _table(lambda f, _: f * 4), "rotary.cos", "scaling"
    ),
    "yarn's betas forgotten": Planted(
        "llama_rope_yarn_betas",
        misread(rope_scaling=lambda s: replace(s, beta_fast=32.0, beta_slow=1.0)),
        "rotary.cos",
        "scaling|frequencies",
    ),
    "longrope's short factors beyond the limit": Planted(
        "llama_rope_longrope",
        misread(rope_scaling=lambda s: replace(s, long_factor=s.short_factor)),
        "rotary.cos",
        "scaling|frequencies",
    ),
    "yarn without its stretch": Planted(
        "llama_rope_yarn", _rotary(lambda rotary: setattr(rotary, "_scale", 1.0)), "rotary.cos", "stretch"
    ),
    "yarn's mscale forgotten": Planted(
        "llama_rope_yarn_mscale",
        misread(rope_scaling=lambda s: replace(s, mscale=None, mscale_all_dim=None)),
        "rotary.cos",
        "stretch",
    ),
    # tables
    "frequencies in bfloat16": Planted(
        "llama_gqa_8_2", _table(lambda f, _: through(_HALF)(f)), "rotary.cos", "frequencies_rounded"
    ),
    "frequencies in bfloat16, model too": Planted(
        "falcon_7b", _table(lambda f, _: through(_HALF)(f)), "rotary.cos", "frequencies_rounded", dtype=_HALF, length=_LONG
    ),
    "angles in bfloat16": Planted("llama_mha", _angles_in_bfloat16, "rotary.cos", dtype=_HALF, length=_LONG),
    "cos and sin in bfloat16": Planted("falcon_40b", _tables(through(_HALF)), "rotary.cos", "output_rounded"),
    "neighbours share an angle": Planted("llama_mha", _tables(_neighbours), "rotary.cos", "interleaved"),
    "cos and sin exchanged": Planted("mistral", output(part("rotary"), lambda tables: tables[::-1]), "rotary.cos", "swapped"),
    # rotation
    "interleaved rotation": Planted("llama_mha", _rotate(_interleaved), _ROTATED, "interleaved"),
    "interleaved rotation of k only": Planted("falcon_7b", _rotate(_interleaved, heads=1), _K_ROTATED, "interleaved"),
    "nothing rotated": Planted("falcon_40b", _rotate(lambda x, *_: x), _ROTATED, "not_rotated"),
    "k not rotated": Planted("llama_gqa_8_2", _rotate(lambda x, *_: x, heads=2), _K_ROTATED, "not_rotated"),
    "rotated backwards": Planted("llama_mha", _rotate(lambda x, cos, sin: rotate(x, cos, -sin)), _ROTATED, "reversed"),
    "q and k normed": Planted("llama_gqa_8_2", _rotate(lambda x, *r: rotate(_normed(x), *r)), _ROTATED),
    "half of each head rotated": Planted("mistral", _rotate(_half_turned), _ROTATED),
    "rotary_size read as half": Planted("llama_gqa_8_4", misread(rotary_size=4), "rotary.cos", "shape"),
    "keys one token late": Planted(
        "llama_gqa_8_2", _rotate(lambda x, *r: _one_late(rotate(x, *r)), heads=2), _K_ROTATED, "shifted"
    ),
    # scores
    "scaled by 1 / E": Planted("llama_wide_heads", _scaled(1 / 32), _SCORES, "scale"),
    "not scaled": Planted("falcon_7b", _scaled(1.0), _SCORES, "scale"),
    "scaled by sqrt(H / D)": Planted("llama_head_dim", _scaled(8**-0.5), _SCORES, "scale"),
    "scaled twice": Planted("falcon_rw_rotary", _scaled(1 / 8), _SCORES, "scale"),
    "yarn's stretch also in the scores": Planted(
        "llama_rope_yarn", _scaled((0.1 * math.log(4) + 1) ** 2 / math.sqrt(8)), _SCORES, "scale"
    ),
    "groups repeated in the wrong order": Planted("llama_gqa_8_2", attend(_groups_repeated), _SCORES, "groups"),
    "groups repeated in the wrong order, 40B": Planted("falcon_40b", attend(_groups_repeated), _SCORES, "groups"),
    "mask sees the next token": Planted("llama_mha", _masked(_sees_the_next), _SCORES, "mask"),
    "mask hides the token itself": Planted("falcon_40b", _masked(_blind_to_itself), _SCORES, "mask"),
    "padding visible": Planted("llama_gqa_8_2", _masked(lambda mask: _square(mask, 0)), _SCORES, "mask"),
    "no mask": Planted("falcon_7b", _masked(lambda mask: None), _SCORES, "mask"),
    "mask upside down": Planted("mistral", _masked(lambda mask: mask.mT), _SCORES, "mask"),
    "a window of 16": Planted("mistral", _masked(_window), _SCORES, "mask"),
    "hidden by -10": Planted("llama_mha", _masked(_hidden_by_ten), _SCORES, "mask"),
    "padding taken to be on the right": Planted("falcon_40b", _masked(_pads_on_the_right), _SCORES, "mask"),
    "mask of the other row": Planted("llama_mha", _masked(lambda mask: mask.flip(0)), _SCORES, "mask"),
    "mask multiplied": Planted("llama_mha", attend(_multiplied), _SCORES, "mask"),
    # ALiBi
    "ALiBi not scaled": Planted("falcon_rw", _times(math.sqrt(8)), _SCORES, "alibi"),
    "ALiBi twice": Planted("falcon_7b_alibi", _times(2.0), _SCORES, "alibi"),
    "ALiBi missing": Planted("falcon_rw", _times(0.0), _SCORES, "alibi"),
    "ALiBi favours what is far": Planted("falcon_rw", _times(-1.0), _SCORES, "alibi"),
    "ALiBi's slopes in reverse": Planted("falcon_rw", _alibi(_slopes_reversed), _SCORES, "alibi"),
    "ALiBi's slopes of 6 heads as of a power": Planted(
        "falcon_rw_odd_heads", _alibi(_slopes_of_a_power), _SCORES, "alibi"
    ),
    "ALiBi not rounded": Planted("falcon_rw_odd_heads", _alibi(_not_rounded), _SCORES, "alibi", length=_LONG),
    # softmax and mixing
    "scores in bfloat16": Planted(
        "llama_mha", _softmax(lambda s: F.softmax(s.bfloat16(), dim=-1)), _SCORES, "output_rounded"
    ),
    "softmax in bfloat16": Planted(
        "llama_gqa_8_2", _softmax(lambda s: F.softmax(s, dim=-1, dtype=_HALF)), _WEIGHTS, "softmax|output_rounded"
    ),
    "weights in float16": Planted(
        "falcon_7b", _softmax(lambda s: F.softmax(s, dim=-1).half()), _WEIGHTS, "softmax|output_rounded"
    ),
    "softmax step by step in bfloat16": Planted(
        "llama_mha", _softmax(lambda s: _shares(_shifted_scores(s).exp())), _MIXED, "softmax", dtype=_HALF
    ),
    "softmax over queries": Planted("falcon_40b", _softmax(lambda s: F.softmax(s, dim=-2)), _WEIGHTS, "softmax"),
    "softmax of base 2": Planted("llama_mha", _softmax(lambda s: _shares(_shifted_scores(s).exp2())), _MIXED, "softmax"),
    "softmax with one more": Planted("mistral", _softmax(lambda s: _shares(s.exp(), more=1.0)), _MIXED),
    "dropout in attention": Planted(
        "falcon_7b", attend(lambda q, k, v, mask: _fused(q, k, v, mask, dropout_p=0.1)), _MIXED
    ),
    "dropout of the weights": Planted(
        "llama_mha", _softmax(lambda s: F.dropout(F.softmax(s, dim=-1), 0.1)), _WEIGHTS
    ),
    "values of another group": Planted("llama_gqa_8_4", attend(_values_repeated), _MIXED, "groups"),
    "values back to front": Planted(
        "llama_mha", attend(lambda q, k, v, mask: _fused(q, k, v.flip(-1), mask)), _MIXED
    ),
    "values one token late": Planted(
        "llama_gqa_8_2", attend(lambda q, k, v, mask: _fused(q, k, _one_late(v), mask)), _MIXED
    ),
    "values kept in bfloat16": Planted(
        "falcon_40b", attend(lambda q, k, v, mask: _fused(q, k, through(_HALF)(v), mask)), _MIXED, "input_rounded"
    ),
    "keys kept in bfloat16": Planted(
        "llama_gqa_8_2",
        attend(lambda q, k, v, mask: _fused(q, through(_HALF)(k), v, mask)),
        _K_ROTATED,
        "output_rounded",
    ),
    "keys kept in bfloat16, ALiBi": Planted(
        "falcon_rw", attend(lambda q, k, v, mask: _fused(q, through(_HALF)(k), v, mask)), _SCORES, "input_rounded"
    ),
    "heads not brought back": Planted("llama_mha", _mixed(lambda y: y), _MIXED, "head_layout"),
    "heads innermost": Planted("falcon_7b", _mixed(lambda y: y.permute(0, 2, 3, 1)), _MIXED, "head_layout"),
}  # fmt: skip
