"""Checkpoints whose linears are already 8 or 4 bits, in the form that transformers and bitsandbytes write: ours too.

    config.json    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true, ...}

    int8    X.weight          (N, K) int8
            X.SCB             (N,) fp32, the largest |W| of each row
            X.weight_format   uint8 scalar; 0: rows as they are (1 to 3 were layouts of old GPUs, and are refused)
    4 bits  X.weight          (ceil(N K / 2), 1) uint8
            X.weight.absmax, .quant_map, .nested_absmax, ...         minillm.quant.nf4_bitsandbytes

Which layers are quantised the file says, not config.json's list of exceptions. What belongs to a weight is taken with
it: a fused weight is split together with its scales, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minillm.checkpoint.tensors import Tensors
from minillm.checkpoint.weight_map import Rule
from minillm.errors import CheckpointError, ConfigError, nearest
from minillm.memory import Empty, empty
from minillm.ops import nf4
from minillm.quant.convert import HEAD, QUANTISED, Quantisation
from minillm.quant.int8_linear import LinearInt8
from minillm.quant.nf4_bitsandbytes import from_bitsandbytes, to_bitsandbytes
from minillm.quant.nf4_linear import LinearNF4

_SCALE, _FORMAT = "SCB", "weight_format"
_FOUR_BITS = ".weight.quant_state.bitsandbytes__"
#: Fields of quantization_config that leave the numbers alone: the file says more, and x keeps its own dtype.
_HARMLESS = frozenset(
    (
        "quant_method _load_in_4bit _load_in_8bit llm_int8_enable_fp32_cpu_offload llm_int8_skip_modules "
        "bnb_4bit_compute_dtype bnb_4bit_quant_storage"
    ).split()
)
_KNOWN = (*_HARMLESS, "load_in_8bit", "load_in_4bit", "llm_int8_threshold", "bnb_4bit_quant_type")
_DOUBLE = "bnb_4bit_use_double_quant"


def stored_quantisation(raw: Mapping[str, Any], where: str) -> Quantisation | None:
    """What config.json says of the weights beside it; None for float ones. ConfigError for settings we do not have."""
    said = raw.get("quantization_config")
    if not said:
        return None
    for name, value in said.items():
        if name not in (*_KNOWN, _DOUBLE) and value not in (None, False, "", [], {}):
            raise ConfigError(
                f"{where}: quantization_config has {name} = {value!r:.40}, which may change the numbers"
                f"{nearest(name, _KNOWN)}; remove or correct it"
            )
    if bool(said.get("load_in_8bit")) == bool(said.get("load_in_4bit")):
        raise ConfigError(f"{where}: quantization_config must have one of load_in_8bit and load_in_4bit")
    threshold, kind = said.get("llm_int8_threshold", 6.0), said.get("bnb_4bit_quant_type", "fp4")
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not threshold >= 0:
        raise ConfigError(f"{where}: llm_int8_threshold is {threshold!r:.40}; it must be a number of at least 0")
    if kind not in ("nf4", "fp4"):
        raise ConfigError(f"{where}: bnb_4bit_quant_type is {kind!r:.40}; it must be nf4 or fp4")
    if said.get("load_in_8bit"):
        return Quantisation("int8", threshold=float(threshold))
    return Quantisation(kind, double_quant=bool(said.get(_DOUBLE)))


def written_quantisation(how: Quantisation, dtype: str) -> dict[str, Any]:
    """The quantization_config that transformers reads; dtype: "bfloat16", the model's."""
    shared = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": list(how.skip)}
    if how.kind == "int8":
        return {**shared, "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": how.threshold}
    return {
        **shared,
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": how.kind,
        _DOUBLE: how.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }


class QuantisedTensors:
    """The tensors of a quantised checkpoint: weights by their names, with what belongs to each."""

    def __init__(self, files: Tensors, where: str) -> None:
        self._files, self._where = files, where
        every = set(files.keys())
        four = {key.partition(_FOUR_BITS)[0] + ".weight" for key in every if _FOUR_BITS in key}
        parts = {key for key in every if key.rpartition(".")[2] in (_SCALE, _FORMAT) or ".weight." in key}
        #: Names of the weights that are quantised -> the names that belong to each.
        self.quantised = {
            key: [part for part in parts if _owner(part) == key]
            for key in every - parts
            if files.dtype(key) == torch.int8 or key in four
        }
        self._parts = parts
        for key in sorted(parts):
            if _owner(key) not in self.quantised:
                raise CheckpointError(f"{where}: tensor {key} belongs to no quantised weight; get the checkpoint again")
        self._layers: dict[str, LinearNF4] = {}

    def keys(self) -> list[str]:
        return [key for key in self._files.keys() if key not in self._parts]  # noqa: SIM118  # no mapping

    def shape(self, key: str) -> tuple[int, ...]:
        """That of the float weight."""
        return self.four_bits(key).shape if self._is_four_bits(key) else self._files.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._files.dtype(key)

    def read(self, key: str, room: Empty = empty) -> Tensor:
        return self._files.read(key, room)

    def close(self) -> None:
        self._files.close()

    def _is_four_bits(self, key: str) -> bool:
        return key in self.quantised and self._files.dtype(key) != torch.int8

    def int8(self, key: str) -> tuple[Tensor, Tensor]:
        """An int8 weight (N, K) and its scales (N,), checked against each other."""
        scale, form = (f"{key.removesuffix('weight')}{leaf}" for leaf in (_SCALE, _FORMAT))
        if scale not in self._parts:
            raise CheckpointError(f"{self._where}: tensor {key} is int8, its scales {scale} are missing")
        if form in self._parts and int(self._files.read(form)) != 0:
            raise CheckpointError(
                f"{self._where}: {form} is {int(self._files.read(form))}, a layout of old GPUs; save it again as rows"
            )
        found = (self._files.dtype(scale), self._files.shape(scale))
        wanted = (torch.float32, self._files.shape(key)[:1])
        if found != wanted:
            raise CheckpointError(
                f"{self._where}: tensor {scale} is {found[0]} {found[1]}, not {wanted[0]} {wanted[1]}"
            )
        scales = self._files.read(scale)
        if not bool(scales.isfinite().all()) or bool((scales < 0).any()):
            raise CheckpointError(f"{self._where}: tensor {scale} holds scales that are no sizes; get the file again")
        return self._files.read(key), scales

    def four_bits(self, key: str) -> LinearNF4:
        """A 4-bit weight as a layer without bias, checked; it is read once, and let go when `give` has placed it."""
        if key not in self._layers:
            base = key.removesuffix("weight")
            named = {name.removeprefix(base): self._files.read(name) for name in (key, *self.quantised[key])}
            self._layers[key] = from_bitsandbytes(named, where=f"{self._where}: {key}")
        return self._layers[key]

    def give(self, model: nn.Module, key: str, rule: Rule, device: torch.device | str) -> None:
        """Put a quantised weight into the layers of a rule, each its rows."""
        if self._is_four_bits(key):
            for name, layer in zip(rule.ours, _split_four_bits(self.four_bits(key), rule), strict=True):
                module = name.removesuffix(".weight")
                parent, _, leaf = module.rpartition(".")
                before = model.get_submodule(module)
                assert isinstance(before, LinearNF4)
                placed = layer.to(device)
                placed.bias = before.bias  # it comes, or has come, by a rule of its own
                setattr(model.get_submodule(parent), leaf, placed)
            del self._layers[key]
            return
        weight, scale = self.int8(key)
        for name, rows, scales in zip(rule.ours, rule.split(weight), rule.split(scale), strict=True):
            linear = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(linear, LinearInt8)
            linear.take(rows.to(device).contiguous(), scales.to(device).contiguous())


def _owner(part: str) -> str:
    """`X.weight` of `X.SCB` and of `X.weight.absmax`."""
    if ".weight." in part:
        return part.partition(".weight.")[0] + ".weight"
    return part.rpartition(".")[0] + ".weight"


def _rows_of(layer: LinearNF4) -> tuple[Tensor, Tensor]:
    """Codes (N, K / 2) and fp32 scales (N, K / block) by rows; CheckpointError where blocks cross rows."""
    outputs, inputs = layer.shape
    if inputs % layer.block:
        raise CheckpointError(
            f"a fused 4-bit weight of {inputs} columns has blocks of {layer.block} that cross rows; it cannot be split"
        )
    return layer.weight.view(outputs, -1), nf4.scales(layer.quantised()).view(outputs, -1)


def _of_rows(packed: Tensor, scales: Tensor, like: LinearNF4) -> LinearNF4:
    outputs, inputs = packed.shape[0], packed.shape[1] * 2
    settings: dict[str, Any] = {"kind": like.kind, "block": like.block, "double_quant": False, "dtype": like.dtype}
    with torch.device("meta"):
        layer = LinearNF4(inputs, outputs, bias=False, **settings)
    layer.take(packed.reshape(-1, 1).contiguous(), scales.flatten().contiguous())
    return layer


def _split_four_bits(layer: LinearNF4, rule: Rule) -> Sequence[LinearNF4]:
    """One layer of a rename; of a fused weight each part's rows, scales in fp32: a block of scales may cross parts."""
    if len(rule.ours) == 1:
        return [layer]
    codes, scales = _rows_of(layer)
    return [_of_rows(*part, like=layer) for part in zip(rule.split(codes), rule.split(scales), strict=True)]


# --- writing


def how_quantised(model: nn.Module) -> Quantisation | None:
    """The one setting that all quantised layers of a model share; CheckpointError where they differ.

    Layers whose scales are doubly quantised and such whose are not may stand together: the file says which is which.
    """
    layers = [module for module in model.modules() if isinstance(module, QUANTISED)]
    if not layers:
        return None
    skip = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear) or name in HEAD)
    kinds = {("int8", layer.threshold) if isinstance(layer, LinearInt8) else (layer.kind, 0.0) for layer in layers}
    if len(kinds) > 1:
        raise CheckpointError(
            f"layers are quantised in {len(kinds)} ways, {sorted(kinds)}; a checkpoint holds one for all"
        )
    kind, threshold = kinds.pop()
    double = any(isinstance(layer, LinearNF4) and layer.double_quant for layer in layers)
    return Quantisation(kind, threshold=threshold, double_quant=double, skip=skip or HEAD)


def written_parts(model: nn.Module, rule: Rule) -> dict[str, Tensor] | None:
    """The tensors of one checkpoint weight whose layers are quantised, on the CPU; None where they are float.

    Raises CheckpointError where only some of a fused weight's layers are.
    """
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in rule.ours]
    layers = [owner for owner in owners if isinstance(owner, QUANTISED)]
    if not layers or not rule.ours[0].endswith(".weight"):
        return None
    if len({type(owner) for owner in owners}) > 1:
        names = ", ".join(name.removesuffix(".weight") for name in rule.ours)
        raise CheckpointError(f"{rule.theirs}: only some of {names} are quantised; quantise all or none of them")
    base = rule.theirs.removesuffix("weight")
    four = [layer for layer in layers if isinstance(layer, LinearNF4)]
    if four:
        named = to_bitsandbytes(_joined_four_bits(four, rule))
        return {base + name: x.cpu() for name, x in named.items() if name != "bias"}
    eight = [layer for layer in layers if isinstance(layer, LinearInt8)]
    return {
        rule.theirs: rule.join([layer.weight.cpu() for layer in eight]),
        base + _SCALE: rule.join([layer.scale.cpu() for layer in eight]),
        base + _FORMAT: torch.zeros((), dtype=torch.uint8),
    }


def _joined_four_bits(layers: Sequence[LinearNF4], rule: Rule) -> LinearNF4:
    """The inverse of `_split_four_bits`; a fused weight keeps its scales in fp32."""
    if len(layers) == 1:
        return layers[0]
    codes, scales = zip(*map(_rows_of, layers), strict=True)
    return _of_rows(rule.join([x.cpu() for x in codes]), rule.join([x.cpu() for x in scales]), like=layers[0])
