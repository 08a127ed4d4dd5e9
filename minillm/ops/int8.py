"""LLM.int8() (arXiv 2208.07339): products of 8-bit integers, with the outlier columns of the input in floating point.

    scale_w[n] = max_k |W[n, k]|                                    w[n, k] = round(W[n, k] * 127 / scale_w[n])
    scale_x[m] = max |x[m, k]| over |x[m, k]| < threshold           q[m, k] = round(x[m, k] * 127 / scale_x[m])
    y = (q w^T) scale_x scale_w / 127^2  +  x[:, outliers] (w scale_w / 127)[:, outliers]^T  +  bias

A column of x is an outlier column where |x[m, k]| >= threshold in any row m; it is 0 in q, whole. Numbers of such a
column that are below the threshold themselves still count in scale_x. Rounding is to nearest, ties to even. Products
of integers are exact in int32; the rest is computed in fp32 and rounded once to the format of x.

`*_ref` is the definition in torch; `quantise` and `linear` are what runs: native kernels on the CPU (csrc/cpu/int8_*),
the definition elsewhere. `linear` has a gradient for x: that of the dequantised weights, with the integers' rounding
passed over (straight through), computed tile by tile, so that W is never whole in floating point.

Where we differ from bitsandbytes 0.50: inputs of any float format are taken as they are (there all go through fp16);
training and evaluation compute the same (there, on the CPU, not); 1/127^2 is 1/127^2 (there 6.200124e-05 on the CPU,
1.8e-5 too large); an all-zero row gives zeros without passing through infinity; a NaN in x gives a NaN row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm import memory
from minillm.ops import matmul, native

#: Above this, |x| is an outlier: the paper's value (§3.2, all outliers of 6.7 B models and larger are beyond 6).
THRESHOLD = 6.0
#: Numbers of W that are in floating point at a time, in the backward pass.
_TILE = 2**24


class Quantised(NamedTuple):
    """q (M, K) int8 · scale (M,) fp32 · is_outlier (K,) bool: x = q scale / 127 outside the outlier columns."""

    q: Tensor
    scale: Tensor
    is_outlier: Tensor


class Weight(NamedTuple):
    """w (N, K) int8 · scale (N,) fp32 · bias (N,) in the format of x, or None."""

    w: Tensor
    scale: Tensor
    bias: Tensor | None = None


def quantise_ref(x: Tensor, threshold: float = math.inf) -> Quantised:
    """The definition: x (M, K) float -> q, scale, is_outlier."""
    size = x.float().abs()
    outside = size >= threshold
    scale = size.masked_fill(outside, 0).amax(dim=1)  # (M,)
    inverse = torch.where(scale > 0, 1 / scale * 127, scale)  # two roundings, as bitsandbytes has it
    q = (x.float() * inverse[:, None]).nan_to_num(127).clamp(-127, 127).round().to(torch.int8)
    is_outlier = outside.any(dim=0)
    return Quantised(q.masked_fill(is_outlier, 0), scale, is_outlier)


def quantise(x: Tensor, threshold: float = math.inf, *, isa: str | None = None) -> Quantised:
    """`quantise_ref`, fast. Without a threshold it makes weights int8, one scale for each row."""
    if not native.serves(x):
        return quantise_ref(x, threshold)
    rows, width = x.shape
    q = memory.huge((rows, width), torch.int8)
    scale = torch.empty(rows, dtype=torch.float32)
    is_outlier = torch.empty(width, dtype=torch.bool)
    _module().int8_quantise(
        native.address("x", x, x.dtype, (rows, width)),
        native.format_of("x", x),
        rows,
        width,
        threshold,
        q.data_ptr(),
        scale.data_ptr(),
        is_outlier.data_ptr(),
        native.isa_number(isa),
        torch.get_num_threads(),
    )
    return Quantised(q, scale, is_outlier)


def product_ref(x: Tensor, w: Tensor) -> Tensor:
    """The exact sums: x (M, K), w (N, K) int8 -> (M, N) int32."""
    native.check_length(x.shape[1])
    return (x.double() @ w.double().T).to(torch.int32)  # float64 holds every sum below 2^53


def product(x: Tensor, w: Tensor, *, isa: str | None = None) -> Tensor:
    """`product_ref`, fast."""
    (rows, width), outputs = x.shape, w.shape[0]
    native.check_length(width)
    if not native.available() or x.device.type != "cpu":
        return product_ref(x, w)
    y = torch.empty(rows, outputs, dtype=torch.int32)
    _module().int8_product(
        native.address("x", x, torch.int8, (rows, width)),
        native.address("w", w, torch.int8, (outputs, width)),
        y.data_ptr(),
        rows,
        outputs,
        width,
        native.isa_number(isa),
        torch.get_num_threads(),
    )
    return y


def dequantise_ref(w: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """w (N, K) int8, scale (N,) -> w scale / 127 (N, K)."""
    return (w.float() * (scale * (1 / 127))[:, None]).to(dtype)


def dequantise(w: Tensor, scale: Tensor, dtype: torch.dtype, *, isa: str | None = None) -> Tensor:
    """`dequantise_ref`, fast."""
    if not native.available() or w.device.type != "cpu" or dtype not in native.FORMATS:
        return dequantise_ref(w, scale, dtype)
    out = torch.empty(w.shape, dtype=dtype)
    _module().int8_dequantise(
        native.address("w", w, torch.int8, tuple(w.shape)),
        native.address("scale", scale, torch.float32, (w.shape[0],)),
        out.data_ptr(),
        native.FORMATS[dtype],
        *w.shape,
        native.isa_number(isa),
        torch.get_num_threads(),
    )
    return out


def linear_ref(x: Tensor, weight: Weight, threshold: float = THRESHOLD) -> Tensor:
    """The definition: x (..., K) float -> y (..., N) in the format of x."""
    rows = x.reshape(-1, x.shape[-1])
    quantised = quantise_ref(rows, threshold)
    sums = product_ref(quantised.q, weight.w).float()  # (M, N)
    y = sums * (quantised.scale[:, None] * (weight.scale / (127 * 127)))
    columns = quantised.is_outlier.nonzero().flatten()
    if len(columns):
        y = y + rows[:, columns].float() @ weight.w[:, columns].float().T * (weight.scale / 127)
    if weight.bias is not None:
        y = y + weight.bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def linears(
    x: Tensor, weights: Sequence[Weight], threshold: float = THRESHOLD, *, isa: str | None = None
) -> list[Tensor]:
    """Several linears of one x (..., K), which is quantised once: q, k and v; gate and up. No gradient."""
    if not native.serves(x):
        return [linear_ref(x, weight, threshold) for weight in weights]
    width = x.shape[-1]
    native.check_length(width)
    x = x.contiguous()
    outputs = [x.new_empty(*x.shape[:-1], weight.scale.shape[0]) for weight in weights]
    if x.numel():
        _module().int8_linear(
            x.data_ptr(),
            native.FORMATS[x.dtype],
            x.numel() // width,
            width,
            threshold,
            [_part(weight, y, width) for weight, y in zip(weights, outputs, strict=True)],
            native.isa_number(isa),
            torch.get_num_threads(),
        )
    return outputs


def _part(weight: Weight, y: Tensor, width: int) -> tuple[int, int, int, int, int]:
    count = weight.scale.shape[0]
    return (
        native.address("weight", weight.w, torch.int8, (count, width)),
        native.address("scale", weight.scale, torch.float32, (count,)),
        0 if weight.bias is None else native.address("bias", weight.bias, y.dtype, (count,)),
        y.data_ptr(),
        count,
    )


def linear(x: Tensor, weight: Weight, threshold: float = THRESHOLD) -> Tensor:
    """`linear_ref`, fast, with gradients for x and bias: x (..., K) float -> (..., N).

    In plain inference the kernel is called as it is; under autograd and torch.compile through the registered operator.
    """
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or _trains(weight.bias))
    if needs_gradient or torch.compiler.is_compiling():
        return _linear(x, *weight, threshold)
    return linears(x, [weight], threshold)[0]


def _trains(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


@torch.library.custom_op("minillm::int8_linear", mutates_args=())
def _linear(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    return linears(x, [Weight(w, scale, bias)], threshold)[0]


@_linear.register_fake
def _(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


@torch.library.custom_op("minillm::int8_input_gradient", mutates_args=())
def input_gradient(gradient: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """g (..., N), w (N, K), scale (N,) -> g (w scale / 127) (..., K): a tile of W in floating point at a time.

    Tiles multiply in the format of g; where there are several they add up in fp32.
    """
    rows, size = gradient.reshape(-1, gradient.shape[-1]), max(_TILE // w.shape[1], 1)  # (M, N)
    if len(w) <= size:
        return matmul.product(rows, dequantise(w, scale, rows.dtype)).reshape(*gradient.shape[:-1], -1)
    total = rows.new_zeros(rows.shape[0], w.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    for first in range(0, len(w), size):
        tile = slice(first, first + size)
        total += matmul.product(rows[:, tile], dequantise(w[tile], scale[tile], rows.dtype))
    return total.to(gradient.dtype).reshape(*gradient.shape[:-1], -1)


@input_gradient.register_fake
def _(gradient: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], w.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, w, scale, _, _ = inputs
    ctx.save_for_backward(w, scale)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    w, scale = ctx.saved_tensors
    for_x = input_gradient(gradient, w, scale) if ctx.needs_input_grad[0] else None
    for_bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[3] else None
    return for_x, None, None, for_bias, None


_linear.register_autograd(_backward, setup_context=_remember)


def _module() -> Any:
    return native.cpu()
