"""Which modules an adapter sits on: names and patterns -> modules of a Decoder.

A module has two names: ours (`blocks.0.attention.q_proj`) and that of the checkpoint's format, which the weight map
knows (`model.layers.0.self_attn.q_proj`). A pattern may mean either. A fused weight, Falcon's `query_key_value`, is the
name of three modules here.

Rules as in peft 0.21 (tuners_utils.py, `check_target_module_exists`): a list entry is a whole name or its end after a
dot; a single string must match whole; what lies within a retrained module is never a target. Where we differ: a target
that fits nothing is an error with the nearest names, and no pattern takes for ever (`minillm.lora.patterns`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from minillm.checkpoint.families import family_of
from minillm.checkpoint.weight_map import Rule
from minillm.errors import InputError, nearest
from minillm.lora.config import ALL_LINEAR, LoraConfig
from minillm.lora.layer import Adapted, Retrained, unwrapped
from minillm.lora.patterns import compiled
from minillm.model import Decoder

#: The number of its block, as peft finds it: the first number between dots that has a name and a part before it.
_BLOCK = re.compile(r".*?\.[^.]*\.(\d+)\.")


def rules_of(model: Decoder) -> list[Rule]:
    """The rules of the checkpoint's format that hold weights."""
    family = family_of(model.config.family, "lora")
    return [rule for rule in family.weight_map(model.config).rules if rule.theirs.endswith(".weight")]


def names(model: Decoder) -> dict[str, str]:
    """Name of a module with a weight here -> its name in the checkpoint's format."""
    return {
        ours.removesuffix(".weight"): rule.theirs.removesuffix(".weight")
        for rule in rules_of(model)
        for ours in rule.ours
    }


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name; those that adapters have wrapped as a whole, not what is in them."""
    found: dict[str, nn.Module] = {}
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not name.startswith(wrapped or (" ",)):
            found[name] = module
            wrapped += (f"{name}.",) if isinstance(module, Adapted | Retrained) else ()
    return found


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Linears of any kind and embeddings, by name, adapted already or not."""
    found = modules(model).items()
    return {name: each for name, each in found if is_linear(each) or isinstance(unwrapped(each), nn.Embedding)}


def is_linear(module: nn.Module) -> bool:
    """Whether x (..., K) -> (..., N) by a weight: float, quantised, or adapted already."""
    module = unwrapped(module)
    return isinstance(module, nn.Linear) or hasattr(module, "dequantised")


def targets(model: Decoder, config: LoraConfig) -> list[str]:
    """Our names of the modules that the config names, in the model's order; InputError where one fits nothing."""
    known, theirs = adaptable(model), names(model)
    called = {name: (name, theirs.get(name, name)) for name in known}
    if config.targets == ALL_LINEAR:
        chosen = [name for name in known if is_linear(known[name]) and name.partition(".")[0] != "lm_head"]
    else:
        _check_each(config.targets, called, "targets")
        chosen = [name for name in known if any(_is_named(each, config.targets) for each in called[name])]
    _check_each(config.exclude, called, "exclude")
    left = [
        name
        for name in chosen
        if not any(_is_named(each, config.exclude) for each in called[name])
        and not any(_lies_within(each, module) for each in called[name] for module in config.retrain)
        and (config.layers is None or _block(called[name][1]) in config.layers)
    ]
    if not left:
        raise InputError(f"no layer is left of targets {config.targets!r}; correct targets, exclude or layers")
    return left


class Fused(NamedTuple):
    """Linears, by our names, that are one weight in the checkpoint's format."""

    rule: Rule
    modules: tuple[str, ...]


def fused_targets(model: Decoder, config: LoraConfig) -> list[Fused]:
    """Linears that are one weight in the checkpoint's format and are named by it: q, k and v of a Falcon."""
    chosen, found = set(targets(model, config)), []
    for rule in rules_of(model):
        parts = tuple(ours.removesuffix(".weight") for ours in rule.ours)
        named = config.targets == ALL_LINEAR or _is_named(rule.theirs.removesuffix(".weight"), config.targets)
        if len(parts) > 1 and named and chosen.issuperset(parts):
            found.append(Fused(rule, parts))
    return found


def retrained(model: Decoder, config: LoraConfig) -> list[str]:
    """Our names of the modules that are trained anew as a whole.

    As in peft, an entry is the end of a name in the checkpoint's format, dot or not: "norm" is "input_layernorm" too.
    """
    theirs = names(model)
    known = {name: (name, theirs.get(name, name)) for name in modules(model)}
    found = {
        entry: [name for name, (_, their) in known.items() if _is_named(name, (entry,)) or their.endswith(entry)]
        for entry in config.retrain
    }
    for entry, fitting in found.items():
        if not fitting:
            leaves = {each.rpartition(".")[2] for both in known.values() for each in both}
            raise InputError(f"retrain {entry!r} fits no module of this model{nearest(entry, leaves)}; correct it")
    return [name for name in known if any(name in fitting for fitting in found.values())]


def pattern_value(pattern: Mapping[str, Any], called: Iterable[str], default: Any) -> Any:
    """The value of the first key that fits the end of one of the names, peft's way: `(.*\\.)?(key)$`.

    >>> pattern_value({"q_proj": 4, r"1\\.k_proj": 2}, ["blocks.1.k_proj"], 8)
    2
    """
    for key, value in pattern.items():
        compiled(key)  # by itself, for what it says of errors
        if any(compiled(rf"(.*\.)?({key})$").matches(name) for name in called):
            return value
    return default


def _is_named(name: str, patterns: str | tuple[str, ...]) -> bool:
    if isinstance(patterns, str):
        return compiled(patterns).matches(name)
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _lies_within(name: str, module: str) -> bool:
    return f".{module}." in f".{name}."


def _block(name: str) -> int | None:
    found = _BLOCK.match(name)
    return None if found is None else int(found[1])


def _check_each(patterns: str | tuple[str, ...], called: Mapping[str, tuple[str, ...]], what: str) -> None:
    """Every pattern fits some name."""
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        asked: str | tuple[str, ...] = patterns if isinstance(patterns, str) else (pattern,)
        if not any(_is_named(each, asked) for both in called.values() for each in both):
            leaves = {each.rpartition(".")[2] for both in called.values() for each in both}
            hint = nearest(pattern, leaves) or f"; there are {', '.join(sorted(leaves))}"
            raise InputError(f"{what} {pattern!r} fits no layer of this model{hint}")
