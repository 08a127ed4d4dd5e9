"""A linear layer by LLM.int8() (arXiv 2208.07339): 8-bit weights, outlier columns of the input in floating point.

    y = x W^T + b        W (N, K) kept as int8 with one fp32 scale a row; formulas in `minillm.ops.int8`

Half the memory of bf16, and at decoding half the bytes to read. The result is the same in train() and eval(); the
gradient of x is that of the dequantised weights, so adapters above train through it while the weights stay as they are.

Where we differ from bitsandbytes' Linear8bitLt: no state that a forward changes, no fp16 in between, and a threshold of
6.0 as the paper and transformers have it (the layer's own default there is 0.0, which keeps no outliers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minillm.errors import InputError
from minillm.ops import int8
from minillm.ops.step import Int8


class LinearInt8(nn.Module):
    """x (..., K) of any float dtype -> (..., N) of the same. Columns of x that reach `threshold` stay float; 0: none.

    weight (N, K) int8 · scale (N,) fp32, the largest |W| of each row, whatever dtype the model is cast to · bias (N,).
    Fresh layers hold no numbers: fill them with `take_weight`, or make one of a float layer with `from_float`.
    """

    bias: Tensor | None

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, threshold: float = int8.THRESHOLD, dtype: Any = None
    ) -> None:
        super().__init__()
        if not threshold >= 0:
            raise InputError(f"threshold is {threshold}; give 0 for no outlier columns, or a positive number like 6.0")
        self.threshold = threshold
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(outputs, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def from_float(cls, linear: nn.Linear, *, threshold: float = int8.THRESHOLD) -> LinearInt8:
        """The float layer with its weight rounded; on the meta device a layer to be filled. The bias is shared."""
        weight, bias = linear.weight, linear.bias
        with torch.device(weight.device):
            made = cls(weight.shape[1], weight.shape[0], bias=bias is not None, threshold=threshold, dtype=weight.dtype)
        if bias is not None:
            made.bias = bias
        if weight.device.type != "meta":
            made.take_weight(weight.detach())
        return made.train(linear.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), that of the float weight."""
        outputs, inputs = self.weight.shape
        return outputs, inputs

    def take_weight(self, weight: Tensor) -> None:
        """Round a float weight (N, K); where the layer is on the meta device, it moves to that of the weight."""
        q, scale, is_infinite = int8.quantise(weight)
        if not bool(scale.isfinite().all()) or bool(is_infinite.any()):
            raise InputError("a weight holds a NaN or infinity, which int8 cannot; get the checkpoint again")
        self.take(q, scale)

    def take(self, weight: Tensor, scale: Tensor) -> None:
        """weight (N, K) int8, scale (N,) fp32, as `minillm.ops.int8.quantise` makes them or a file holds them."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return int8.linear(x, self._weight(x), self.threshold or math.inf)

    @staticmethod
    def together(linears: Sequence[LinearInt8], x: Tensor) -> list[Tensor]:
        """Several layers of one x, which is then quantised once (not under autograd); see `model.linear.project`."""
        threshold = linears[0].threshold
        if torch.is_grad_enabled() or any(linear.threshold != threshold for linear in linears):
            return [linear(x) for linear in linears]
        return int8.linears(x, [linear._weight(x) for linear in linears], threshold or math.inf)

    def transposed(self) -> Callable[[Tensor], Tensor]:
        """g (..., N) -> g W (..., K), by the W of now."""
        return partial(int8.input_gradient, w=self.weight, scale=self.scale)

    def native(self) -> Int8:
        """As `minillm.model.step` takes it."""
        return Int8(int8.Weight(self.weight, self.scale, self.bias), self.threshold)

    def _weight(self, x: Tensor) -> int8.Weight:
        bias = self.bias
        return int8.Weight(self.weight, self.scale, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """W as the layer has it: (N, K)."""
        return int8.dequantise(self.weight, self.scale, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearInt8:
        """`.to(bfloat16)` casts whatever is float: the scale passes as int32, so that it moves but is never rounded."""
        scale = self.scale
        self.scale = nn.Parameter(scale.view(torch.int32), requires_grad=False)
        super()._apply(fn, recurse)
        self.scale = nn.Parameter(self.scale.view(torch.float32), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}, bias={self.bias is not None}, threshold={self.threshold:g}"
