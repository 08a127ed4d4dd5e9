"""Checkpoints whose linears are already 8 or 4 bits, in the form that transformers and bitsandbytes write: ours too.

    config.json    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true, ...}

    int8   X.weight          (N, K) int8
           X.SCB             (N,) fp32, the largest |W| of each row
           X.weight_format   uint8 scalar; 0: rows as they are (1 to 3 were layouts of old GPUs, and are refused)

Which layers are quantised the file says, by their dtype, not config.json's list of exceptions. What belongs to a weight
is taken with it: a fused weight is split together with its scales, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minillm.checkpoint.tensors import Tensors
from minillm.checkpoint.weight_map import Rule
from minillm.errors import CheckpointError, ConfigError, nearest
from minillm.quant.convert import HEAD, Quantisation
from minillm.quant.int8_linear import LinearInt8

_SCALE, _FORMAT = "SCB", "weight_format"
#: Fields of quantization_config that leave the numbers alone.
_HARMLESS = frozenset(
    (
        "quant_method _load_in_4bit _load_in_8bit llm_int8_enable_fp32_cpu_offload llm_int8_skip_modules "
        "bnb_4bit_compute_dtype bnb_4bit_quant_storage bnb_4bit_quant_type bnb_4bit_use_double_quant"
    ).split()
)


def stored_quantisation(raw: Mapping[str, Any], where: str) -> Quantisation | None:
    """What config.json says of the weights beside it; None for float ones. ConfigError for settings we do not have."""
    said = raw.get("quantization_config")
    if not said:
        return None
    eight, four = said.get("load_in_8bit", False), said.get("load_in_4bit", False)
    if not eight or four:
        raise ConfigError(f"{where}: quantization_config asks for 4 bits, which minillm does not load yet")
    threshold = said.get("llm_int8_threshold", 6.0)
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not threshold >= 0:
        raise ConfigError(f"{where}: llm_int8_threshold is {threshold!r:.40}; it must be a number of at least 0")
    known = (*_HARMLESS, "load_in_8bit", "load_in_4bit", "llm_int8_threshold")
    for name, value in said.items():
        if name not in known and value not in (None, False, "", [], {}):
            raise ConfigError(
                f"{where}: quantization_config has {name} = {value!r:.40}, which may change the numbers"
                f"{nearest(name, known)}; remove or correct it"
            )
    return Quantisation("int8", threshold=float(threshold))


def written_quantisation(how: Quantisation) -> dict[str, Any]:
    """The quantization_config that transformers reads."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": how.threshold,
        "llm_int8_skip_modules": list(how.skip),
    }


class QuantisedTensors:
    """The tensors of a quantised checkpoint: weights by their names, with what belongs to each."""

    def __init__(self, files: Tensors, where: str) -> None:
        self._files = files
        every = set(files.keys())
        self._parts = {key for key in every if key.rpartition(".")[2] in (_SCALE, _FORMAT)}
        #: Names of the weights that are int8.
        self.quantised = {key for key in every - self._parts if files.dtype(key) == torch.int8}
        for key in sorted(self.quantised):
            if _beside(key, _SCALE) not in every:
                raise CheckpointError(f"{where}: tensor {key} is int8, its scales {_beside(key, _SCALE)} are missing")
        for key in sorted(self._parts):
            if _beside(key, "weight") not in self.quantised:
                raise CheckpointError(f"{where}: tensor {key} belongs to no int8 weight; get the checkpoint again")
        self._where = where

    def keys(self) -> list[str]:
        return [key for key in self._files.keys() if key not in self._parts]  # noqa: SIM118  # no mapping

    def shape(self, key: str) -> tuple[int, ...]:
        return self._files.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._files.dtype(key)

    def read(self, key: str) -> Tensor:
        return self._files.read(key)

    def close(self) -> None:
        self._files.close()

    def read_rows(self, key: str) -> tuple[Tensor, Tensor]:
        """An int8 weight (N, K) and its scales (N,), checked against each other."""
        scale, form = _beside(key, _SCALE), _beside(key, _FORMAT)
        if form in self._parts and int(self._files.read(form)) != 0:
            raise CheckpointError(
                f"{self._where}: {form} is {int(self._files.read(form))}, a layout of old GPUs; save it again as rows"
            )
        found, wanted = (
            (self._files.shape(scale), self._files.dtype(scale)),
            (self._files.shape(key)[:1], torch.float32),
        )
        if found != wanted:
            raise CheckpointError(
                f"{self._where}: tensor {scale} is {found[1]} {found[0]}, not {wanted[1]} {wanted[0]}"
            )
        scales = self._files.read(scale)
        if not bool(scales.isfinite().all()) or bool((scales < 0).any()):
            raise CheckpointError(f"{self._where}: tensor {scale} holds scales that are no sizes; get the file again")
        return self._files.read(key), scales


def _beside(key: str, leaf: str) -> str:
    return f"{key.rpartition('.')[0]}.{leaf}"


def take_rows(model: nn.Module, rule: Rule, weight: Tensor, scale: Tensor, device: torch.device | str) -> None:
    """Give each layer of a rule its rows of an int8 weight and of its scales."""
    for name, rows, scales in zip(rule.ours, rule.split(weight), rule.split(scale), strict=True):
        layer = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, LinearInt8)
        layer.take(rows.to(device).contiguous(), scales.to(device).contiguous())


def quantised_layers(model: nn.Module) -> dict[str, LinearInt8]:
    """Layers that are int8, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearInt8)}


def how_quantised(model: nn.Module) -> Quantisation | None:
    """The one setting that all quantised layers of a model share; CheckpointError where they differ."""
    layers = quantised_layers(model)
    thresholds = {layer.threshold for layer in layers.values()}
    if len(thresholds) > 1:
        raise CheckpointError(f"int8 layers have thresholds {sorted(thresholds)}; a checkpoint holds one for all")
    skipped = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or name in HEAD]
    return Quantisation("int8", threshold=thresholds.pop(), skip=tuple(skipped or HEAD)) if layers else None


def written_parts(rule: Rule, layers: Mapping[str, LinearInt8], device: str) -> dict[str, Tensor] | None:
    """The tensors of one checkpoint weight whose layers are int8, on a device; None where they are float.

    Raises CheckpointError where only some of a fused weight's layers are.
    """
    owners = [name.rpartition(".")[0] for name in rule.ours]
    if not rule.ours[0].endswith(".weight") or not any(owner in layers for owner in owners):
        return None
    if not all(owner in layers for owner in owners):
        raise CheckpointError(f"{rule.theirs}: only some of {', '.join(owners)} are int8; quantise all or none of them")
    found = [layers[owner] for owner in owners]
    return {
        rule.theirs: rule.join([layer.weight.to(device) for layer in found]),
        _beside(rule.theirs, _SCALE): rule.join([layer.scale.to(device) for layer in found]),
        _beside(rule.theirs, _FORMAT): torch.zeros((), dtype=torch.uint8, device=device),
    }
