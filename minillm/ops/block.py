"""What stands between the linears of a block, and linears of few rows, in one native call each.

In torch each is several passes, and for one token several calls that cost more than their numbers. The definitions are
the torch code of `minillm.model` (norms, rope, mlp, linear), which calls these where `fast` says so: inference on the
CPU, nothing to differentiate or compile. Formulas stand in csrc/cpu/block_ops.h and float_linear.h; sums and products
are in fp32 and rounded where torch rounds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from minillm.ops import native

#: Rows that the kernel for linears takes at most, and up to which the others are worth a call of their own.
FEW_ROWS = 8
#: Rows up to which `linear` is faster than torch's matrix product, by format, and by variant where that matters. So,
#: for W (5632, 2048), 2 cores, ours and torch's in µs: bf16 by AVX512-BF16, 1 row 550 and 895, 4 rows 546 and 802,
#: 6 rows 747 to 1503 and 1000; bf16 without it, 2 rows 610 and 825, 4 rows 1211 and 802; fp32, 8 rows 2529 and 3400.
_STREAMED_ROWS = {torch.float32: 8, torch.float16: 8, torch.bfloat16: 2}
_STREAMED_BF16 = 4


@cache
def streamed_rows(dtype: torch.dtype) -> int:
    """Rows up to which `linear` is the fastest here; 0 for formats that it does not take."""
    has_bf16 = dtype == torch.bfloat16 and native.isas().get("avx512bf16", False)
    return _STREAMED_BF16 if has_bf16 else _STREAMED_ROWS.get(dtype, 0)


def fast(x: Tensor) -> bool:
    """Whether these kernels may serve: x on the CPU in a format they know, no gradient wanted, nothing compiled."""
    return not (torch.is_grad_enabled() or native.is_transformed()) and native.serves(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, isa: str | None = None) -> Tensor:
    """x (..., D), weight (D,) -> w * (x / sqrt(mean(x^2) + eps)), rounded before the product."""
    x = x.contiguous()
    width = x.shape[-1]
    y = torch.empty_like(x)
    _module().rms_norm(
        x.data_ptr(),
        native.address("weight", weight, x.dtype, (width,)),
        y.data_ptr(),
        native.format_of("x", x),
        x.numel() // width,
        width,
        eps,
        native.isa_number(isa),
        torch.get_num_threads(),
    )
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, isa: str | None = None) -> Tensor:
    """x (B, H, T, E), cos, sin (B or 1, 1, T, d), d <= E even -> the first d of each head turned; memory (B, T, H, E).

    The memory of x must run through (B, T) with one stride, as that of a projection's output does.
    """
    batch, heads, queries, size = x.shape
    tables, _, _, turning = cos.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    if x.stride(3) != 1 or (batch > 1 and x.stride(0) != queries * x.stride(2)):
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    y = torch.empty(batch, queries, heads, size, dtype=x.dtype)
    _module().rotate(
        x.data_ptr(),
        native.address("cos", cos, x.dtype, (tables, 1, queries, turning)),
        native.address("sin", sin, x.dtype, (tables, 1, queries, turning)),
        y.data_ptr(),
        native.format_of("x", x),
        batch * queries,
        heads,
        size,
        turning,
        tables * queries,
        x.stride(2),
        x.stride(1),
        native.isa_number(isa),
        torch.get_num_threads(),
    )
    return y.transpose(1, 2)


def swiglu(gate: Tensor, up: Tensor, *, isa: str | None = None) -> Tensor:
    """silu(gate) * up, rounded between: both (..., F) -> (..., F)."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _module().swiglu(
        gate.data_ptr(),
        native.address("up", up, gate.dtype, tuple(gate.shape)),
        y.data_ptr(),
        native.format_of("gate", gate),
        gate.numel(),
        native.isa_number(isa),
        torch.get_num_threads(),
    )
    return y


def few_rows(x: Tensor, most: int = FEW_ROWS) -> bool:
    """Whether x (..., K) is `fast` and has at most so many rows, but some."""
    return fast(x) and x.shape[-1] > 0 and 0 < x.numel() <= most * x.shape[-1]


def streams(x: Tensor) -> bool:
    """Whether `linear` is the fastest for this input."""
    return fast(x) and few_rows(x, streamed_rows(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, isa: str | None = None) -> Tensor:
    """x (..., K) of at most FEW_ROWS rows, weight (N, K), bias (N,), all of one dtype -> x W^T + b (..., N)."""
    x = x.contiguous()
    outputs, inputs = weight.shape
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    rows = x.numel() // inputs
    if rows > FEW_ROWS:
        raise ValueError(f"x has {rows} rows; this kernel takes at most {FEW_ROWS}")
    _module().float_linear(
        native.address("x", x, x.dtype, (*x.shape[:-1], inputs)),
        native.address("weight", weight, x.dtype, (outputs, inputs)),
        0 if bias is None else native.address("bias", bias, x.dtype, (outputs,)),
        y.data_ptr(),
        native.format_of("x", x),
        rows,
        outputs,
        inputs,
        native.isa_number(isa),
        torch.get_num_threads(),
    )
    return y


def _module() -> Any:
    return native.cpu()
