"""What the preference losses check before they compute: one-line errors for arguments that a user can get wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minillm.errors import InputError, NumericsError


def wide_rows(**named: Tensor) -> list[Tensor]:
    """The tensors in one float format, at least fp32: each (B,), one number for each example.

    bf16 has 8 bits: at -200 nats neighbours are 1 nat apart, and of a difference of two such sums little is left.
    Raises InputError for another shape, unequal shapes or no examples, NumericsError for what is not finite; each names
    the argument. One look at the values for all of them: on a GPU, one wait a step.

    >>> [x.dtype for x in wide_rows(chosen=torch.zeros(2).bfloat16(), rejected=torch.zeros(2))]
    [torch.float32, torch.float32]
    >>> wide_rows(chosen=torch.zeros(2), rejected=torch.zeros(3))
    Traceback (most recent call last):
    minillm.errors.InputError: chosen has shape (2,) and rejected (3,); both must hold one number for each example (B,)
    """
    (first, reference), dtype = next(iter(named.items())), torch.float32
    for name, x in named.items():
        if x.ndim != 1 or not len(x):
            raise InputError(f"{name} has shape {tuple(x.shape)}; it must hold one number for each example (B,)")
        if x.shape != reference.shape:
            shapes = f"{first} has shape {tuple(reference.shape)} and {name} {tuple(x.shape)}"
            raise InputError(f"{shapes}; both must hold one number for each example (B,)")
        if not x.is_floating_point():
            raise InputError(f"{name} is {x.dtype}; log-probabilities and rewards are floating-point numbers")
        dtype = torch.promote_types(dtype, x.dtype)
    wide = [x.to(dtype) for x in named.values()]
    if not bool(torch.stack([x.detach() for x in wide]).isfinite().all()):
        raise _not_finite(named)
    return wide


def _not_finite(named: dict[str, Tensor]) -> NumericsError:
    name, x = next((name, x) for name, x in named.items() if not bool(x.isfinite().all()))
    row = int((~x.isfinite()).nonzero()[0])
    return NumericsError(f"{name} of example {row} is {x[row].item()}; look for NaN in the model or a masked token")


def positive(name: str, value: float, *, zero: bool = False) -> float:
    """value, or InputError unless it is a finite number above 0 (or 0 itself, where zero).

    >>> positive("beta", 0.0)
    Traceback (most recent call last):
    minillm.errors.InputError: beta is 0.0; it must be a finite number above 0
    """
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise InputError(f"{name} is {value}; it must be a finite number {'of at least' if zero else 'above'} 0")
    return value
