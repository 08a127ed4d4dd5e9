"""4-bit layers as bitsandbytes saves them (QuantState.as_dict, bitsandbytes 0.50 functional.py), read and written.

    weight                                   (ceil(N K / 2), 1) uint8, or the same bytes in another dtype
    weight.absmax                            (blocks,) fp32, or uint8 with double quantisation
    weight.quant_map                         (16,) fp32: the codes
    weight.nested_absmax                     (ceil(blocks / 256),) fp32         with double quantisation
    weight.nested_quant_map                  (256,) fp32                        with double quantisation
    weight.quant_state.bitsandbytes__nf4     uint8: JSON with quant_type, blocksize, dtype, shape, nested_blocksize,
                                             nested_dtype, nested_offset; or ...__fp4
    bias                                     (N,)

Both functions are strict: a key too many or too few, a dtype or a size that does not fit is a CheckpointError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minillm.errors import CheckpointError
from minillm.ops import nf4
from minillm.quant.nf4_linear import LinearNF4

_STATE = "weight.quant_state.bitsandbytes__"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_bitsandbytes(layer: LinearNF4) -> dict[str, Tensor]:
    """The layer's tensors under bitsandbytes' names; they share memory with the layer."""
    named = {
        "weight": layer.weight,
        "bias": layer.bias,
        "weight.absmax": layer.absmax,
        "weight.quant_map": nf4.CODES[layer.kind].to(layer.weight.device, copy=True),
        "weight.nested_absmax": layer.nested_absmax,
        "weight.nested_quant_map": layer.nested_map,
    }
    about: dict[str, Any] = {
        "quant_type": layer.kind,
        "blocksize": layer.block,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "shape": list(layer.shape),
    }
    if layer.nested_offset is not None:
        about |= {"nested_blocksize": nf4.NESTED_BLOCK, "nested_dtype": "float32"}
        about["nested_offset"] = layer.nested_offset.item()
    named[_STATE + layer.kind] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}


def from_bitsandbytes(tensors: Mapping[str, Tensor], *, where: str = "layer") -> LinearNF4:
    """The layer of such tensors, whose memory it shares; `where` names it in errors."""
    kind, about = _about(tensors, where)
    outputs, inputs = about["shape"]
    double_quant = about.get("nested_offset") is not None
    with torch.device("meta"):
        layer = LinearNF4(
            inputs,
            outputs,
            "bias" in tensors,
            kind=kind,
            block=about["blocksize"],
            double_quant=double_quant,
            dtype=_DTYPES[about["dtype"]],
        )
    expected = {
        "weight": layer.weight,
        "weight.absmax": layer.absmax,
        "weight.quant_map": torch.empty(16, device="meta"),
        "weight.nested_absmax": layer.nested_absmax,
        "weight.nested_quant_map": layer.nested_map,
        _STATE + kind: tensors[_STATE + kind],
        "bias": layer.bias,
    }
    found = _checked(tensors, {name: tensor for name, tensor in expected.items() if tensor is not None}, where)
    if not torch.allclose(found["weight.quant_map"].cpu(), nf4.CODES[kind], rtol=0, atol=1e-6):
        raise CheckpointError(f"{where}: weight.quant_map holds other codes than {kind}; save the layer again")
    nested = None
    if double_quant:
        offset = torch.tensor(about["nested_offset"], dtype=torch.float32, device=found["weight"].device)
        nested = nf4.Nested(found["weight.nested_absmax"], found["weight.nested_quant_map"], offset)
    layer.take(found["weight"], found["weight.absmax"], nested)
    if "bias" in found:
        layer.bias = nn.Parameter(found["bias"], requires_grad=False)
    return layer


def _about(tensors: Mapping[str, Tensor], where: str) -> tuple[str, dict[str, Any]]:
    """Kind and JSON of the layer, every field checked."""
    kinds = [name.removeprefix(_STATE) for name in tensors if name.startswith(_STATE)]
    if len(kinds) != 1 or kinds[0] not in nf4.CODES:
        raise CheckpointError(
            f"{where}: has {len(kinds)} keys {_STATE}*; a 4-bit layer has one, ending in {' or '.join(nf4.CODES)}"
        )
    packed = tensors[_STATE + kinds[0]]
    try:
        about = json.loads(bytes(packed.cpu().tolist()))
    except (ValueError, TypeError):
        raise CheckpointError(f"{where}: {_STATE}{kinds[0]} is not JSON in uint8; save the layer again") from None
    for name, fits in _FIELDS.items():
        if not isinstance(about, dict) or not fits(about.get(name)):
            value = about.get(name) if isinstance(about, dict) else about
            raise CheckpointError(f"{where}: quant_state has {name} {value!r}, which minillm cannot read")
    if about["quant_type"] != kinds[0]:
        raise CheckpointError(f"{where}: key {_STATE}{kinds[0]} says quant_type {about['quant_type']!r} inside")
    nested = [about.get(name) is not None for name in ("nested_offset", "nested_blocksize", "nested_dtype")]
    if any(nested) != all(nested):
        raise CheckpointError(f"{where}: quant_state lacks nested_offset, nested_blocksize or nested_dtype")
    return kinds[0], about


def _is_size(x: Any) -> bool:
    return type(x) is int and x > 0


#: JSON field -> what it may be; the nested ones may be absent.
_FIELDS = {
    "quant_type": lambda x: x in list(nf4.CODES),
    "blocksize": lambda x: _is_size(x) and x % 2 == 0 and 32 <= x <= 4096,
    "dtype": lambda x: x in list(_DTYPES),
    "shape": lambda x: isinstance(x, list) and len(x) == 2 and all(map(_is_size, x)),
    "nested_blocksize": lambda x: x is None or x == nf4.NESTED_BLOCK,
    "nested_dtype": lambda x: x in (None, "float32"),
    "nested_offset": lambda x: x is None or (isinstance(x, float) and math.isfinite(x)),
}


def _checked(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors, if names, dtypes and shapes are those of `expected`."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        what = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(extra)}"] * bool(extra)
        raise CheckpointError(f"{where}: a bitsandbytes 4-bit layer that {' and '.join(what)}; save it again")
    found = dict(tensors)
    if found["weight"].dtype != torch.uint8 and found["weight"].is_contiguous():
        found["weight"] = found["weight"].view(torch.uint8).view(-1, 1)  # quant_storage of another dtype, for FSDP
    for name, wanted in expected.items():
        tensor = found[name]
        if tensor.shape != wanted.shape or (tensor.dtype != wanted.dtype and name != "bias"):
            raise CheckpointError(
                f"{where}: {name} is {tensor.dtype} {tuple(tensor.shape)}; "
                f"its quant_state asks for {wanted.dtype} {tuple(wanted.shape)}"
            )
    return found
