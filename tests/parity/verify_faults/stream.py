"""Faults around attention: embedding, norms, feed-forward, residual stream, head, and dtypes between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model import Decoder
from minillm.model.block import ParallelBlock, SequentialBlock
from tests.parity.verify_faults.planted import (
    Bench,
    Plant,
    Planted,
    both,
    forward,
    one_late,
    output,
    part,
    parts,
    through,
)

_HALF, _SHORT = torch.bfloat16, torch.float16


def _block(wrong: Callable[..., Tensor]) -> Plant:
    """Other blocks: wrong(block, x, *rest), `rest` being what attention wants besides its input."""

    def plant(bench: Bench) -> None:
        for kind in (SequentialBlock, ParallelBlock):
            bench.patch.setattr(kind, "forward", wrong)

    return plant


def _norms(wrong: Callable[[nn.Module, Tensor], Tensor]) -> Plant:
    return forward(parts("norm"), lambda norm, right, x: wrong(norm, x))


def _unit(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _centred_rms(norm: Any, x: Tensor) -> Tensor:
    """LayerNorm without a bias."""
    return norm.weight * _unit(_centred(x), norm.eps)


def _rms_and_bias(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * _unit(x, norm.eps) + norm.bias


def _one_more(norm: Any, x: Tensor) -> Tensor:
    return (1 + norm.weight) * _unit(x, norm.eps)


def _bare(norm: Any, x: Tensor) -> Tensor:
    return _unit(x, norm.eps)


def _eps_of_a_thousandth(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * _unit(x.float(), 1e-3).to(x.dtype)


def _read_in_bfloat16(module: Any, right: Any, x: Tensor) -> Tensor:
    return right(through(_HALF)(x))


def _eps_outside_the_root(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + norm.eps)


def _unbiased(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * _centred(x) / (x.var(-1, keepdim=True) + norm.eps).sqrt() + norm.bias


# --- blocks


def _parallel(self: Any, x: Tensor, *rest: object) -> Tensor:
    return x + self.attention(self.attention_norm(x), *rest) + self.mlp(self.mlp_norm(x))


def _sequential(self: Any, x: Tensor, *rest: object) -> Tensor:
    norm = self.attention_norm if self.mlp_norm is None else self.mlp_norm
    x = x + self.attention(self.attention_norm(x), *rest)
    return x + self.mlp(norm(x))


def _one_norm_for_two(self: Any, x: Tensor, *rest: object) -> Tensor:
    normed = self.attention_norm(x)
    return x + (self.mlp(normed) + self.attention(normed, *rest))


def _norms_crossed(self: Any, x: Tensor, *rest: object) -> Tensor:
    attended = self.attention(self.mlp_norm(x), *rest)
    return x + (self.mlp(self.attention_norm(x)) + attended)


def _normed_residual(self: Any, x: Tensor, *rest: object) -> Tensor:
    normed = self.attention_norm(x)
    x = normed + self.attention(normed, *rest)
    return x + self.mlp(self.mlp_norm(x))


def _no_first_residual(self: Any, x: Tensor, *rest: object) -> Tensor:
    x = self.attention(self.attention_norm(x), *rest)
    return x + self.mlp(self.mlp_norm(x))


def _no_second_residual(self: Any, x: Tensor, *rest: object) -> Tensor:
    return self.mlp(self.mlp_norm(x + self.attention(self.attention_norm(x), *rest)))


def _second_from_the_start(self: Any, x: Tensor, *rest: object) -> Tensor:
    """The second residual is the stream before attention."""
    return x + self.mlp(self.mlp_norm(x + self.attention(self.attention_norm(x), *rest)))


def _attention_dropped(self: Any, x: Tensor, *rest: object) -> Tensor:
    normed = self.attention_norm(x)
    self.attention(normed, *rest)
    return x + self.mlp(normed)


def _parallel_without_residual(self: Any, x: Tensor, *rest: object) -> Tensor:
    normed = self.attention_norm(x)
    return self.mlp(normed) + self.attention(normed, *rest)


def _attention_of_the_stream(self: Any, x: Tensor, *rest: object) -> Tensor:
    """Attention reads what no norm has touched."""
    self.attention_norm(x)
    x = x + self.attention(x, *rest)
    return x + self.mlp(self.mlp_norm(x))


def _mlp_of_the_stream(self: Any, x: Tensor, *rest: object) -> Tensor:
    return x + (self.mlp(x) + self.attention(self.attention_norm(x), *rest))


# --- the two ends


def _hidden(self: Any, tokens: Tensor, *, right: Any = Decoder.hidden, **how: Any) -> Tensor:
    """Everything but the last norm."""
    taken: list[Tensor] = []
    hook = self.norm.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    right(self, tokens, **how)
    hook.remove()
    return taken[0]


def _head(change: Callable[[Tensor], Tensor]) -> Plant:
    return output(lambda bench: bench.ours, change)


def _capped(logits: Tensor) -> Tensor:
    return 30 * torch.tanh(logits / 30)


def _tokens(change: Callable[[Tensor], Tensor]) -> Plant:
    return forward(part("embed"), lambda _, right, ids: right(change(ids)))


# --- dtypes


def _linear(name: str, wrong: Callable[[Any, Tensor], Tensor]) -> Plant:
    return forward(parts(name), lambda linear, right, x: wrong(linear, x))


def _in_bfloat16(linear: Any, x: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), linear.weight.bfloat16()).to(x.dtype)


def _products_in_tf32(linear: Any, x: Tensor) -> Tensor:
    """Ten bits of mantissa in the factors, fp32 in the sum."""

    def cut(y: Tensor) -> Tensor:
        return ((y.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return F.linear(cut(x), cut(linear.weight.detach()))


def _swapped_gate(mlp: Any, right: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(mlp.gate_proj(x) * mlp.activation(mlp.up_proj(x)))


def _act_last(mlp: Any, right: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(mlp.activation(mlp.gate_proj(x) * mlp.up_proj(x)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _short_silu(x: Tensor) -> Tensor:
    return F.silu(x.bfloat16()).to(x.dtype)


def _act(wrong: Callable[[Tensor], Tensor]) -> Plant:
    def plant(bench: Bench) -> None:
        for mlp in parts("mlp")(bench):
            mlp.activation = wrong  # type: ignore[assignment]

    return plant


_Q, _NORM, _MLP, _LAST = "blocks.0.attention.q_proj", "blocks.0.attention_norm", "blocks.0.mlp", "blocks.1"

STREAM: dict[str, Planted] = {
    # embedding
    "token ids one off": Planted("llama_mha", _tokens(lambda ids: (ids + 1) % 131), "embed", "token_ids"),
    "tokens one late": Planted("falcon_7b", _tokens(one_late), "embed", "shifted"),
    "embedding times sqrt(D)": Planted(
        "llama_gqa_8_2", output(part("embed"), lambda x: 8 * x), "embed", "embedding_scale"
    ),
    "embedding normed": Planted("falcon_rw", output(part("embed"), lambda x: _unit(x, 1e-5)), "embed"),
    # norms
    "eps outside the root": Planted("llama_eps", _norms(_eps_outside_the_root), _NORM, "eps"),
    "LayerNorm for RMSNorm": Planted("llama_mha", _norms(_centred_rms), _NORM, "other_norm"),
    "RMSNorm for LayerNorm": Planted("falcon_7b", _norms(_rms_and_bias), _NORM, "other_norm"),
    "norm weight added to 1": Planted("llama_gqa_8_2", _norms(_one_more), _NORM, "offset_weight"),
    "norm weight left out": Planted("mistral", _norms(_bare), _NORM, "no_weight"),
    "LayerNorm without its bias": Planted("falcon_40b", _norms(_centred_rms), _NORM, "no_bias"),
    "variance over D - 1": Planted("falcon_40b", _norms(_unbiased), _NORM, "scaled"),
    "norm of the input in bfloat16": Planted(
        "llama_mha", forward(parts("norm"), _read_in_bfloat16), _NORM, "input_rounded"
    ),
    "norm output in bfloat16": Planted("falcon_rw", output(parts("norm"), through(_HALF)), _NORM, "output_rounded"),
    "norm output in float16": Planted("llama_mha", output(parts("norm"), through(_SHORT)), _NORM, "output_rounded"),
    "last norm not applied": Planted("falcon_40b", forward(part("norm"), lambda _, right, x: x), "norm", "not_normed"),
    "last norm left out": Planted(
        "llama_mha", lambda bench: bench.patch.setattr(Decoder, "hidden", _hidden), "logits", "wrong_input"
    ),
    # linear
    "q in bfloat16": Planted("llama_mha", _linear("q_proj", _in_bfloat16), _Q, "output_rounded"),
    "products in TF32": Planted("mistral", _linear("proj", _products_in_tf32), _Q),
    "input of down in bfloat16": Planted(
        "llama_mha", forward(parts("down_proj"), _read_in_bfloat16), f"{_MLP}.down_proj", "input_rounded"
    ),
    "output of q in bfloat16": Planted("falcon_40b", output(parts("q_proj"), through(_HALF)), _Q, "output_rounded"),
    # feed-forward
    "act(up) * gate": Planted(
        "llama_gqa_8_2", forward(parts("mlp"), _swapped_gate), f"{_MLP}.inner", "gate_up_swapped"
    ),
    "act(gate * up)": Planted(
        "mistral", forward(parts("mlp"), _act_last), f"{_MLP}.inner", "gate_up_swapped|activation"
    ),
    "gelu by a sigmoid": Planted("falcon_7b", _act(_quick_gelu), f"{_MLP}.inner", "activation"),
    "no activation": Planted("falcon_rw", _act(lambda x: x), f"{_MLP}.inner", "activation"),
    "relu squared": Planted("falcon_40b", _act(lambda x: F.relu(x) ** 2), f"{_MLP}.inner", "activation"),
    "activation in bfloat16": Planted("llama_mha", _act(_short_silu), f"{_MLP}.inner"),
    # residual stream and order
    "sequential for parallel, 7B": Planted(
        "falcon_7b", _block(_sequential), f"{_MLP}.up_proj", "sequential_for_parallel"
    ),
    "sequential for parallel, 40B": Planted(
        "falcon_40b", _block(_sequential), "blocks.0.mlp_norm", "sequential_for_parallel"
    ),
    "sequential for parallel, 11B": Planted(
        "falcon_11b", _block(_sequential), f"{_MLP}.up_proj", "sequential_for_parallel"
    ),
    "parallel for sequential, Llama": Planted("llama_mha", _block(_parallel), "blocks.0.residual", "residual"),
    "parallel for sequential, RW": Planted("falcon_rw", _block(_parallel), "blocks.0.residual", "residual"),
    "one norm for two branches": Planted("falcon_40b", _block(_one_norm_for_two), f"{_MLP}.up_proj", "wrong_input"),
    "norms of two branches crossed": Planted("falcon_40b", _block(_norms_crossed), _Q, "wrong_input"),
    "residual of the normed stream": Planted(
        "llama_gqa_8_2", _block(_normed_residual), "blocks.0.residual", "residual|wrong_input"
    ),
    "no residual around attention": Planted("llama_mha", _block(_no_first_residual), "blocks.0.residual", "residual"),
    "no residual around the feed-forward": Planted("falcon_rw", _block(_no_second_residual), "blocks.0", "residual"),
    "second residual from the start": Planted(
        "mistral", _block(_second_from_the_start), "blocks.0", "residual|wrong_input"
    ),
    "parallel without its residual": Planted("falcon_7b", _block(_parallel_without_residual), "blocks.0", "residual"),
    "parallel without its attention": Planted("falcon_11b", _block(_attention_dropped), "blocks.0", "residual"),
    "attention reads the stream": Planted("llama_mha", _block(_attention_of_the_stream), _Q, "wrong_input"),
    "feed-forward reads the stream": Planted("falcon_7b", _block(_mlp_of_the_stream), f"{_MLP}.up_proj", "wrong_input"),
    "a layer skipped": Planted("llama_deep", forward(part("blocks.3"), lambda _, right, x, *rest: x), "blocks.3"),
    "stream in float16": Planted("llama_mha", output(part("blocks.1"), through(_SHORT)), _LAST, "output_rounded"),
    "stream one token late": Planted("falcon_7b", output(part("blocks.1"), one_late), _LAST, "shifted"),
    "dropout of the feed-forward": Planted(
        "falcon_40b", output(parts("down_proj"), lambda x: F.dropout(x, 0.1)), f"{_MLP}.down_proj"
    ),
    "attention halved before it is added": Planted(
        "llama_mha", output(parts("attention"), lambda x: x / 2), "blocks.0.residual", "residual"
    ),
    # head
    "logits capped": Planted("llama_mha", _head(_capped), "logits", "softcap"),
    "logits over sqrt(D)": Planted("falcon_7b", _head(lambda x: x / 8), "logits", "scaled"),
    "logits one token late": Planted("falcon_rw", _head(one_late), "logits", "shifted"),
    "logits in bfloat16": Planted("falcon_40b_untied", _head(through(_HALF)), "logits", "output_rounded"),
    "logits of the last token only": Planted("falcon_7b", _head(lambda x: x[:, -1:]), "logits", "shape"),
    "log-probabilities for logits": Planted("mistral", _head(lambda x: x.log_softmax(dim=-1)), "logits"),
    # in half precision
    "eps 1e-3 for 1e-6 in bfloat16": Planted("llama_mha", _norms(_eps_of_a_thousandth), _NORM, "eps", dtype=_HALF),
    "k scaled in float16": Planted(
        "falcon_40b", output(parts("k_proj"), lambda x: 1.01 * x), "blocks.0.attention.k_proj", "scaled", dtype=_SHORT
    ),
    "gelu by a sigmoid in float16": Planted(
        "falcon_rw", _act(_quick_gelu), f"{_MLP}.inner", "activation", dtype=_SHORT
    ),
    "sequential for parallel in bfloat16": Planted(
        "falcon_7b", _block(_sequential), f"{_MLP}.up_proj", "sequential_for_parallel", dtype=_HALF
    ),
    "two faults, the first named": Planted(
        "llama_gqa_8_2", both(_head(_capped), output(part("embed"), lambda x: 8 * x)), "embed", "embedding_scale"
    ),
}
