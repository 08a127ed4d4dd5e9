"""Faults planted in our loaded model: the parity check must see each one.

A check that passes a wrong model is worse than none. Every fault below is one that real ports have had; each is put
into a copy of our model or, by monkeypatching, into our code, and `assert_near` on the logits, at the bound that the
parity tests use, must then fail. The unpatched model must pass the very same call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import minillm
from minillm.checkpoint import falcon
from minillm.model import Decoder, attention, block, decoder, norms
from minillm.model.alibi import alibi_slopes
from minillm.model.rope import Rotary
from tests import tiny
from tests.conftest import Pair
from tests.error import assert_near
from tests.explained import explained

pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

Pairs = Callable[[str], Pair]
Patch = pytest.MonkeyPatch
TOKENS = tiny.tokens(2, 40)


def spoilt(model: Decoder, spoil: Callable[[Decoder], object]) -> Decoder:
    """A copy of the model with the fault in it."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        spoil(changed)
    return changed


def check(pair: Pair, ours: Decoder, tokens: Tensor = TOKENS) -> None:
    with torch.no_grad():
        assert_near(ours(tokens), pair.theirs(tokens).logits)


def swap_two_heads(model: Decoder) -> None:
    """Two query heads of different groups change places, in one layer."""
    weight, size = model.blocks[1].attention.q_proj.weight, model.config.head_size
    first, second = weight[:size].clone(), weight[-size:].clone()
    weight[:size], weight[-size:] = second, first


def transpose_a_head(model: Decoder) -> None:
    """One head's square of the output projection, transposed."""
    weight, size = model.blocks[0].attention.o_proj.weight, model.config.head_size
    weight[:size, :size] = weight[:size, :size].T.clone()


def permute_k_as_q(model: Decoder) -> None:
    """Meta's rows turned into half-split order with H heads where k has G."""
    for layer in model.blocks:
        weight, config = layer.attention.k_proj.weight, model.config
        rows, width = weight.shape
        metas = weight.view(config.num_kv_heads, 2, config.head_size // 2, width).transpose(1, 2).reshape(rows, width)
        wrong = metas.view(config.num_heads, rows // config.num_heads // 2, 2, width).transpose(1, 2)
        weight.copy_(wrong.reshape(rows, width))


def scale_by_one_percent(name: str) -> Callable[[Decoder], object]:
    return lambda model: model.get_parameter(name).mul_(1.01)


def set_eps(eps: float) -> Callable[[Decoder], None]:
    def spoil(model: Decoder) -> None:
        for module in model.modules():
            if isinstance(module, norms.RMSNorm | norms.LayerNorm):
                module.eps = eps

    return spoil


def drop_scaling(model: Decoder) -> None:
    model.rotary = Rotary(replace(model.config, rope_scaling=None))


def drop_bias(name: str) -> Callable[[Decoder], object]:
    return lambda model: model.get_parameter(name).zero_()


def swap_norms(model: Decoder) -> None:
    for layer in model.blocks:
        layer.attention_norm, layer.mlp_norm = layer.mlp_norm, layer.attention_norm


#: Name -> (variant, fault in the model).
IN_THE_MODEL: dict[str, tuple[str, Callable[[Decoder], object]]] = {
    "two heads of q swapped": ("llama_gqa_8_2", swap_two_heads),
    "a head transposed": ("llama_mha", transpose_a_head),
    "k permuted with the heads of q": ("llama_gqa_8_4", permute_k_as_q),
    "q 1% off": ("llama_gqa_8_2", scale_by_one_percent("blocks.1.attention.q_proj.weight")),
    "k 1% off": ("falcon_40b", scale_by_one_percent("blocks.0.attention.k_proj.weight")),
    "down 1% off": ("mistral", scale_by_one_percent("blocks.1.mlp.down_proj.weight")),
    "embedding 1% off": ("llama_mha", scale_by_one_percent("embed.weight")),
    "a norm 1% off": ("falcon_rw", scale_by_one_percent("blocks.0.mlp_norm.weight")),
    "eps 1e-5 for 1e-6": ("llama_mha", set_eps(1e-5)),
    "eps 1e-6 for 1e-5": ("falcon_7b", set_eps(1e-6)),
    "linear scaling dropped": ("llama_rope_linear", drop_scaling),
    "dynamic scaling dropped": ("llama_rope_dynamic", drop_scaling),
    "llama3 scaling dropped": ("llama_rope_llama3", drop_scaling),
    "yarn scaling dropped": ("llama_rope_yarn", drop_scaling),
    "longrope scaling dropped": ("llama_rope_longrope", drop_scaling),
    "bias of q dropped": ("llama_attention_bias", drop_bias("blocks.0.attention.q_proj.bias")),
    "bias of o dropped": ("llama_attention_bias", drop_bias("blocks.1.attention.o_proj.bias")),
    "bias of the mlp dropped": ("falcon_40b_bias", drop_bias("blocks.1.mlp.up_proj.bias")),
    "bias of a norm dropped": ("falcon_7b", drop_bias("norm.bias")),
    "norms of a two-norm block swapped": ("falcon_40b", swap_norms),
    "norms of a sequential block swapped": ("llama_mha", swap_norms),
}


@pytest.mark.parametrize("name", IN_THE_MODEL)
def test_fault_in_the_model(pair: Pairs, name: str) -> None:
    variant, spoil = IN_THE_MODEL[name]
    made = pair(variant)
    tokens = tiny.tokens(2, 80)  # beyond the context or trained context of every scaling
    check(made, made.ours, tokens)
    with pytest.raises(AssertionError, match="of the largest value away"):
        check(made, spoilt(made.ours, spoil), tokens)


def later_by_one_in_the_second_half(monkeypatch: Patch) -> None:
    """All positions moved alike would not show: rotary sees only differences. One gap does."""
    right = decoder._positions

    def wrong(keep: Tensor | None, length: int, device: torch.device) -> Tensor:
        positions = right(keep, length, device)
        return positions + (positions >= length // 2)

    monkeypatch.setattr(decoder, "_positions", wrong)


def unscaled_alibi(monkeypatch: Patch) -> None:
    """BLOOM's way: the slopes outside the division by sqrt(E)."""
    right = decoder.alibi_bias
    monkeypatch.setattr(decoder, "alibi_bias", lambda p, heads, size, dtype: right(p, heads, size, dtype) * size**0.5)


def interleaved_rotation(monkeypatch: Patch) -> None:
    """Meta's pairs (2i, 2i + 1) on Hugging Face's rows."""

    def wrong(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[-1] // 2
        even, odd = x[..., ::2], x[..., 1::2]
        c, s = cos[..., :half], sin[..., :half]
        return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)

    monkeypatch.setattr(attention, "rotate", wrong)


def wrong_groups(monkeypatch: Patch) -> None:
    """Query head h reads key/value head h mod G: `repeat` for `repeat_interleave`."""

    def wrong(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        times = q.shape[1] // k.shape[1]
        return attention.attention_ref(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), mask)

    monkeypatch.setattr(attention, "attend", wrong)


def looks_ahead(monkeypatch: Patch) -> None:
    """The mask one diagonal too wide: every token sees the next one."""

    def wrong(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        length = q.shape[2]
        visible = torch.ones(1, 1, length, length, dtype=torch.bool).tril(1)
        return attention.attention_ref(q, k, v, visible)

    monkeypatch.setattr(attention, "attend", wrong)


def sequential_for_parallel(monkeypatch: Patch) -> None:
    def wrong(self: block.ParallelBlock, x: Tensor, *rest: object) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *rest)
        return x + self.mlp(self.attention_norm(x))

    monkeypatch.setattr(block.ParallelBlock, "forward", wrong)


#: Name -> (variant, fault in our code).
IN_THE_CODE: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "a position off by one (rotary)": ("llama_gqa_8_2", later_by_one_in_the_second_half),
    "a position off by one (alibi)": ("falcon_rw", later_by_one_in_the_second_half),
    "alibi unscaled": ("falcon_rw", unscaled_alibi),
    "interleaved rotation": ("llama_mha", interleaved_rotation),
    "groups repeated in the wrong order": ("llama_gqa_8_2", wrong_groups),
    "a look ahead": ("llama_mha", looks_ahead),
    "sequential for parallel": ("falcon_7b", sequential_for_parallel),
}


@pytest.mark.parametrize("name", IN_THE_CODE)
def test_fault_in_the_code(pair: Pairs, name: str, monkeypatch: Patch) -> None:
    variant, plant = IN_THE_CODE[name]
    made = pair(variant)
    check(made, made.ours)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="of the largest value away"):
        check(made, made.ours)


def test_alibi_not_rounded(pair: Pairs, monkeypatch: Patch) -> None:
    """The paper's slopes and positions, not rounded to bfloat16 as Falcon's are. Positions below 256 have no more than
    the 8 bits of a bfloat16, and the slopes of 6 or 8 heads are powers of two: only a longer text shows it."""
    made, tokens = pair("falcon_rw_odd_heads"), tiny.tokens(1, 400)
    check(made, made.ours, tokens)

    def wrong(positions: Tensor, heads: int, size: int, dtype: torch.dtype) -> Tensor:
        return (alibi_slopes(heads)[:, None] * positions[:, None, :])[:, :, None, :] / size**0.5

    monkeypatch.setattr(decoder, "alibi_bias", wrong)
    check(made, made.ours)
    with pytest.raises(AssertionError, match="of the largest value away"):
        check(made, made.ours, tokens)


@pytest.mark.parametrize("name", ["falcon_40b", "falcon_rw"])
def test_fused_weight_split_into_blocks(pair: Pairs, name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """[all of Q; all of K; all of V] has the right shapes for every Falcon, and is right only for G = 1."""
    made = pair(name)
    folder = tiny.save(made.theirs, tmp_path)
    check(made, minillm.load_model(folder))

    def blocks(fused: Tensor, *, config: minillm.DecoderConfig) -> tuple[Tensor, ...]:
        sizes = [heads * config.head_size for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        return tuple(part.clone() for part in fused.split(sizes))

    monkeypatch.setattr(falcon, "split_qkv", blocks)
    with pytest.raises(AssertionError, match="of the largest value away"):
        check(made, minillm.load_model(folder))


def test_norm_weight_before_the_rounding(pair: Pairs, tmp_path: Path, monkeypatch: Patch) -> None:
    """In fp32 no one could tell; in bf16 the last bits do, so the check is equality, as in `test_bfloat16_bits`."""
    theirs = pair("llama_mha").theirs
    folder = tiny.save(theirs, tmp_path)
    half = type(theirs).from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    ours = minillm.load_model(folder, dtype="bfloat16")
    with torch.no_grad():
        expected = half(TOKENS).logits
        assert torch.equal(ours(TOKENS), expected)

        def wrong(self: norms.RMSNorm, x: Tensor) -> Tensor:
            wide = x.float()
            return (self.weight.float() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

        monkeypatch.setattr(norms.RMSNorm, "forward", wrong)
        assert not torch.equal(ours(TOKENS), expected)


def test_the_check_sees_what_is_no_number() -> None:
    reference = torch.ones(3)
    for bad in (torch.tensor([1.0, float("nan"), 1.0]), torch.tensor([1.0, float("inf"), 1.0]), torch.ones(2)):
        with pytest.raises(AssertionError):
            assert_near(bad, reference)
    assert_near(reference * (1 + 9e-6), reference)
    with pytest.raises(AssertionError):
        assert_near(reference * (1 + 2e-5), reference)


def test_a_red_test_names_the_operation(pair: Pairs) -> None:
    made = pair("llama_gqa_8_4")
    ours = spoilt(made.ours, permute_k_as_q)
    with pytest.raises(AssertionError, match="largest value away") as caught, explained(ours, made.theirs, TOKENS):
        check(made, ours)
    assert "blocks.0.attention.k_proj, ours" in str(caught.value) and "un-permuted with 8 heads" in str(caught.value)
    with (
        pytest.raises(AssertionError, match="every operation of this forward"),
        explained(made.ours, made.theirs, TOKENS),
    ):
        raise AssertionError("something else")
