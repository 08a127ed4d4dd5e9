"""A linear layer by QLoRA (arXiv 2305.14314): 4-bit weights in blocks, the scales of the blocks in 8 bits.

    y = x W^T + b        W (N, K) kept as NF4 or FP4 codes; formulas in `minillm.ops.nf4`

A weight takes 4 + 32 / 64 = 4.5 bits with blocks of 64, and 4 + 8 / 64 + 32 / (64 * 256) = 4.127 with double
quantisation. The result is the same in train() and eval(); the gradient of x is that of the dequantised weights, so
adapters above train through it while the weights stay as they are.

Where we differ from bitsandbytes' Linear4bit: a fresh layer has its final shapes, so that a saved state loads into it
without a forward or a move to a device; no forward changes the state; and there is no compute dtype: x keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from minillm.errors import InputError
from minillm.ops import nf4

_FP32_STATE = ("absmax", "nested_absmax", "nested_map", "nested_offset")


class LinearNF4(nn.Module):
    """x (..., in_features) of any float dtype -> (..., out_features) of the same.

    weight (ceil(N K / 2), 1) uint8, two codes a byte · absmax (blocks,), uint8 with `double_quant`, else fp32
    · nested_absmax (ceil(blocks / 256),), nested_map (256,), nested_offset () fp32, with `double_quant` only
    · bias (N,).
    fp32 state stays fp32, whatever dtype the model is cast to. `dtype` is that of the float weight, which bias has too.
    Fresh layers hold no numbers: fill them with `take_weight`, or make one of a float layer with `from_float`.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    nested_offset: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: str = "nf4",
        block: int = 64,
        double_quant: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        try:
            nf4.check(kind, block)
        except ValueError as error:
            raise InputError(str(error)) from None
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.block, self.double_quant = kind, block, double_quant
        self.dtype = dtype or torch.get_default_dtype()
        count = in_features * out_features
        blocks = -(-count // block)
        self.weight = _frozen(torch.empty((count + 1) // 2, 1, dtype=torch.uint8))
        self.absmax = _frozen(torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32))
        sizes = ((-(-blocks // nf4.NESTED_BLOCK),), (256,), ()) if double_quant else (None, None, None)
        for name, size in zip(_FP32_STATE[1:], sizes, strict=True):
            setattr(self, name, None if size is None else _frozen(torch.empty(size, dtype=torch.float32)))
        self.bias = _frozen(torch.empty(out_features, dtype=self.dtype)) if bias else None

    @classmethod
    def from_float(
        cls, linear: nn.Linear, *, kind: str = "nf4", block: int = 64, double_quant: bool = True
    ) -> LinearNF4:
        """The float layer with its weight rounded; on the meta device a layer to be filled. The bias is shared."""
        weight, bias = linear.weight, linear.bias
        outputs, inputs = weight.shape
        with torch.device(weight.device):
            made = cls(
                inputs, outputs, bias is not None, kind=kind, block=block, double_quant=double_quant, dtype=weight.dtype
            )
        if bias is not None:
            made.bias = bias
        if weight.device.type != "meta":
            made.take_weight(weight.detach())
        return made.train(linear.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), that of the float weight."""
        return self.out_features, self.in_features

    def take_weight(self, weight: Tensor) -> None:
        """Round a float weight (N, K); where the layer is on the meta device, it moves to that of the weight."""
        packed, absmax = nf4.quantise(weight, self.kind, self.block)
        if not bool(absmax.isfinite().all()):
            raise InputError("a weight holds a NaN or infinity, which 4 bits cannot; get the checkpoint again")
        if self.double_quant:
            self.take(packed, *nf4.quantise_absmax(absmax))
        else:
            self.take(packed, absmax)

    def take(self, packed: Tensor, absmax: Tensor, nested: nf4.Nested | None = None) -> None:
        """The parts as `minillm.ops.nf4` makes them or a file holds them."""
        self.weight, self.absmax = _frozen(packed), _frozen(absmax)
        for name, part in zip(_FP32_STATE[1:], nested or (), strict=False):
            setattr(self, name, _frozen(part))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        return nf4.linear(x, self.quantised(bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)))

    def transposed(self) -> Callable[[Tensor], Tensor]:
        """g (..., N) -> g W (..., K), by the W of now."""
        state, layout = nf4.flat(self.quantised())
        return partial(nf4.input_gradient, state=state, layout=layout)

    def native(self) -> nf4.Weight:
        """As `minillm.model.step` takes it."""
        return self.quantised(self.bias)

    def quantised(self, bias: Tensor | None = None) -> nf4.Weight:
        """The weight as `minillm.ops.nf4` takes it."""
        scale, code, offset = self.nested_absmax, self.nested_map, self.nested_offset
        nested = None if scale is None or code is None or offset is None else nf4.Nested(scale, code, offset)
        return nf4.Weight(self.weight, self.absmax, self.shape, self.kind, self.block, nested, bias)

    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as the layer has it: (N, K), in the dtype of the float weight or another."""
        return nf4.dequantise(self.quantised(), dtype or self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearNF4:
        """`.to(bfloat16)` casts whatever is float: fp32 state passes as int32, so that it moves but is not rounded."""
        parts = {name: getattr(self, name) for name in _FP32_STATE}
        kept = [name for name, part in parts.items() if part is not None and part.is_floating_point()]
        self._view(kept, torch.int32)
        try:
            super()._apply(fn, recurse)
        finally:
            self._view(kept, torch.float32)
        return self

    def _view(self, names: list[str], dtype: torch.dtype) -> None:
        for name in names:
            setattr(self, name, _frozen(getattr(self, name).view(dtype)))

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, kind={self.kind}, block={self.block}, double_quant={self.double_quant}"


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)
