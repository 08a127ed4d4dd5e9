"""Adapters merged into the weights: a new model without adapters, and what the merging lost.

    W' = W + s B A                          DoRA: W' = g (W + s B A)            b' = b + s b_B

W' is computed in fp32 and rounded once to the format of W. In bf16 a step of ΔW that is smaller than 2^-9 of a weight
is lost in that rounding, so merging is never exact there: the report says how much of ΔW got lost, layer by layer,
and on request what it does to the logits.

The model that is merged stays as it is, codes of a quantised base included; so there is nothing to unmerge. A quantised
layer becomes a float one (quantise the result again if that is wanted: `minillm.quant.quantize_linears`). Weights that
no adapter touches are shared between both models: who goes on to train the new one takes a `copy.deepcopy` of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn

from minillm.errors import InputError
from minillm.lora.choice import state_of
from minillm.lora.inject import _check, check_decoder, layers, unfreeze
from minillm.lora.layer import Adapted, Adapter, LoraEmbedding, LoraLinear, Retrained, float_weight, lengths
from minillm.model import Decoder
from minillm.model.linear import Linear, make_linear


class LayerChange(NamedTuple):
    """size: |ΔW| / |W|. lost: |W' - (W + ΔW)| / |ΔW|, both Frobenius norms; 0 where nothing changes."""

    size: float
    lost: float


class Merged(NamedTuple):
    """The new model; layer -> what merging did; largest and mean difference of the logits, where tokens were given."""

    model: Decoder
    layers: Mapping[str, LayerChange]
    logits_max: float | None
    logits_mean: float | None


@torch.no_grad()
def merged(model: Decoder, *, dtype: torch.dtype | None = None, tokens: Tensor | None = None) -> Merged:
    """The active adapters of `model` in the weights of a new one, in eval mode.

    dtype: of merged layers whose base is quantised; by default that of the embedding. tokens (B, T): compare the logits
    of both models on these. Raises InputError where adapters are chosen by row or none is active.
    """
    check_decoder(model)
    choice = state_of(model).choice
    if not choice.names() or choice.rows is not None:
        raise InputError("no adapter is active for the whole batch; activate those that shall be merged")
    _check(model, choice.names())
    memo: dict[int, object] = {id(x): nn.Parameter(x.detach(), requires_grad=False) for x in _bases(model)}
    made = copy.deepcopy(model, memo)
    report: dict[str, LayerChange] = {}
    kind = dtype or model.embed.weight.dtype
    for name, layer in reversed(list(layers(made))):  # inner ones first: a retrained base is plain by then
        plain = _trained(layer) if isinstance(layer, Retrained) else _merged_layer(layer, kind, made, name, report)
        parent, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(parent), leaf, plain)
    made.eval()
    unfreeze(made)
    vars(made).pop("_lora")
    made.contexts = noop_context_fn
    if tokens is None:
        return Merged(made, report, None, None)
    difference = (_logits(model, tokens) - _logits(made, tokens)).abs()
    return Merged(made, report, float(difference.max()), float(difference.mean()))


def _bases(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".adapters." not in name]


def _logits(model: Decoder, tokens: Tensor) -> Tensor:
    training = model.training
    try:
        found: Tensor = model.eval()(tokens).float()
        return found
    finally:
        model.train(training)


def _trained(layer: Retrained) -> nn.Module:
    """The base with the active adapter's own parameters."""
    base = layer.base
    for key, value in layer._replaced().items():
        setattr(base, key, nn.Parameter(value.detach().clone()))
    return base


def _merged_layer(
    layer: Adapted, dtype: torch.dtype, model: Decoder, name: str, report: dict[str, LayerChange]
) -> nn.Module:
    active: list[Any] = [layer.adapters[each] for each in layer.choice.names() if each in layer.adapters]
    if not active:
        return layer.base
    wide = torch.promote_types(float_dtype(layer, dtype), torch.float32)
    before = float_weight(layer.base, wide)
    exact = merged_weight(before, layer, active)
    plain = _embedding(layer, model) if isinstance(layer, LoraEmbedding) else _linear(layer, dtype, model)
    plain.weight = nn.Parameter(exact.to(float_dtype(layer, dtype)))
    if isinstance(plain, nn.Linear):
        for adapter in active:
            if adapter.bias is not None:
                old = 0 if plain.bias is None else plain.bias.to(wide)
                plain.bias = nn.Parameter((old + adapter.bias * adapter.scale).to(plain.weight.dtype))
    change = torch.linalg.norm(exact - before)
    size, lost = change / torch.linalg.norm(before), torch.linalg.norm(plain.weight.to(wide) - exact) / change
    report[name] = LayerChange(float(size), float(lost) if change > 0 else 0.0)
    return plain


def merged_weight(weight: Tensor, layer: Adapted, active: list[Adapter]) -> Tensor:
    """W' (N, K), or a table (V, D), in the format of `weight`: the adapters' changes of `weight` itself, added up."""
    total = weight
    for adapter in active:
        delta = adapter.delta().to(weight.dtype)
        if isinstance(layer, LoraEmbedding):
            total = total + delta.T
        elif adapter.magnitude is None:
            total = total + delta
        else:
            changed = weight + delta
            gain = adapter.magnitude / lengths(changed)
            total = total + (gain[:, None] * changed - weight)
    return total


def float_dtype(layer: Adapted, dtype: torch.dtype) -> torch.dtype:
    """The format of the merged weight: the base's own, or `dtype` where that is quantised."""
    own = layer.weight.dtype if isinstance(layer, LoraLinear | LoraEmbedding) else dtype
    return own if own.is_floating_point else dtype


def _linear(layer: Adapted, dtype: torch.dtype, model: Decoder) -> nn.Linear:
    """A float linear without numbers, with the bias of the base."""
    base = layer.base
    if isinstance(base, nn.Linear):
        plain = copy.copy(base)
        plain._parameters = dict(base._parameters)
        return plain
    quantised: Any = base
    outputs, inputs = quantised.shape
    with torch.device("meta"):
        made = make_linear(model.config, inputs, outputs, bias=False)
    if quantised.bias is not None:
        made.bias = nn.Parameter(quantised.bias.detach().to(dtype))
    return made


def _embedding(layer: Adapted, model: Decoder) -> nn.Embedding:
    """The table without its numbers. A head that was tied to it keeps the base's, and is tied no more."""
    base = layer.base
    assert isinstance(base, nn.Embedding)
    if model.config.tied_embeddings:
        with torch.device("meta"):
            head = Linear(base.embedding_dim, base.num_embeddings, bias=False)
        head.weight = base.weight
        model.lm_head, model.config = head, replace(model.config, tied_embeddings=False)
    plain = copy.copy(base)
    plain._parameters = dict(base._parameters)
    return plain
