"""A step of AdamW whose two moments are kept in 8 bits, in blocks of 256 numbers (arXiv 2110.02861 §2).

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2                  in fp32, read as map[code] * absmax[block]
    p = (1 - lr wd) p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)               rounded to p's format
    absmax[block] = max |m| of the block          code = the one whose map is nearest to m / absmax[block]; so for v

The map has more codes near 0 ("dynamic tree": a number's exponent takes the more bits, the smaller it is), the one of m
both signs, the one of v twice as many steps. The error of a code stays below 0.7% of absmax for m, 0.35% for v.

`step_ref` is the definition in torch; `step` is what runs: native on the CPU (csrc/cpu/adamw8*), in one pass over p, g
and the codes, the definition elsewhere. They agree to the last bit: (1 - b1) g and (1 - b2) g g are fused with the sum
that they enter, as torch does on processors that can (AVX2 and later, arm64). 10 million fp32 numbers, 2 cores of a
Zen 5: 12.4 ms a step; `minillm.training.adamw8` 13 with its look at the gradients, bitsandbytes 10 times that, torch's
fp32 AdamW 1.4 to 1.9 times (foreach) and 0.3 to 0.4 times that (fused).

Codes and absmax are those of bitsandbytes 0.50's AdamW8bit on the CPU, bit for bit, its habits included. The nearest
code is not looked for exactly: m / absmax goes to the nearest of 65,536 steps from -1 to 1, and that to the nearest
code. 0 lies between two steps, so that a 0 in a block that is not all zeros becomes +2.1e-5 absmax in m, +1.5e-5 absmax
in v, and smaller codes are never used. Where absmax is below 2^-128, and 1 / absmax no number, a 0 becomes code 0.

Where we differ: the square root is exact (there MKL's, off by one bit for every sixth number, and p with it). Decay
comes before the update as in torch and on their CPU; their CUDA kernels have it after, move codes so that signs stay,
and set moments to 0 where a gradient is not finite. Here such gradients are for the caller to refuse, as
`minillm.training.adamw8` does.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.ops import native
from minillm.ops.nf4 import dynamic_map

#: Numbers that share an absmax.
BLOCK = 256
#: Steps from -1 to 1 that a number is rounded to on its way to a code.
STEPS = 65536


class Moments(NamedTuple):
    """Zeros to begin with: m, v, uint8 codes in the parameter's shape · m_absmax, v_absmax (ceil(n / 256),) fp32."""

    m: Tensor
    m_absmax: Tensor
    v: Tensor
    v_absmax: Tensor


class Rates(NamedTuple):
    """What a step needs of its settings; Python's floats, rounded to fp32 where they meet tensors."""

    beta1: float
    rest1: float  # 1 - b1
    beta2: float
    rest2: float  # 1 - b2
    decay: float  # 1 - lr wd
    size: float  # -lr / (1 - b1^t)
    root: float  # sqrt(1 - b2^t)
    eps: float


def rates(t: int, *, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Rates:
    """Those of step t = 1, 2, ..."""
    first, second = betas
    return Rates(
        beta1=first,
        rest1=1 - first,
        beta2=second,
        rest2=1 - second,
        decay=1 - learning_rate * weight_decay,
        size=-learning_rate / (1 - first**t),
        root=math.sqrt(1 - second**t),
        eps=eps,
    )


@cache
def unsigned_map() -> Tensor:
    """The 256 codes of v, rising: 7 ranges of powers of ten with 2, 4, ... 128 codes, 0, and 1. m has `dynamic_map`.

    >>> [f"{code:.3g}" for code in unsigned_map()[[0, 1, 2, 254, 255]].tolist()]
    ['0', '3.25e-07', '7.75e-07', '0.996', '1']
    """
    codes = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (i + 1) + 1)
        codes += (10 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
    return torch.tensor(sorted(codes))


class Map(NamedTuple):
    """map (256,) fp32, what a code means, times absmax · codes (65536,) uint8, the code of each step."""

    map: Tensor
    codes: Tensor


@cache
def maps(device: str = "cpu") -> tuple[Map, Map]:
    """Those of m and v."""
    places = -1 + 2 * torch.arange(STEPS) / (STEPS - 1)
    found = []
    for code in (dynamic_map(), unsigned_map()):
        nearest = torch.bucketize(places, 0.5 * (code[:-1] + code[1:]))  # the number of midpoints below
        found.append(Map(code.to(device), nearest.to(device, torch.uint8)))
    return found[0], found[1]


def quantise_ref(x: Tensor, to: Map) -> tuple[Tensor, Tensor]:
    """x (blocks, 256) fp32 -> codes (blocks, 256) uint8, absmax (blocks,) fp32."""
    absmax = x.abs().amax(dim=1)
    unit = (x * (1 / absmax)[:, None]).nan_to_num(nan=-1.0).clamp(-1, 1)  # NaN: 0 * (1 / 0), or 0 times infinity
    step = ((unit + 1) * 0.5 * (STEPS - 1) + 0.5).int()
    codes = to.codes[step]
    return codes.masked_fill(absmax[:, None] == 0, 0), absmax


def dequantise_ref(codes: Tensor, absmax: Tensor, to: Map) -> Tensor:
    """codes (blocks, 256) uint8, absmax (blocks,) fp32 -> (blocks, 256) fp32."""
    return to.map[codes.int()] * absmax[:, None]


def update_ref(p: Tensor, g: Tensor, m: Tensor, v: Tensor, rates: Rates) -> None:
    """AdamW on moments in fp32: p, g of one shape in any float format, m, v fp32; p, m, v change in place."""
    g = g.float()
    m.mul_(rates.beta1).add_(g, alpha=rates.rest1)
    v.mul_(rates.beta2).addcmul_(g, g, value=rates.rest2)
    root = v.double().sqrt().float()  # torch's own of fp32 may be MKL's, in which every sixth is off by a bit
    divisor = (root / rates.root).add_(rates.eps)
    p.copy_(p.float().mul_(rates.decay).addcdiv_(m, divisor, value=rates.size))


def step_ref(p: Tensor, g: Tensor, moments: Moments, rates: Rates) -> None:
    """The definition: p and g of one shape and format; p and the moments change in place."""
    count, (for_m, for_v) = p.numel(), maps(str(p.device))
    size = len(moments.m_absmax) * BLOCK

    def blocks(x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        return torch.cat([flat, flat.new_zeros(size - count)]).view(-1, BLOCK)

    inside = blocks(torch.ones(count, dtype=torch.bool, device=p.device))
    m = dequantise_ref(blocks(moments.m), moments.m_absmax, for_m) * inside
    v = dequantise_ref(blocks(moments.v), moments.v_absmax, for_v) * inside
    new = blocks(p)
    update_ref(new, blocks(g), m, v, rates)
    p.copy_(new.view(-1)[:count].view(p.shape))
    for x, codes, absmax, to in ((m, moments.m, moments.m_absmax, for_m), (v, moments.v, moments.v_absmax, for_v)):
        found, largest = quantise_ref(x, to)
        codes.copy_(found.view(-1)[:count].view(codes.shape))
        absmax.copy_(largest)


def step(p: Tensor, g: Tensor, moments: Moments, rates: Rates, *, isa: str | None = None) -> None:
    """`step_ref`, fast. p has to be contiguous on the CPU; TypeError and ValueError name what does not fit."""
    if not native.serves(p):
        step_ref(p, g, moments, rates)
        return
    shape, blocks = tuple(p.shape), (-(-p.numel() // BLOCK),)
    addresses = [
        (
            native.address(f"moments.{name}", codes, torch.uint8, shape),
            native.address(f"moments.{name}_absmax", absmax, torch.float32, blocks),
            to.map.data_ptr(),
            to.codes.data_ptr(),
        )
        for name, codes, absmax, to in zip("mv", moments[::2], moments[1::2], maps(), strict=True)
    ]
    _module().adamw8_step(
        native.address("p", p, p.dtype, shape),
        native.address("g", g, p.dtype, shape),
        native.FORMATS[p.dtype],
        p.numel(),
        tuple(addresses),
        tuple(rates),
        native.isa_number(isa),
        torch.get_num_threads(),
    )


def _module() -> Any:
    return native.cpu()
