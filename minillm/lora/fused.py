"""Adapters of linears that the checkpoint's format keeps as one weight: Falcon's `query_key_value`.

split    A goes to each linear, B, bias and magnitude are split as the weight itself is, by rows
join     one A where all linears have the same, else

             A = [A_q; A_k; A_v]  (R_q + R_k + R_v, K)        B = B_q, B_k, B_v, each in its own rows and columns

         which is the same function: zeros in between. `ranks` then says which rows of A are whose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minillm.checkpoint.weight_map import Rule
from minillm.lora.layer import Adapter, float_weight, lengths, shape_of, unwrapped


@dataclass
class Factors:
    """a (R, K) · b (N, R) · scale, of ΔW = scale b a · bias, magnitude (N,) or None."""

    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None


def factors(adapter: Adapter) -> Factors:
    """Of one adapter. One that takes its start away again (PiSSA) has both in it, at twice the rank."""
    a, b = adapter.a.detach(), adapter.b.detach()
    if adapter.start_a is not None and adapter.start_b is not None:
        a, b = torch.cat([a, adapter.start_a]), torch.cat([b, -adapter.start_b], dim=1)
    bias, magnitude = (None if x is None else x.detach() for x in (adapter.bias, adapter.magnitude))
    return Factors(a, b, adapter.scale, bias, magnitude)


def join(rule: Rule, parts: Sequence[Factors | None], layers: Sequence[nn.Module]) -> tuple[Factors, list[int]]:
    """The linears of one rule -> the adapter of their fused weight, and the rank of each part where A is not shared.

    layers: the linears. None: not adapted, so that B and its bias are zero there and the magnitude is |W|.
    """
    given = [each for each in parts if each is not None]
    first, rows = given[0], [shape_of(each)[0] for each in layers]
    scale = next((each.scale for each in given if each.scale), 1.0)
    biases, magnitudes = ([None if x is None else getattr(x, kind) for x in parts] for kind in ("bias", "magnitude"))
    bias = _vectors(rule, biases, lambda place: first.b.new_zeros(rows[place]))
    magnitude = _vectors(rule, magnitudes, lambda place: lengths(float_weight(unwrapped(layers[place]), first.b.dtype)))
    if len(given) == len(parts) and all(each.scale == first.scale and torch.equal(each.a, first.a) for each in given):
        return Factors(first.a, rule.join([each.b for each in given]), first.scale, bias, magnitude), []
    ranks = [0 if each is None else len(each.a) for each in parts]
    wide = [first.b.new_zeros(count, sum(ranks)) for count in rows]
    for place, (part, own) in enumerate(zip(parts, wide, strict=True)):
        if part is not None:
            begin = sum(ranks[:place])
            own[:, begin : begin + ranks[place]] = part.b * (part.scale / scale)
    return Factors(torch.cat([each.a for each in given]), rule.join(wide), scale, bias, magnitude), ranks


def _vectors(rule: Rule, parts: Sequence[Tensor | None], rest: Callable[[int], Tensor]) -> Tensor | None:
    """Those of the parts joined, with `rest` in the place of those that have none; None where none has any."""
    if all(each is None for each in parts):
        return None
    return rule.join([rest(place) if each is None else each for place, each in enumerate(parts)])


def split(rule: Rule, whole: Factors, ranks: Sequence[int] | None) -> list[Factors]:
    """The inverse of `join`; ranks: what it gave, None where A is shared."""
    b = rule.split(whole.b)
    a = [whole.a] * len(b)
    if ranks:
        a = list(whole.a.split(list(ranks)))
        b = [part.split(list(ranks), dim=1)[place] for place, part in enumerate(b)]
    empty = [None] * len(b)
    bias = empty if whole.bias is None else rule.split(whole.bias)
    magnitude = empty if whole.magnitude is None else rule.split(whole.magnitude)
    return [Factors(x, y, whole.scale, z, m) for x, y, z, m in zip(a, b, bias, magnitude, strict=True)]
