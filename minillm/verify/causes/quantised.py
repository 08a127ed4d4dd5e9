"""A linear that was rounded on purpose: LLM.int8(), and 4 bits in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from minillm.ops import int8, nf4
from minillm.verify.scene import Candidate, Scene


def linear(scene: Scene) -> Iterator[Candidate]:
    """From the inputs as that side recorded them and the weight as the formula has it."""
    weight = scene.formula.parameter(f"{scene.name}.weight")
    for text, product in (*_int8(scene.case.inputs[0], weight), *_four_bits(scene.inputs()[0], weight)):
        bias = scene.bias()
        yield Candidate("quantised", text, product if bias is None else product + bias)


def _int8(x: Tensor, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    rounded = int8.Weight(*int8.quantise(weight)[:2])
    for threshold, outliers in (
        (int8.THRESHOLD, f"with outliers from {int8.THRESHOLD:g} on"),
        (math.inf, "without outliers"),
    ):
        yield f"by LLM.int8() {outliers}", int8.linear_ref(x.float(), rounded, threshold).double()


def _four_bits(x: Tensor, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    for kind in nf4.CODES:
        packed, absmax = nf4.quantise(weight, kind)
        for text, (scales, nested) in (("", (absmax, None)), (", doubly quantised", nf4.quantise_absmax(absmax))):
            rounded = nf4.Weight(packed, scales, (weight.shape[0], weight.shape[1]), kind, nested=nested)
            yield f"with its weight in {kind.upper()}{text}", x @ nf4.dequantise_ref(rounded, weight.dtype).double().T
