"""Faults of loading: the wrong numbers in the right places, or the right ones in the wrong places."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.checkpoint import falcon
from minillm.checkpoint.meta import to_half_split, to_interleaved
from minillm.model import Decoder
from tests.parity.verify_faults.planted import (
    Bench,
    Plant,
    Planted,
    both,
    every,
    misread,
    swapped,
    through,
    weights,
)


def _q_heads(change: Callable[[Tensor, Decoder], Tensor]) -> Callable[[Tensor, Decoder], Tensor]:
    """Change a projection's rows seen as heads (H or G, E, D)."""

    def changed(weight: Tensor, model: Decoder) -> Tensor:
        heads = weight.view(-1, model.config.head_size, weight.shape[1])
        return change(heads, model).reshape(weight.shape)

    return changed


def _metas_order(weight: Tensor, model: Decoder) -> Tensor:
    return to_interleaved([weight], heads=weight.shape[0] // model.config.head_size)


def _twice(weight: Tensor, model: Decoder) -> Tensor:
    """Hugging Face's rows taken for Meta's."""
    return to_half_split(weight, heads=weight.shape[0] // model.config.head_size)[0]


def _permuted_as_q(weight: Tensor, model: Decoder) -> Tensor:
    """Meta's rows of k brought to half-split order with H heads where k has G."""
    return to_half_split(_metas_order(weight, model), heads=model.config.num_heads)[0]


def _group_by_group(heads: Tensor, model: Decoder) -> Tensor:
    """Query heads listed g0 g1 g0 g1 .. instead of g0 g0 .. g1 g1."""
    return heads.view(model.config.num_kv_heads, -1, *heads.shape[1:]).transpose(0, 1)


def _two_swapped(heads: Tensor, model: Decoder) -> Tensor:
    order = [*range(len(heads))]
    order[1], order[6] = 6, 1
    return heads[order]


def _columns_reordered(weight: Tensor, model: Decoder) -> Tensor:
    return weight.view(weight.shape[0], model.config.num_heads, -1).flip(1).flatten(1)


def _a_head_transposed(weight: Tensor, model: Decoder) -> Tensor:
    size = model.config.head_size
    weight[size : 2 * size, size : 2 * size] = weight[size : 2 * size, size : 2 * size].T.clone()
    return weight


def _all_heads_transposed(weight: Tensor, model: Decoder) -> Tensor:
    """Every E x E square of the output projection."""
    size = model.config.head_size
    return weight.view(weight.shape[0] // size, size, -1, size).transpose(1, 3).reshape(weight.shape)


def _a_block_off(weight: Tensor, model: Decoder) -> Tensor:
    weight[8:12, 4:8] += 0.2
    return weight


def _a_number_off(weight: Tensor, model: Decoder) -> Tensor:
    weight[3, 5] += 0.5
    return weight


def _not_a_number(weight: Tensor, model: Decoder) -> Tensor:
    weight[2, 3] = float("nan")
    return weight


def _every_other_row(model: Decoder) -> None:
    """A fused [gate; up] read as g0 u0 g1 u1 .."""
    for block in model.blocks:
        gate, up = block.mlp.gate_proj.weight, block.mlp.up_proj.weight
        fused = torch.cat((gate, up))
        gate.copy_(fused[::2])
        up.copy_(fused[1::2])


def _head_zeroed(heads: Tensor, model: Decoder) -> Tensor:
    heads[1] = 0
    return heads


def _to_int8(weight: Tensor, model: Decoder) -> Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


def _low_rank(weight: Tensor, model: Decoder) -> Tensor:
    """An adapter that was merged and forgotten."""
    made = torch.Generator().manual_seed(0)
    up, down = torch.randn(weight.shape[0], 2, generator=made), torch.randn(2, weight.shape[1], generator=made)
    return weight + 0.02 * up @ down


def _times(ending: str, factor: float) -> Plant:
    return every(ending, lambda weight, _: factor * weight)


def _rounded(ending: str, dtype: torch.dtype) -> Plant:
    return every(ending, lambda weight, _: through(dtype)(weight))


def _copied(to: str, source: str, change: Callable[[Tensor], Tensor] = torch.clone) -> Plant:
    return weights(lambda model: model.get_parameter(to).copy_(change(model.get_parameter(source))))


def _layers(change: Callable[[list[Any]], list[Any]]) -> Plant:
    """Our layers in another order; each keeps its place in the trace."""
    return weights(lambda model: setattr(model, "blocks", torch.nn.ModuleList(change(list(model.blocks)))))


# --- Falcon's fused weight

Split = Callable[[Tensor, Any], Sequence[Tensor]]


def fused_as(split: Split, only: Callable[[Tensor], bool] = lambda fused: True) -> Plant:
    """Our loader takes query_key_value apart like that."""

    def plant(bench: Bench) -> None:
        right = falcon.split_qkv

        def wrong(fused: Tensor, *, config: Any) -> Sequence[Tensor]:
            found = split(fused, config) if only(fused) else right(fused, config=config)
            return [x.reshape(-1, *fused.shape[1:]).clone() for x in found]

        bench.patch.setattr(falcon, "split_qkv", wrong)
        bench.reload()

    return plant


def _blocks(fused: Tensor, config: Any) -> Sequence[Tensor]:
    """All of q, all of k, all of v."""
    return fused.split([heads * config.head_size for heads in (config.num_heads, *[config.num_kv_heads] * 2)])


def _kv_first(fused: Tensor, config: Any) -> Sequence[Tensor]:
    rows = fused.view(config.num_kv_heads, config.heads_per_group + 2, config.head_size, *fused.shape[1:])
    return rows[:, 2:], rows[:, 0], rows[:, 1]


def _v_before_k(fused: Tensor, config: Any) -> Sequence[Tensor]:
    rows = fused.view(config.num_kv_heads, config.heads_per_group + 2, config.head_size, *fused.shape[1:])
    return rows[:, :-2], rows[:, -1], rows[:, -2]


def _groups_innermost(fused: Tensor, config: Any) -> Sequence[Tensor]:
    rows = fused.view(config.heads_per_group + 2, config.num_kv_heads, config.head_size, *fused.shape[1:])
    return rows[:-2], rows[-2], rows[-1]


def _thirds_innermost(fused: Tensor, config: Any) -> Sequence[Tensor]:
    rows = fused.view(config.num_heads, config.head_size, 3, *fused.shape[1:])
    return rows[:, :, 0], rows[:, :, 1], rows[:, :, 2]


_Q, _K, _V, _O = (f"blocks.0.attention.{letter}_proj" for letter in "qkvo")
_NORM, _MLP = "blocks.0.attention_norm", "blocks.0.mlp"

LOADED: dict[str, Planted] = {
    # order of rows and columns
    "q and k in Meta's order": Planted(
        "llama_gqa_8_2",
        both(every("q_proj.weight", _metas_order), every("k_proj.weight", _metas_order)),
        _Q,
        "meta_order",
    ),
    "q and k permuted twice": Planted(
        "llama_mha", both(every("q_proj.weight", _twice), every("k_proj.weight", _twice)), _Q, "meta_order"
    ),
    "v permuted like q and k": Planted("llama_gqa_8_4", every("v_proj.weight", _metas_order), _V, "meta_order"),
    "k permuted with the heads of q": Planted(
        "llama_gqa_8_4", every("k_proj.weight", _permuted_as_q), _K, "permuted_with_heads"
    ),
    "k permuted with the heads of q, wide heads": Planted(
        "llama_wide_heads", every("k_proj.weight", _permuted_as_q), _K, "permuted_with_heads"
    ),
    "two query heads swapped": Planted(
        "llama_gqa_8_2",
        every("blocks.1.attention.q_proj.weight", _q_heads(_two_swapped)),
        "blocks.1.attention.q_proj",
        "heads_reordered",
    ),
    "query heads group by group": Planted(
        "falcon_40b", every("q_proj.weight", _q_heads(_group_by_group)), _Q, "heads_reordered"
    ),
    "key heads in reverse": Planted(
        "llama_gqa_8_4", every("k_proj.weight", _q_heads(lambda heads, _: heads.flip(0))), _K, "heads_reordered"
    ),
    "columns of o in another order of heads": Planted(
        "falcon_rw", every("o_proj.weight", _columns_reordered), _O, "heads_reordered"
    ),
    "o transposed": Planted("falcon_7b", every("o_proj.weight", lambda w, _: w.T), _O, "transposed"),
    "q transposed": Planted("llama_mha", every("q_proj.weight", lambda w, _: w.T), _Q, "transposed"),
    "one head transposed": Planted("llama_mha", every("o_proj.weight", _a_head_transposed), _O, "head_transposed"),
    "all heads transposed": Planted("falcon_40b", every("o_proj.weight", _all_heads_transposed), _O, "head_transposed"),
    # the fused weight
    "40B's fused weight in three blocks": Planted("falcon_40b", fused_as(_blocks), _Q, "fused_layout"),
    "RW's fused weight in three blocks": Planted("falcon_rw", fused_as(_blocks), _Q, "fused_layout"),
    "40B's fused weight, k and v first": Planted("falcon_40b", fused_as(_kv_first), _Q, "fused_layout"),
    "7B's fused weight, k and v first": Planted("falcon_7b", fused_as(_kv_first), _Q, "fused_layout"),
    "40B's fused weight, groups innermost": Planted("falcon_40b", fused_as(_groups_innermost), _Q, "fused_layout"),
    "RW's fused weight, q k v innermost": Planted("falcon_rw", fused_as(_thirds_innermost), _Q, "fused_layout"),
    "7B's fused weight, v before k": Planted("falcon_7b", fused_as(_v_before_k), _K, "other_weight|fused_layout"),
    "40B's fused bias in three blocks": Planted(
        "falcon_40b_bias", fused_as(_blocks, only=lambda fused: fused.ndim == 1), _Q, "fused_layout"
    ),
    # another parameter
    "gate and up swapped": Planted(
        "llama_mha",
        swapped((f"{_MLP}.gate_proj.weight", f"{_MLP}.up_proj.weight")),
        f"{_MLP}.gate_proj",
        "other_weight",
    ),
    "k and v swapped": Planted(
        "llama_gqa_8_2", swapped((f"{_K}.weight", f"{_V}.weight")), _K, "other_weight|fused_layout"
    ),
    "biases of k and v swapped": Planted(
        "llama_attention_bias", swapped((f"{_K}.bias", f"{_V}.bias")), _K, "other_weight"
    ),
    "norms of a sequential block swapped": Planted(
        "mistral",
        swapped(("blocks.1.attention_norm.weight", "blocks.1.mlp_norm.weight")),
        "blocks.1.attention_norm",
        "other_weight",
    ),
    "ln_attn and ln_mlp swapped": Planted(
        "falcon_40b",
        swapped(*((f"blocks.0.attention_norm.{leaf}", f"blocks.0.mlp_norm.{leaf}") for leaf in ("weight", "bias"))),
        _NORM,
        "other_weight",
    ),
    "two layers swapped": Planted(
        "llama_deep", _layers(lambda b: [b[0], b[3], b[2], b[1], b[4]]), "blocks.1.attention_norm", "other_weight"
    ),
    "layers in reverse": Planted("falcon_rw", _layers(lambda b: b[::-1]), _NORM, "other_weight"),
    "a layer loaded from the one before": Planted(
        "falcon_7b", _layers(lambda b: [b[0], copy.deepcopy(b[0])]), "blocks.1.attention_norm", "other_weight"
    ),
    "o of another layer": Planted(
        "falcon_40b",
        _copied("blocks.1.attention.o_proj.weight", f"{_O}.weight"),
        "blocks.1.attention.o_proj",
        "other_weight",
    ),
    "an untied head tied": Planted(
        "falcon_7b_untied", _copied("lm_head.weight", "embed.weight"), "logits", "tied_head"
    ),
    "head rows one off": Planted(
        "llama_mha", _copied("lm_head.weight", "lm_head.weight", lambda w: w.roll(1, 0)), "logits"
    ),
    "gate and up taken from every other row": Planted("llama_gqa_8_2", weights(_every_other_row), f"{_MLP}.gate_proj"),
    "last rows of the embedding not loaded": Planted(
        "falcon_rw", weights(lambda m: m.embed.weight[100:].zero_()), "embed"
    ),
    "a NaN in a weight": Planted("falcon_40b", every("v_proj.weight", _not_a_number), _V),
    # biases
    "bias of q missing": Planted("llama_attention_bias", _times("q_proj.bias", 0), _Q, "no_bias"),
    "bias of up missing": Planted("falcon_40b_bias", _times("up_proj.bias", 0), f"{_MLP}.up_proj", "no_bias"),
    "bias of the last norm missing": Planted("falcon_7b", weights(lambda m: m.norm.bias.zero_()), "norm", "no_bias"),
    "bias of down twice": Planted("falcon_rw", _times("down_proj.bias", 2), f"{_MLP}.down_proj", "bias_twice"),
    "bias of o twice": Planted("llama_all_bias", _times("o_proj.bias", 2), _O, "bias_twice"),
    # values
    "a block of a weight off": Planted(
        "llama_mha", every("blocks.1.mlp.down_proj.weight", _a_block_off), "blocks.1.mlp.down_proj"
    ),
    "one number of a weight off": Planted("falcon_40b", every("k_proj.weight", _a_number_off), _K),
    "q 1% large": Planted(
        "llama_gqa_8_2", _times("1.attention.q_proj.weight", 1.01), "blocks.1.attention.q_proj", "scaled"
    ),
    "down 1% small": Planted("falcon_7b", _times("down_proj.weight", 0.99), f"{_MLP}.down_proj", "scaled"),
    "embedding 1% large": Planted("llama_mha", _times("embed.weight", 1.01), "embed", "scaled"),
    "norm weight 1% large": Planted("falcon_rw", _times("0.mlp_norm.weight", 1.01), "blocks.0.mlp_norm", "scaled"),
    "head 1% large": Planted("falcon_40b_untied", _times("lm_head.weight", 1.01), "logits", "scaled"),
    "a value head zeroed": Planted("llama_mha", every("v_proj.weight", _q_heads(_head_zeroed)), _V, "zero"),
    "down not loaded": Planted("mistral", _times("1.mlp.down_proj.weight", 0), "blocks.1.mlp.down_proj", "zero"),
    "all weights through bfloat16": Planted(
        "llama_gqa_8_2", _rounded("", torch.bfloat16), "embed", "weight_rounded|output_rounded"
    ),
    "linear weights through bfloat16": Planted(
        "falcon_rw", _rounded("proj.weight", torch.bfloat16), _Q, "weight_rounded"
    ),
    "linear weights through float16": Planted(
        "falcon_40b", _rounded("proj.weight", torch.float16), _Q, "weight_rounded"
    ),
    "norm weights through bfloat16": Planted(
        "llama_mha", _rounded("norm.weight", torch.bfloat16), _NORM, "weight_rounded"
    ),
    "weights through int8": Planted("llama_mha", every("proj.weight", _to_int8), _Q, "weight_rounded"),
    "an adapter left merged": Planted("falcon_7b", every("v_proj.weight", _low_rank), _V),
    # settings
    "eps 1e-5 for 1e-6": Planted("llama_mha", misread(norm_eps=1e-5), _NORM, "eps"),
    "eps 1e-6 for 1e-5": Planted("falcon_7b", misread(norm_eps=1e-6), _NORM, "eps"),
    "eps 1e-5 for 1e-3": Planted("llama_eps", misread(norm_eps=1e-5), _NORM, "eps"),
    "eps of 1e-12": Planted("falcon_40b", misread(norm_eps=1e-12), _NORM, "eps"),
    "gelu read as its tanh form": Planted("falcon_7b", misread(activation="gelu_tanh"), f"{_MLP}.inner", "activation"),
    "tanh gelu read as gelu": Planted("falcon_gelu_tanh", misread(activation="gelu"), f"{_MLP}.inner", "activation"),
    "silu for gelu": Planted("llama_gelu", misread(activation="silu"), f"{_MLP}.inner", "activation"),
    "relu for silu": Planted("mistral", misread(activation="relu"), f"{_MLP}.inner", "activation"),
}
