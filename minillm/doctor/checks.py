"""Each fast path against its definition: is it right here, and is it faster?

Right is the rule of two: the distance from the float64 result is at most twice the distance of the plain formula in the
same dtype, plus one rounding of the result. Rounding to nearest moves a number by half an eps at most, so that an error
of 1% is seen in bfloat16 too, whose eps is 0.8%.

    |ours - exact| <= 2 |plain - exact| + eps/2 |exact|        Euclidean norms; integers: equal

Times are medians on the CPU, with the numbers in the processor's caches as far as they fit. Fast path and formula run
in turn, so that what disturbs one disturbs the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.errors import MinillmError
from minillm.model import attention

_SECONDS, _LEAST_ROUNDS = 0.4, 3  # of a measurement: a steady median, and all of them under 15 s on two cores
_READ_NUMBERS = 64_000_000  # float32: 256 MB, more than most caches hold


@dataclass(frozen=True)
class Check:
    """A fast path and its definition; both take what `inputs(dtype)` makes: CPU tensors, the same every time.

    rival: what it is timed against, where that is not the definition.
    """

    name: str
    dtype: torch.dtype
    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    rival: Callable[..., Tensor] | None = None

    @property
    def format(self) -> str:
        """`bfloat16` of `torch.bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Outcome:
    """Of one check. `fault` is None where ours agrees; errors are relative to the exact result; None: not measured."""

    name: str
    dtype: str
    fault: str | None
    error: float | None = None
    plain_error: float | None = None
    seconds: float | None = None
    plain_seconds: float | None = None


@dataclass(frozen=True)
class Linear:
    """y = x W^T by torch alone, x (M, K), W (N, K), in each number format; nothing of ours that could be wrong."""

    name: str
    bfloat16_seconds: float
    float32_seconds: float


def _qkv(heads: int, groups: int, queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, queries), (groups, keys), (groups, keys))
    return tuple(torch.randn(1, h, t, 64, generator=generator).to(dtype) for h, t in shapes)  # (1, H or G, T or S, E)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.attend(q, k, v, None)


def _attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.attention_ref(q, k, v, None)


#: Every fast path of the package. 32/4: query heads / key-value heads, of size 64.
CHECKS: tuple[Check, ...] = tuple(
    Check(f"attend {what}, {sizes[0]}/{sizes[1]}", dtype, partial(_qkv, *sizes), _attend, _attention_ref)
    for what, sizes in (
        ("128 tokens", (32, 4, 128, 128)),
        ("1 token on 512", (32, 4, 1, 512)),
        ("1 token on 512", (71, 1, 1, 512)),
    )
    for dtype in (torch.float32, torch.bfloat16)
)
#: M, N, K: a prompt, and a single token, for which the time is that of reading the weights.
LINEARS = ((512, 2048, 2048), (1, 4096, 4096))


def run_check(check: Check) -> Outcome:
    """Compare a fast path with its definition, then time both. What it raises is a fault, not the doctor's end."""
    inputs = check.inputs(check.dtype)
    plain = check.plain(*inputs)
    exact = check.plain(*(x.double() if x.is_floating_point() else x for x in inputs)).double()
    outcome = partial(Outcome, check.name, check.format)
    try:
        found = check.ours(*inputs)
        rival = check.rival or check.plain
        seconds, plain_seconds = medians(lambda: check.ours(*inputs), lambda: rival(*inputs))
    except (RuntimeError, TypeError, ValueError, MinillmError) as raised:
        said = str(raised).partition("\n")[0]
        return outcome(f"raised {type(raised).__name__}: {said}")
    if (found.shape, found.dtype) != (plain.shape, plain.dtype):
        fault: str | None = f"returned {tuple(found.shape)} {found.dtype}, not {tuple(plain.shape)} {plain.dtype}"
        return outcome(fault, seconds=seconds, plain_seconds=plain_seconds)
    fault, error, plain_error = judge(found, plain, exact)
    return outcome(fault, error, plain_error, seconds, plain_seconds)


def judge(found: Tensor, plain: Tensor, exact: Tensor) -> tuple[str | None, float | None, float | None]:
    """(fault or None, our error, the plain formula's), by the rule at the top of this file.

    >>> judge(torch.tensor([1.01]), torch.tensor([1.0]), torch.tensor([1.0]).double())[0]
    'error 1.0e-02 of the result, the plain formula 0.0e+00'
    """
    if not all(bool(torch.isfinite(x).all()) for x in (found, plain, exact)):
        return "not finite", None, None
    largest = float(exact.norm().clamp(min=torch.finfo(torch.float64).tiny))
    ours, theirs = (float((x.double() - exact).norm()) / largest for x in (found, plain))
    rounding = torch.finfo(found.dtype).eps / 2 if found.is_floating_point() else 0.0
    if ours <= 2 * theirs + rounding:
        return None, ours, theirs
    return f"error {ours:.1e} of the result, the plain formula {theirs:.1e}", ours, theirs


def medians(ours: Callable[[], object], plain: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of each, run in turn; the first round warms up."""
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while len(times[0]) <= _LEAST_ROUNDS or time.perf_counter() - begin < _SECONDS:
        for function, seconds in zip((ours, plain), times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def time_linear(sizes: tuple[int, int, int]) -> Linear:
    """Is bfloat16 worth it here?"""
    rows, width, depth = sizes
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, depth, generator=generator) for n in (rows, width))
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    times = medians(lambda: F.linear(x16, weight16), lambda: F.linear(x, weight))
    return Linear(f"{rows} x {width} x {depth}", *times)


def read_speed() -> float:
    """Bytes a second that a sum of 256 MB of float32 reads, with torch's threads."""
    numbers = torch.ones(_READ_NUMBERS)
    seconds, _ = medians(numbers.sum, lambda: None)
    return numbers.numel() * numbers.element_size() / seconds
