"""Products of fp32 matrices on the CPU: the native kernel (csrc/cpu/matmul*), where it is faster than torch.

    C = A B      A (M, K), B (K, N), of any strides -> C (M, N)

torch leaves them to MKL, whose AVX-512 kernels run on Intel's own processors only: elsewhere it reaches half of what
the processor can do. The kernel takes over there; on Intel, in other formats, for factors that are thin, and where
there is no kernel, torch multiplies. The definition is `@`. No result depends on the number of threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.ops import native

#: The plainest variant that is faster than torch's, and the least M, N and K from which on it is.
_FAST, _LEAST = "avx512vnni", 64


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None, add: bool = False, isa: str | None = None) -> Tensor:
    """a (M, K) @ b (K, N) -> (M, N); into `out`, where that is given, or added to it. No gradient."""
    if isa is None and not _pays(a, b):
        return out.addmm_(a, b) if add and out is not None else torch.mm(a, b, out=out)
    (rows, depth), columns = a.shape, b.shape[1]
    if out is None:
        out, add = a.new_empty(rows, columns), False
    if rows and columns:
        _module().matmul(
            _factor("a", a, (rows, depth)),
            _factor("b", b, (depth, columns)),
            (native.address("out", out, torch.float32, (rows, columns)), columns),
            (rows, columns, depth),
            add,
            native.isa_number(isa),
            torch.get_num_threads(),
        )
    return out


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is right and fast for x (..., K) and weight (N, K)."""
    if x.dtype != torch.float32 or native.is_transformed() or torch.is_autocast_enabled("cpu"):
        return False
    return x.numel() >= _LEAST * x.shape[-1] and min(weight.shape) >= _LEAST and _takes(x, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x (..., K) · weight (N, K) · bias (N,), all fp32 -> (..., N); differentiable once."""
    # shapes change outside: what a Function itself returns as a view may not be changed in place
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


class _Linear(torch.autograd.Function):
    """y = x W^T      dL/dx = g W      dL/dW = g^T x            x (M, K), W (N, K)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x = product(gradient, weight) if ctx.needs_input_grad[0] else None
        return for_x, None if x is None else product(gradient.T, x)


def _pays(a: Tensor, b: Tensor) -> bool:
    return min(*a.shape, b.shape[1]) >= _LEAST and _takes(a, b)


def _takes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and native.serves(a) and native.serves(b) and _is_faster()


def _factor(name: str, x: Tensor, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Address and strides, after the checks; TypeError and ValueError name the argument."""
    if x.dtype != torch.float32:
        raise TypeError(f"{name} is {x.dtype}; it must be torch.float32")
    if not x.is_cpu:
        raise ValueError(f"{name} is on {x.device}; it must be on the CPU")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")
    row, column = x.stride()
    return x.data_ptr(), row, column


@cache
def _is_faster() -> bool:
    return native.isas().get(_FAST, False) and not _module().is_intel()


def _module() -> Any:
    return native.cpu()
