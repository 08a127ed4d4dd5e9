"""Where the parts of an adapter are in the model, and what they are called in peft's files.

Site    one weight of the checkpoint's format with adapters on it: base_model.model.<module>.lora_A.weight ...
Slot    one tensor of it that is trained anew: base_model.model.<module>.weight, or .base_layer.bias beside adapters
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from minillm.checkpoint.families import family_of
from minillm.checkpoint.weight_map import Rule
from minillm.lora.layer import Adapted, Adapter, LoraEmbedding, Retrained, unwrapped
from minillm.lora.targets import rules_of
from minillm.model import Decoder

PREFIX = "base_model.model."
#: Part of `Factors` -> key after the module's name: of linears, of embeddings.
_LINEAR_KEYS = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
_EMBEDDING_KEYS = {"a": "lora_embedding_A", "b": "lora_embedding_B"}


class Site(NamedTuple):
    """One weight of the format, the layers here that are in it, and their adapters; None: not adapted."""

    rule: Rule
    layers: list[nn.Module]
    adapters: list[Adapter | None]

    @property
    def module(self) -> str:
        """Its name in the format."""
        return self.rule.theirs.removesuffix(".weight")

    def keys(self) -> dict[str, str]:
        """Part of `Factors` -> key in the file."""
        first = next(each for each in self.adapters if each is not None)
        kinds = _EMBEDDING_KEYS if isinstance(self.layers[0], LoraEmbedding) else _LINEAR_KEYS
        return {part: f"{PREFIX}{self.module}.{key}" for part, key in kinds.items() if getattr(first, part) is not None}


class Slot(NamedTuple):
    """One tensor of the format that is trained anew, and where its parts are: a dictionary of parameters and a key.

    is_whole: not so where some parts of a fused tensor are the base's.
    """

    rule: Rule
    places: list[tuple[Any, str]]
    is_whole: bool


def sites(model: Decoder, name: str) -> list[Site]:
    """Where an adapter sits, weight by weight of the format."""
    found = []
    for rule in rules_of(model):
        paths = [each.removesuffix(".weight") for each in rule.ours]
        layers: list[Any] = [model.get_submodule(path) for path in paths if _exists(model, path)]
        beside = [layer.adapters[name] if _has(layer, name) else None for layer in layers]
        if any(beside):
            found.append(Site(rule, layers, beside))
    return found


def _exists(model: nn.Module, path: str) -> bool:
    """A tied head is in the map and no module."""
    parent, _, leaf = path.rpartition(".")
    return getattr(model.get_submodule(parent), leaf, None) is not None


def _has(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, Adapted) and name in layer.adapters


def slots(model: Decoder, name: str) -> dict[str, Slot]:
    """Key in the file -> where the parameters of retrained modules are."""
    found = {}
    for rule in family_of(model.config.family, "lora").weight_map(model.config).rules:
        places: list[tuple[Any, str]] = []
        anew, is_adapted = 0, False
        for path, _, part in (each.rpartition(".") for each in rule.ours):
            layer: Any = model.get_submodule(path) if _exists(model, path) else None
            inner: Any = layer.base if isinstance(layer, Adapted) else layer
            is_adapted |= _has(layer, name)
            if isinstance(inner, Retrained) and name in inner.adapters and part in inner.adapters[name]:  # type: ignore[operator]
                places.append((inner.adapters[name], part))
                anew += 1
            elif inner is not None:
                places.append((unwrapped(inner)._parameters, part))
        if anew:
            module, _, part = rule.theirs.rpartition(".")
            within = ".base_layer" if is_adapted else ""
            found[f"{PREFIX}{module}{within}.{part}"] = Slot(rule, places, anew == len(places))
    return found
