"""When a whole block may run as one native call, and that call.

Decoding a token takes some twenty small operations a block; between them runs Python, and the memory, which sets the
pace, stands idle. Where nobody watches from outside and nothing wants a gradient, `minillm.ops.step` runs them all,
with the same bits. The modules stay the definition: anything unusual goes through them.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model.attention import Attention
from minillm.model.cache import LayerCache
from minillm.model.linear import is_watched
from minillm.model.mlp import GatedMLP
from minillm.model.norms import RMSNorm
from minillm.ops import attention, block
from minillm.ops.step import Block, BlockStep, Linear, Past


class Made(NamedTuple):
    """A step, and the `_signature` that its block had then. None: the block is not of the kind."""

    signature: list[object]
    step: BlockStep | None


_made: WeakKeyDictionary[nn.Module, Made] = WeakKeyDictionary()


def one_call(
    layer: Any, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: LayerCache
) -> Tensor | None:
    """The output of a `SequentialBlock` for one new token a row, or None where its modules have to compute it."""
    if x.shape[1] != 1 or rotation is None or not block.few_rows(x) or not attention.is_chosen():
        return None
    modules = _parts(layer)
    if any(map(is_watched, modules)):
        return None
    made, signature = _made.get(layer), _signature(modules)
    if made is None or made.signature != signature:
        made = _made[layer] = Made(signature, _step(layer))
    step = made.step
    if step is None or step.dtype != x.dtype or len(x) > step.most_rows:
        return None
    keep = None if mask is None else mask[:, 0, 0].expand(x.shape[0], -1).contiguous()
    return step(x, *rotation, Past(*cache.stored, cache.length, keep))


def _parts(layer: Any) -> list[nn.Module]:
    """The modules that would run. From the dictionaries, as module attributes take a microsecond each."""
    children = [part for part in layer._modules.values() if part is not None]
    return [*children, *(part for child in children for part in child._modules.values() if part is not None)]


def _signature(modules: list[nn.Module]) -> list[object]:
    """All that a step rests on: kinds, constants, and where the parameters lie and how."""
    found: list[object] = []
    for module in modules:
        found += (type(module), module.__dict__.get("threshold"), module.__dict__.get("eps"))
        for part in module._parameters.values():
            if part is not None:
                found += (part.data_ptr(), part.dtype, part.numel(), part.stride())
    return found


def _step(layer: Any) -> BlockStep | None:
    """The step of this block; None where it is another kind of block, or of linears without a native form."""
    norms, mlp, heads = (layer.attention_norm, layer.mlp_norm), layer.mlp, layer.attention
    if (
        heads.head_size > attention.LONGEST_HEAD
        or type(heads) is not Attention
        or type(mlp) is not GatedMLP
        or mlp.activation is not F.silu
    ):
        return None
    if not all(type(norm) is RMSNorm for norm in norms) or norms[0].eps != norms[1].eps:
        return None
    parts = [heads.q_proj, heads.k_proj, heads.v_proj, heads.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    linears: list[Linear | None] = [getattr(part, "native", lambda: None)() for part in parts]
    found = tuple(linear for linear in linears if linear is not None)
    if len(found) < len(linears):
        return None
    weights = (norms[0].weight.detach(), norms[1].weight.detach())
    try:
        return BlockStep(Block(weights, norms[0].eps, heads.num_heads, heads.num_kv_heads, heads.head_size, found))
    except (TypeError, ValueError):  # formats are mixed, or a weight is a view with gaps: the modules know how
        return None
