"""Faults of scores, mask, ALiBi, softmax and mixing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.model import decoder
from minillm.model.alibi import alibi_bias, alibi_slopes
from tests.parity.verify_faults.planted import Plant, Planted, attend, one_late, through

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


def _distances(positions: Tensor, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    """The paper's -m (i - j): a constant less in each row, which softmax cannot see; other scores all the same."""
    apart = positions[:, None, :] - positions[:, :, None]
    return (alibi_slopes(heads)[:, None, None] * apart[:, None]).to(dtype) / math.sqrt(size)


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


_K_ROTATED, _SCORES, _WEIGHTS, _MIXED = (
    f"blocks.0.attention.{name}" for name in ("k_rotated", "scores", "weights", "mixed")
)
_HALF = torch.bfloat16

ATTENDED: dict[str, Planted] = {
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
    "ALiBi of distances": Planted("falcon_rw", _alibi(_distances), _SCORES, "alibi"),
    "ALiBi not rounded": Planted("falcon_rw_odd_heads", _alibi(_not_rounded), _SCORES, "alibi", length=320),
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
        "llama_mha", _softmax(lambda s: _shares(_shifted_scores(s.bfloat16()).exp())), _MIXED, "softmax"
    ),
    "softmax over queries": Planted("falcon_40b", _softmax(lambda s: F.softmax(s, dim=-2)), _WEIGHTS, "softmax"),
    "softmax of base 2": Planted(
        "llama_mha", _softmax(lambda s: _shares(_shifted_scores(s).exp2())), _MIXED, "softmax"
    ),
    "softmax with one more": Planted("mistral", _softmax(lambda s: _shares(s.exp(), more=1.0)), _MIXED),
    "dropout in attention": Planted(
        "falcon_7b", attend(lambda q, k, v, mask: _fused(q, k, v, mask, dropout_p=0.1)), _MIXED
    ),
    "dropout of the weights": Planted("llama_mha", _softmax(lambda s: F.dropout(F.softmax(s, dim=-1), 0.1)), _WEIGHTS),
    "values of another group": Planted("llama_gqa_8_4", attend(_values_repeated), _MIXED, "groups"),
    "values back to front": Planted("llama_mha", attend(lambda q, k, v, mask: _fused(q, k, v.flip(-1), mask)), _MIXED),
    "values one token late": Planted(
        "llama_gqa_8_2", attend(lambda q, k, v, mask: _fused(q, k, one_late(v, dim=2), mask)), _MIXED
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
}
