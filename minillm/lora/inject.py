"""Adapters put onto a model, chosen, and taken off again.

    add(model, rank=16, alpha=32, targets=["q_proj", "v_proj"])     a fresh adapter, active and trained alone
    with disabled(model): ...                                       the base, bitwise
    activate(model, "a", "b")                                       these, added up
    with for_rows(model, ["a", None, "b"]): ...                     one for each row of the batch
    remove(model, "a")                                              the last one leaves the model as it was

The base is frozen and never changed. Layers are wrapped in place (`minillm.lora.layer`), so every kind of linear and
every family takes adapters alike. Blocks that are computed again for the gradient (`Decoder.recompute`) run through the
adapters of their forward pass, whatever has been chosen since.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import noop_context_fn

from minillm.errors import InputError, nearest
from minillm.lora.choice import state_of
from minillm.lora.config import LoraConfig, settings
from minillm.lora.init import FROM_WEIGHT, fresh, share
from minillm.lora.layer import Adapted, LoraEmbedding, LoraLinear, Retrained, unwrapped
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
    fits nothing, a rank below 1, a name that is taken; the model is then what it was.
    """
    check_decoder(model)
    config = settings(config, fields)
    if "." in name or not name or hasattr(nn.ModuleDict(), name):
        raise InputError(f"an adapter cannot be called {name!r}; give a name without dots that torch does not use")
    if name in adapters(model):
        raise InputError(f"the model has an adapter {name!r} already; give another name or remove it first")
    chosen, anew = targets(model, config), retrained(model, config)
    if model.config.tied_embeddings and "embed" in anew:
        raise InputError("the embedding is tied to the head and cannot be retrained alone; take it out of retrain")
    state = state_of(model)
    with or_as_before(model, name):
        with disabled(model):  # what starts from a weight starts from the base's
            _adapt(model, chosen, name, config, generator)
        for module in anew:
            _retrain(model, module, name, None)
        if config.biases != "none":
            _retrain_biases(model, name, chosen, config.biases == "all")
        state.configs[name] = config
        model.contexts = state.choice.contexts
        activate(model, name)
    return chosen


def check_decoder(model: nn.Module) -> None:
    """InputError for a wrapper, such as `minillm.prompt`'s: its names are not the checkpoint's."""
    within = [path for path, each in model.named_modules() if path and isinstance(each, Decoder)]
    if within:
        raise InputError(f"adapters are the Decoder's, not a {type(model).__name__}'s; give the `{within[0]}` of it")


@contextlib.contextmanager
def or_as_before(model: Decoder, name: str) -> Iterator[None]:
    """Where what is done here fails, adapter `name` is off again, and chosen and trained is what was before."""
    state = state_of(model)
    chosen, trained = state.choice.active, [x for x in model.parameters() if x.requires_grad]
    if not state.configs:
        state.trained = tuple(each for each, x in model.named_parameters() if x.requires_grad)
    try:
        yield
    except BaseException:
        _take_off(model, name)
        state.choice.active = chosen
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise


def _adapt(
    model: Decoder, chosen: Sequence[str], name: str, config: LoraConfig, generator: torch.Generator | None
) -> None:
    theirs = names(model)
    sizes = {module: _size(config, (module, theirs.get(module, module))) for module in chosen}
    fused = [parts for parts in fused_targets(model, config) if len({sizes[part] for part in parts.modules}) == 1]
    within = {module for parts in fused for module in parts.modules}
    shared = replace(config, init="kaiming") if config.init in FROM_WEIGHT else config  # their start is the whole's
    for module in chosen:
        layer = model.get_submodule(module)
        if not isinstance(layer, Adapted):
            kind = LoraEmbedding if isinstance(unwrapped(layer), nn.Embedding) else LoraLinear
            layer = _wrap(model, module, kind(layer, state_of(model).choice))
        layer.adapters[name] = fresh(layer, *sizes[module], shared if module in within else config, generator)
    for parts in fused:
        share(parts.rule, [model.get_submodule(module) for module in parts.modules], name, config.init)


def _size(config: LoraConfig, called: tuple[str, str]) -> tuple[int, float]:
    """R and s of a module by its names."""
    rank = pattern_value(config.rank_pattern, called, config.rank)
    return rank, config.scale(rank, pattern_value(config.alpha_pattern, called, config.alpha))


def _retrain(model: Decoder, module: str, name: str, parameters: Sequence[str] | None) -> None:
    """parameters: None means all of the module's."""
    layer: Any = model.get_submodule(module)
    if isinstance(layer, Adapted):  # beneath the adapters: their base
        module, layer = f"{module}.base", layer.base
    if any(True for _ in layer.children()) and not isinstance(layer, Retrained):
        raise InputError(f"{module} has modules within and cannot be retrained as one; name those")
    if parameters is None and hasattr(unwrapped(layer), "dequantised"):
        raise InputError(f"{module} is quantised and cannot be retrained; leave it in floating point or adapt it")
    if not isinstance(layer, Retrained):
        layer = _wrap(model, module, Retrained(layer, state_of(model).choice))
    if name not in layer.adapters:  # else all of it is retrained, its bias too
        layer.own(name, [each for each, _ in layer.base.named_parameters()] if parameters is None else parameters)


def _retrain_biases(model: Decoder, name: str, chosen: Sequence[str], everywhere: bool) -> None:
    owners = [each.rpartition(".")[0] for each, _ in model.named_parameters() if each.endswith(".bias")]
    bases = {owner.replace(".base", "") for owner in owners if ".adapters." not in owner}
    for module in sorted(bases):
        if everywhere or module in chosen:
            _retrain(model, module, name, ["bias"])


def _wrap(model: nn.Module, module: str, layer: Any) -> Any:
    parent, _, leaf = module.rpartition(".")
    layer.train(model.get_submodule(module).training)
    setattr(model.get_submodule(parent), leaf, layer)
    return layer


def layers(model: nn.Module) -> Iterator[tuple[str, Adapted | Retrained]]:
    """All wrapped modules, outer ones first."""
    yield from ((name, m) for name, m in model.named_modules() if isinstance(m, Adapted | Retrained))


def adapters(model: nn.Module) -> list[str]:
    """Names of the adapters on the model, in the order they came."""
    return list(state_of(model).configs)


def config_of(model: nn.Module, name: str) -> LoraConfig:
    """The settings of an adapter; InputError where there is none of that name."""
    _check(model, [name])
    return state_of(model).configs[name]


def activate(model: nn.Module, *chosen: str) -> None:
    """Make these adapters the active ones, added up in this order; they are trained, all else is frozen.

    Modules that several of them retrain are the last one's.
    """
    _check(model, chosen)
    state_of(model).choice.active = tuple(dict.fromkeys(chosen))
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
    choice = state_of(model).choice
    before, choice.enabled = choice.enabled, False
    try:
        yield
    finally:
        choice.enabled = before


@contextlib.contextmanager
def for_rows(model: nn.Module, chosen: Sequence[str | None]) -> Iterator[None]:
    """While it lasts each row of the batch goes through the adapter named for it; None: the base alone.

    InputError where one of them retrains modules: those are for whole batches.
    """
    named = [name for name in chosen if name is not None]
    _check(model, named)
    for path, layer in layers(model):
        for name in named if isinstance(layer, Retrained) else ():
            if name in layer.adapters:
                raise InputError(f"adapter {name!r} retrains {path}, which cannot be for single rows; activate it")
    choice = state_of(model).choice
    before, choice.rows = choice.rows, tuple(chosen)
    try:
        yield
    finally:
        choice.rows = before


def remove(model: Decoder, name: str) -> None:
    """Take an adapter off; layers without any are what they were before, and so is what is trained without adapters."""
    check_decoder(model)
    _check(model, [name])
    _take_off(model, name)
    if not state_of(model).configs:
        unfreeze(model)


def unfreeze(model: nn.Module) -> None:
    """Have the parameters of the base trained again that were before the first adapter came."""
    parameters, state = dict(model.named_parameters()), state_of(model)
    for name in state.trained:
        if name in parameters and parameters[name].is_floating_point():  # else it has been quantised since
            parameters[name].requires_grad_(True)
    state.trained = ()


def _take_off(model: Decoder, name: str) -> None:
    state = state_of(model)
    state.choice.active = tuple(each for each in state.choice.active if each != name)
    for path, layer in reversed(list(layers(model))):  # inner ones first
        if name in layer.adapters:
            del layer.adapters[name]
        if not layer.adapters:
            _wrap(model, path, layer.base)
    state.configs.pop(name, None)
    if not state.configs:
        model.contexts = noop_context_fn


def _check(model: nn.Module, chosen: Sequence[str]) -> None:
    known = adapters(model)
    for name in chosen:
        if name not in known:
            have = f"have {', '.join(known)}" if known else "it has none; add one first"
            raise InputError(f"the model has no adapter {name!r}{nearest(name, known)}; {have}")
