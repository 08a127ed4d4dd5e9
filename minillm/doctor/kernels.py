"""The compiled kernels as checks of the doctor: right against their definitions, timed against what torch alone offers.

A quantised linear is held to its own definition; the time beside it is that of the bf16 linear which it replaces, since
that is what a user would have without it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.doctor.checks import Check
from minillm.model.norms import RMSNorm
from minillm.ops import block, int8, native

_BF16 = torch.bfloat16


def kernel_checks() -> tuple[Check, ...]:
    """One for each kernel and regime; none where nothing is compiled."""
    if not native.available():
        return ()
    few, many = (1, 4096, 4096), (512, 2048, 2048)
    return (
        Check(f"linear, {_name(few)}", _BF16, partial(_linear, *few), block.linear, F.linear),
        Check(f"int8, {_name(few)}", _BF16, partial(_int8, *few), _int8_ours, _int8_ref, _float_linear),
        Check(f"int8, {_name(many)}", _BF16, partial(_int8, *many), _int8_ours, _int8_ref, _float_linear),
        Check("rms norm, 1 x 4096", _BF16, partial(_normed, 4096), _norm_ours, _norm_ref),
        Check("swiglu, 1 x 11008", _BF16, partial(_pair, 11008), block.swiglu, _swiglu_ref),
    )


def _name(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _linear(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _random(rows, inputs, dtype=dtype, seed=0), _random(outputs, inputs, dtype=dtype, seed=1)


def _int8(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, with outliers in half a percent of its columns; W, as int8, its scales, and as it was."""
    x, weight = _linear(rows, outputs, inputs, dtype)
    x[:, ::200] += 20.0
    q, scale, _ = int8.quantise(weight)
    return x, q, scale, weight


def _int8_ours(x: Tensor, q: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return int8.linear(x, int8.Weight(q, scale))


def _int8_ref(x: Tensor, q: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return int8.linear_ref(x, int8.Weight(q, scale))


def _float_linear(x: Tensor, q: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _normed(width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _random(1, width, dtype=dtype, seed=0), _random(width, dtype=dtype, seed=1)


def _norm_ours(x: Tensor, weight: Tensor) -> Tensor:
    return block.rms_norm(x, weight, 1e-5)


def _norm_ref(x: Tensor, weight: Tensor) -> Tensor:
    norm = RMSNorm(weight.shape[0], 1e-5).to(x.dtype)
    norm.weight.data = weight
    return norm.in_torch(x)


def _pair(width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _random(1, width, dtype=dtype, seed=0), _random(1, width, dtype=dtype, seed=1)


def _swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
