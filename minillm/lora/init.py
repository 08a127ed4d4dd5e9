"""How an adapter starts. W (N, K) is the weight it sits on.

    kaiming    A ~ U(-1/sqrt(K), 1/sqrt(K)), B = 0                            LoRA's own; kaiming with a = sqrt(5)
    gaussian   A ~ N(0, 1/R), deviation 1/R, B = 0
    linear     A and B as fresh linears: ΔW is not zero
    pissa      W = U S V^T:   B0 = U_R sqrt(S_R / s),  A0 = sqrt(S_R / s) V_R^T             arXiv 2404.02948 eq. 2-4
    olora      W = Q R:       B0 = Q[:, :R],  A0 = R[:R]                                      arXiv 2406.01775 §3

PiSSA and OLoRA start from A0, B0 and take s B0 A0 out of the base, so that the sum is W still. peft changes W for that,
and its base is then no reference any more; here the layer takes s B0 A0 x away instead (`Adapter.begin_at`). Linears
that are one weight in the checkpoint's format, Falcon's q, k and v, start from that: one A0, and each its rows of B0.

On embeddings A is zero and B ~ N(0, 1), the other way round, as in peft: A is looked up, B multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minillm.checkpoint.weight_map import Rule
from minillm.errors import InputError
from minillm.lora.config import Init, LoraConfig
from minillm.lora.layer import Adapted, Adapter, LoraEmbedding, float_weight, row_norms, shape_of

#: Those that begin with the weight itself.
FROM_WEIGHT: tuple[Init, ...] = ("pissa", "olora")


def fresh(
    layer: Adapted, rank: int, scale: float, config: LoraConfig, generator: torch.Generator | None = None
) -> Adapter:
    """An adapter for this layer, as it starts."""
    base: Any = layer.base
    table = isinstance(layer, LoraEmbedding)
    outputs, inputs = reversed(shape_of(base)) if table else shape_of(base)
    kind, device = base.weight.dtype, base.weight.device
    dtype = torch.promote_types(kind, torch.float32) if kind.is_floating_point else torch.float32
    a, b = torch.empty(rank, inputs, dtype=dtype, device=device), torch.empty(outputs, rank, dtype=dtype, device=device)
    adapter = Adapter(a, b, scale=scale, dropout=0.0 if table else config.dropout).train(layer.training)
    if table:
        if config.dora:
            raise InputError("dora is for linears; leave the embedding out of targets")
        start_embedding(adapter, config.init, generator)
        return adapter
    start(adapter, base, config.init, generator)
    if config.lora_bias:
        adapter.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype, device=device))
    if config.dora:
        with torch.no_grad():
            adapter.magnitude = nn.Parameter(row_norms(float_weight(base, dtype), adapter))
    return adapter


def start(adapter: Adapter, base: nn.Module, init: Init, generator: torch.Generator | None = None) -> None:
    """Fill A and B of an adapter on a linear."""
    with torch.no_grad():
        match init:
            case "kaiming":
                _uniform(adapter.a, generator)
                adapter.b.zero_()
            case "gaussian":
                adapter.a.normal_(0, 1 / adapter.rank, generator=generator)
                adapter.b.zero_()
            case "linear":
                _uniform(adapter.a, generator)
                _uniform(adapter.b, generator)
            case "pissa" | "olora":
                _begin(adapter, *_from_weight(init, float_weight(base, torch.float32), adapter))


@torch.no_grad()
def share(rule: Rule, layers: Sequence[Any], name: str, init: Init) -> None:
    """One A for the linears that are one weight in the checkpoint's format and were named by it, as in peft."""
    adapters: list[Adapter] = [layer.adapters[name] for layer in layers]
    first = adapters[0]
    if init in FROM_WEIGHT:
        whole = rule.join([float_weight(layer.base, torch.float32) for layer in layers])
        a, b = _from_weight(init, whole, first)
        for adapter, rows in zip(adapters, rule.split(b), strict=True):
            _begin(adapter, a, rows)
    for layer, adapter in zip(layers, adapters, strict=True):
        adapter.a = first.a
        if adapter.magnitude is not None:
            adapter.magnitude = nn.Parameter(row_norms(float_weight(layer.base, adapter.a.dtype), adapter))


def _begin(adapter: Adapter, a: Tensor, b: Tensor) -> None:
    adapter.a.copy_(a)
    adapter.b.copy_(b)
    adapter.begin_at(adapter.a.detach().clone(), adapter.b.detach().clone())


def start_embedding(adapter: Adapter, init: Init, generator: torch.Generator | None = None) -> None:
    """The same on an embedding."""
    if init in FROM_WEIGHT:
        raise InputError(f"init {init} is for linears; leave the embedding out of targets or take another init")
    with torch.no_grad():
        adapter.a.zero_()
        adapter.b.normal_(0, 1, generator=generator)
        if init == "linear":
            adapter.a.normal_(0, 1, generator=generator)


def _uniform(x: Tensor, generator: torch.Generator | None) -> None:
    """U(-1/sqrt(K), 1/sqrt(K)) for x (.., K): what nn.Linear starts from."""
    bound = 1 / math.sqrt(x.shape[1])
    x.uniform_(-bound, bound, generator=generator)


def _from_weight(init: Init, weight: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A0 (R, K) and B0 (N, R) of a weight (N, K)."""
    if adapter.rank > min(weight.shape):
        raise InputError(
            f"{init} takes {adapter.rank} directions out of a weight {tuple(weight.shape)}; lower the rank"
        )
    return (_pissa if init == "pissa" else _olora)(weight, adapter.rank, adapter.scale)


def _pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The R largest singular directions, s B A = U_R S_R V_R^T."""
    if scale <= 0:
        raise InputError(f"pissa divides by the scale, which is {scale:g}; give a positive alpha")
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:  # scales nothing, as in peft
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()
