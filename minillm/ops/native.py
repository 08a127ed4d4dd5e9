"""The compiled kernels: which there are, which are chosen, and every check that stands before a raw address.

`minillm._cpu` takes addresses, sizes and a number of threads, and believes them. So tensors are checked here, once:
dtype, shape, device, contiguity. Nobody else imports the module. Without it (no compiler, another platform)
`available()` is False and the definitions in torch serve, slowly; `minillm doctor` says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

#: Kinds whose numbers lie where `data_ptr` says: DTensor, FakeTensor and others have nothing there for a kernel.
_PLAIN = (Tensor, nn.Parameter)
#: The float formats of tensors, as csrc/cpu/numbers.h counts them.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: The most products of magnitude 127 * 127 that an int32 can sum: (2^31 - 1) // 127^2.
LONGEST_SUM = (2**31 - 1) // (127 * 127)


@cache
def cpu() -> ModuleType | None:
    """`minillm._cpu`, or None where it was not built or does not load (`why_not` says which).

    torch is imported before: the module then shares the OpenMP threads that torch has loaded.
    """
    return _load()[0]


def why_not() -> str:
    """Why `cpu()` is None, for people; empty where it is not."""
    return _load()[1]


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("minillm._cpu"), ""
    except ModuleNotFoundError:
        return None, "not built: pip found no C++ compiler; install one and `pip install` minillm again"
    except ImportError as error:
        return None, f"does not load ({error}); `pip install` minillm again"


def available() -> bool:
    """Whether the CPU kernels can be used."""
    return cpu() is not None


def serves(x: Tensor) -> bool:
    """Whether the kernels take this tensor: a plain one on the CPU, in one of `FORMATS`."""
    return x.device.type == "cpu" and x.dtype in FORMATS and type(x) in _PLAIN and available()


def is_transformed() -> bool:
    """Whether torch.compile or torch.func (grad, vmap, jvp ...) is at work: they derive from the definitions alone."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


@cache
def isas() -> dict[str, bool]:
    """Variant -> whether this processor runs it, from the plainest to the fastest."""
    module = cpu()
    return {} if module is None else dict(module.isas())


def isa_number(isa: str | None) -> int:
    """The variant by name, or the fastest; ValueError where this machine has no such variant."""
    if isa is None:
        return _best()
    if not isas().get(isa):
        has = ", ".join(name for name, runs in isas().items() if runs)
        raise ValueError(f"isa {isa!r} does not run here; this machine has {has or 'no compiled kernels'}")
    return list(isas()).index(isa)


@cache
def _best() -> int:
    module = cpu()
    assert module is not None
    return int(module.best_isa())


_aside = ContextVar("minillm kernels step aside", default=False)


@contextmanager
def aside() -> Iterator[None]:
    """While it lasts, attention runs through torch's functions, which can be watched from outside."""
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


def is_aside() -> bool:
    """Within `aside`."""
    return _aside.get()


def address(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Where the numbers of x begin, after the checks; TypeError and ValueError name the argument."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    if x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}; it must be {dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"{name} is on {x.device}; it must be on the CPU")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")
    if not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous; call .contiguous() on it")
    return x.data_ptr()


def format_of(name: str, x: Tensor) -> int:
    """The number of x's float format; TypeError for others."""
    found = FORMATS.get(x.dtype)
    if found is None:
        raise TypeError(f"{name} is {x.dtype}; it must be one of {', '.join(map(str, FORMATS))}")
    return found


def check_length(length: int) -> None:
    """ValueError where int8 sums of so many products could leave int32."""
    if length > LONGEST_SUM:
        raise ValueError(f"sums of {length} int8 products do not fit int32; at most {LONGEST_SUM}")


def info() -> dict[str, Any]:
    """What is built and chosen, for `minillm doctor`."""
    module = cpu()
    chosen = None if module is None else list(isas())[_best()]
    return {"cpu": module is not None, "why_not": why_not(), "isas": isas(), "isa": chosen}
