"""Faults planted in transformers' model or code; ours is right, and theirs must be accused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.verify_faults.planted import Bench, Plant, Planted, both, forward, output, through

_HALF = torch.bfloat16
_Q, _NORM, _MLP = "blocks.0.attention.q_proj", "blocks.0.attention_norm", "blocks.0.mlp"
_ROTATED, _SCORES = "blocks.0.attention.q_rotated", "blocks.0.attention.scores"


def _kind(ending: str) -> Callable[[Bench], list[Any]]:
    """Their modules whose class names end so."""
    return lambda bench: [m for m in bench.theirs.model.modules() if type(m).__name__.endswith(ending)]


def _named(ending: str) -> Callable[[Bench], list[Any]]:
    """Their modules whose names end so."""
    return lambda bench: [m for name, m in bench.theirs.model.named_modules() if name.endswith(ending)]


def _set(modules: Callable[[Bench], list[Any]], name: str, value: Any) -> Plant:
    def plant(bench: Bench) -> None:
        chosen = modules(bench)
        assert chosen
        for module in chosen:
            assert hasattr(module, name)
            setattr(module, name, value)

    return plant


def _frequencies(change: Callable[[Tensor], Tensor]) -> Plant:
    def plant(bench: Bench) -> None:
        rotary = bench.theirs.body.rotary_emb
        rotary.inv_freq = change(rotary.inv_freq)

    return plant


def _patch(name: str, wrong: Callable[..., Any]) -> Plant:
    """A function of their modelling file: wrong(right, *args)."""

    def plant(bench: Bench) -> None:
        import transformers

        kind = "falcon" if bench.theirs.falcon else "llama"
        module = getattr(getattr(transformers.models, kind), f"modeling_{kind}")
        right = getattr(module, name)
        bench.patch.setattr(module, name, lambda *args, **kwargs: wrong(right, *args, **kwargs))

    return plant


def _see_the_next(right: Any, *args: Any, **kwargs: Any) -> Tensor:
    mask = right(*args, **kwargs)  # (B, 1, T, S) bool
    return mask | (mask.roll(-1, dims=-2) & mask[:, :, -1:])


def _see_padding(right: Any, *args: Any, **kwargs: Any) -> Tensor:
    return torch.ones_like(right(*args, **kwargs)).tril()


def _default_frequencies(frequency: Tensor) -> Tensor:
    size = 2 * len(frequency)
    return 500.0 ** (-torch.arange(0, size, 2) / size)


def _turned_in_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _interleaved(right: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Both turned in pairs (2i, 2i + 1), angles too."""
    cos, sin = (table[:, None, :, : table.shape[-1] // 2].repeat_interleave(2, dim=-1) for table in (cos, sin))
    return tuple(x * cos + _turned_in_pairs(x) * sin for x in (q, k))


def _offset(norm: Any, right: Any, x: Tensor) -> Tensor:
    return right(x) * (1 + 1 / norm.weight)


def _ids_off(embed: Any, right: Any, ids: Tensor) -> Tensor:
    return right((ids + 1) % 131)


def _rounded_weight(linear: Any, right: Any, x: Tensor) -> Tensor:
    return F.linear(x, through(_HALF)(linear.weight))


def _transposed(linear: Any, right: Any, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.T)


def _half_alibi(right: Any, *args: Any, **kwargs: Any) -> Tensor:
    return right(*args, **kwargs) / 2


def _alibi_of_slots(right: Any, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return right(torch.ones_like(mask), *args, **kwargs)


def _capped(logits: Tensor) -> Tensor:
    return 30 * torch.tanh(logits / 30)


def _bias_again(linear: Any, right: Any, x: Tensor) -> Tensor:
    return right(x) + linear.bias


_Theirs = partial(Planted, side="theirs")

THEIRS: dict[str, Planted] = {
    "their eps": _Theirs("llama_mha", _set(_kind("RMSNorm"), "variance_epsilon", 1e-4), _NORM, "eps"),
    "their LayerNorm's eps": _Theirs("falcon_40b", _set(_kind("LayerNorm"), "eps", 1e-3), _NORM, "eps"),
    "their norm weight added to 1": _Theirs("mistral", forward(_kind("RMSNorm"), _offset), _NORM, "offset_weight"),
    "their theta": _Theirs(
        "falcon_7b", _frequencies(lambda f: 5e5 ** (-torch.arange(0, 8, 2) / 8)), "rotary.cos", "theta"
    ),
    "their llama3 scaling dropped": _Theirs(
        "llama_rope_llama3", _frequencies(_default_frequencies), "rotary.cos", "scaling"
    ),
    "their linear scaling dropped": _Theirs(
        "llama_rope_linear", _frequencies(lambda f: 4 * f), "rotary.cos", "scaling"
    ),
    "their yarn without its stretch": _Theirs(
        "llama_rope_yarn", _set(_kind("RotaryEmbedding"), "attention_scaling", 1.0), "rotary.cos", "stretch"
    ),
    "their frequencies in bfloat16": _Theirs(
        "llama_gqa_8_2", _frequencies(through(_HALF)), "rotary.cos", "frequencies_rounded"
    ),
    "their whole model cast to bfloat16": _Theirs(
        "llama_gqa_8_2",
        lambda bench: bench.theirs.model.to(_HALF),
        "rotary.cos",
        "frequencies_rounded",
        dtype=_HALF,
        length=320,
    ),
    "their rotation interleaved": _Theirs(
        "falcon_7b", _patch("apply_rotary_pos_emb", _interleaved), _ROTATED, "interleaved"
    ),
    "their pairs neighbours, their angles not": _Theirs(
        "falcon_40b", _patch("rotate_half", lambda _, x: _turned_in_pairs(x)), _ROTATED, "interleaved"
    ),
    "their scale": _Theirs("llama_head_dim", _set(_kind("Attention"), "scaling", 8**-0.5), _SCORES, "scale"),
    "their mask sees the next token": _Theirs(
        "llama_mha", _patch("create_causal_mask", _see_the_next), _SCORES, "mask"
    ),
    "their padding visible": _Theirs("falcon_40b", _patch("create_causal_mask", _see_padding), _SCORES, "mask"),
    "their ALiBi halved": _Theirs("falcon_rw", _patch("build_alibi_tensor", _half_alibi), _SCORES, "alibi"),
    "their ALiBi counts pads": _Theirs(
        "falcon_rw", _patch("build_alibi_tensor", _alibi_of_slots), _SCORES, "positions|alibi"
    ),
    "their activation": _Theirs(
        "llama_mha", _set(_kind("MLP"), "act_fn", torch.nn.GELU()), f"{_MLP}.inner", "activation"
    ),
    "their gelu's tanh form": _Theirs(
        "falcon_7b", _set(_kind("MLP"), "act", torch.nn.GELU(approximate="tanh")), f"{_MLP}.inner", "activation"
    ),
    "their q 1% large": _Theirs(
        "llama_gqa_8_2", output(_named("0.self_attn.q_proj"), lambda x: 1.01 * x), _Q, "scaled"
    ),
    "their down's weight in bfloat16": _Theirs(
        "llama_mha", forward(_named("down_proj"), _rounded_weight), f"{_MLP}.down_proj", "weight_rounded"
    ),
    "their dense transposed": _Theirs(
        "falcon_7b", forward(_named("dense"), _transposed), "blocks.0.attention.o_proj", "transposed"
    ),
    "their bias twice": _Theirs(
        "falcon_rw", forward(_named("dense_h_to_4h"), _bias_again), f"{_MLP}.up_proj", "bias_twice"
    ),
    "their norm output in bfloat16": _Theirs(
        "falcon_40b", output(_named("ln_mlp"), through(_HALF)), "blocks.0.mlp_norm", "output_rounded"
    ),
    "their token ids one off": _Theirs("llama_mha", forward(_named("embed_tokens"), _ids_off), "embed", "token_ids"),
    "their logits capped": _Theirs("mistral", output(_named("lm_head"), _capped), "logits", "softcap"),
    "their stream in bfloat16": _Theirs(
        "falcon_7b", output(_named("h.1"), lambda out: (through(_HALF)(out[0]), *out[1:])), "blocks.1", "output_rounded"
    ),
    "theirs, and ours later": _Theirs(
        "llama_gqa_8_2",
        both(
            _set(_kind("RMSNorm"), "variance_epsilon", 1e-4),
            output(lambda bench: bench.ours, _capped),
        ),
        _NORM,
        "eps",
    ),
}
