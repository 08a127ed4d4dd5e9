"""Adapters put onto a model, chosen, and taken off again.

    add(model, rank=16, alpha=32, targets=["q_proj", "v_proj"])     a fresh adapter, active and trained alone
    with disabled(model): ...                                       the base, bitwise
    activate(model, "a", "b")                                       these, added up
    with for_rows(model, ["a", None, "b"]): ...                     one for each row of the batch
    remove(model, "a")                                              the last one leaves the model as it was

The base is frozen and never changed. Layers are wrapped in place (`minillm.lora.layer`), so every kind of linear and
every family takes adapters alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minillm.errors import InputError, nearest
from minillm.lora.config import LoraConfig
from minillm.lora.init import start, start_embedding
from minillm.lora.layer import Adapted, Adapter, Choice, LoraEmbedding, LoraLinear, Retrained, float_weight, row_norms
from minillm.lora.targets import fused_targets, names, pattern_value, retrained, targets
from minillm.model import Decoder


def add(
    model: Decoder,
    config: LoraConfig | None = None,
    *,
    name: str = "default",
    generator: torch.Generator | None = None,
    **fields: Any,
) -> list[str]:
    """Put an adapter on the model; returns the names of the adapted modules.

    config, or its fields by keyword; lists may stand for tuples. From then on this adapter alone is active and trained:
    every other parameter is frozen. generator: where random numbers come from. Raises InputError for a target that
    fits nothing, a rank below 1, a name that is taken.
    """
    config = _config(config, fields)
    if "." in name or not name:
        raise InputError(f"an adapter cannot be called {name!r}; give a name without dots")
    if name in adapters(model):
        raise InputError(f"the model has an adapter {name!r} already; give another name or remove it first")
    chosen, anew = targets(model, config), retrained(model, config)
    if model.config.tied_embeddings and "embed" in anew:
        raise InputError("the embedding is tied to the head and cannot be retrained alone; take it out of retrain")
    choice = _choice(model)
    theirs = names(model)
    for module in chosen:
        _adapt(model, module, (module, theirs.get(module, module)), name, config, generator, choice)
    for parts in fused_targets(model, config):
        _share(model, parts, name, config)
    for module in anew:
        _retrain(model, module, name, [each for each, _ in model.get_submodule(module).named_parameters()], choice)
    if config.biases != "none":
        _retrain_biases(model, name, chosen, config.biases == "all", choice)
    _configs(model)[name] = config
    activate(model, name)
    return chosen


def _config(config: LoraConfig | None, fields: Mapping[str, Any]) -> LoraConfig:
    known = LoraConfig.__dataclass_fields__
    for field in fields:
        if field not in known:
            raise InputError(f"{field} is no setting of an adapter{nearest(field, known)}; have {', '.join(known)}")
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return replace(config or LoraConfig(), **plain)


def _adapt(  # one call, one caller
    model: Decoder,
    module: str,
    called: tuple[str, str],
    name: str,
    config: LoraConfig,
    generator: torch.Generator | None,
    choice: Choice,
) -> None:
    layer = model.get_submodule(module)
    if not isinstance(layer, Adapted):
        layer = _wrap(model, module, (LoraEmbedding if isinstance(layer, nn.Embedding) else LoraLinear)(layer, choice))
    rank = pattern_value(config.rank_pattern, called, config.rank)
    scale = config.scale(rank, pattern_value(config.alpha_pattern, called, config.alpha))
    layer.adapters[name] = fresh(layer, rank, scale, config, generator)


def _share(model: Decoder, parts: Sequence[str], name: str, config: LoraConfig) -> None:
    """One A for linears that are one weight in the checkpoint's format and were named by it."""
    if config.init in ("pissa", "olora"):
        raise InputError(f"{config.init} of a fused weight needs the whole; name q_proj, k_proj and v_proj")
    layers: list[Any] = [model.get_submodule(part) for part in parts]
    first = layers[0].adapters[name]
    for layer in layers[1:]:
        own = layer.adapters[name]
        own.a = first.a
        if own.magnitude is not None:
            own.magnitude = nn.Parameter(row_norms(float_weight(layer.base, own.a.dtype), own).detach())


def fresh(
    layer: Adapted, rank: int, scale: float, config: LoraConfig, generator: torch.Generator | None = None
) -> Adapter:
    """An adapter for this layer, as it starts."""
    base: Any = layer.base
    table = isinstance(layer, LoraEmbedding)
    shape = base.shape if hasattr(base, "dequantised") else base.weight.shape
    outputs, inputs = (int(size) for size in (reversed(shape) if table else shape))
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


def _retrain(model: Decoder, module: str, name: str, parameters: Sequence[str], choice: Choice) -> None:
    layer = model.get_submodule(module)
    if isinstance(layer, Adapted):  # beneath the adapters: their base
        module, layer = f"{module}.base", layer.base
    if any(True for _ in layer.children()) and not isinstance(layer, Retrained):
        raise InputError(f"{module} has modules within and cannot be retrained as one; name those")
    if not isinstance(layer, Retrained):
        layer = _wrap(model, module, Retrained(layer, choice))
    layer.own(name, parameters)


def _retrain_biases(model: Decoder, name: str, chosen: Sequence[str], everywhere: bool, choice: Choice) -> None:
    owners = [each.rpartition(".")[0] for each, _ in model.named_parameters() if each.endswith(".bias")]
    bases = {owner.replace(".base", "") for owner in owners if ".adapters." not in owner}
    for module in sorted(bases):
        if everywhere or module in chosen:
            _retrain(model, module, name, ["bias"], choice)


def _wrap(model: nn.Module, module: str, layer: Any) -> Any:
    parent, _, leaf = module.rpartition(".")
    layer.train(model.get_submodule(module).training)
    setattr(model.get_submodule(parent), leaf, layer)
    return layer


def layers(model: nn.Module) -> Iterator[tuple[str, Adapted | Retrained]]:
    """All wrapped modules, outer ones first."""
    yield from ((name, m) for name, m in model.named_modules() if isinstance(m, Adapted | Retrained))


def active(model: nn.Module) -> tuple[str, ...]:
    """The adapters that are added up now."""
    return _choice(model).active


def adapters(model: nn.Module) -> list[str]:
    """Names of the adapters on the model, in the order they came."""
    return list(_configs(model))


def config_of(model: nn.Module, name: str) -> LoraConfig:
    """The settings of an adapter; InputError where there is none of that name."""
    _check(model, [name])
    return _configs(model)[name]


def activate(model: nn.Module, *chosen: str) -> None:
    """Make these adapters the active ones, added up in this order; they are trained, all else is frozen."""
    _check(model, chosen)
    _choice(model).active = chosen
    model.requires_grad_(False)
    for parameter in parameters(model, *chosen):
        parameter.requires_grad_(True)


def parameters(model: nn.Module, *chosen: str) -> list[nn.Parameter]:
    """Those of the named adapters."""
    found = [
        parameter
        for _, layer in layers(model)
        for name in chosen
        if name in layer.adapters
        for parameter in layer.adapters[name].parameters()
    ]
    return list(dict.fromkeys(found))  # an A may be shared


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """While it lasts the model is its base, bit for bit: the reference of DPO and PPO."""
    choice = _choice(model)
    before, choice.enabled = choice.enabled, False
    try:
        yield
    finally:
        choice.enabled = before


@contextlib.contextmanager
def for_rows(model: nn.Module, chosen: Sequence[str | None]) -> Iterator[None]:
    """While it lasts each row of the batch goes through the adapter named for it; None: the base alone."""
    _check(model, [name for name in chosen if name is not None])
    choice = _choice(model)
    before, choice.rows = choice.rows, tuple(chosen)
    try:
        yield
    finally:
        choice.rows = before


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter off; layers without any are what they were before."""
    _check(model, [name])
    choice = _choice(model)
    choice.active = tuple(each for each in choice.active if each != name)
    for path, layer in reversed(list(layers(model))):  # inner ones first
        if name in layer.adapters:
            del layer.adapters[name]
        if not layer.adapters:
            _wrap(model, path, layer.base)
    del _configs(model)[name]


def _choice(model: nn.Module) -> Choice:
    """The one that all wrapped layers of the model share."""
    found = next((layer.choice for _, layer in layers(model)), None)
    return Choice() if found is None else found


def _configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Adapter -> settings; kept on the model, so that a copy of it has its own."""
    found: dict[str, LoraConfig] = model.__dict__.setdefault("_lora_configs", {})
    return found


def _check(model: nn.Module, chosen: Sequence[str]) -> None:
    known = adapters(model)
    for name in chosen:
        if name not in known:
            have = f"have {', '.join(known)}" if known else "it has none; add one first"
            raise InputError(f"the model has no adapter {name!r}{nearest(name, known)}; {have}")


def snapshot(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The numbers of an adapter, by module and part: `blocks.0.attention.q_proj.a`."""
    return {
        f"{path}.{part}": parameter.detach()
        for path, layer in layers(model)
        if name in layer.adapters
        for part, parameter in layer.adapters[name].named_parameters()
    }
