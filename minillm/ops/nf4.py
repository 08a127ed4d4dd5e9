"""NF4 and FP4 (QLoRA, arXiv 2305.14314 §3): weights of 4 bits in blocks, each with one scale.

    absmax[b] = max |W[i]| over the numbers i of block b         W (N, K) read row by row; a block may cross rows
    q[i]      = the code nearest to W[i] / absmax[b]             in the middle between two: the lower
    W[i]     ~= code[q[i]] * absmax[b]                           in fp32, rounded once to the format asked for
    y         = x W^T + bias                                     x (..., K) -> (..., N)

Double quantisation keeps absmax itself in 8 bits, `absmax_codes`, in blocks of 256 around their mean:

    absmax[b] = map[absmax_codes[b]] * nested.absmax[b // 256] + nested.offset

`*_ref` is the definition in torch; `quantise`, `dequantise` and `linear` are what runs: native kernels on the CPU
(csrc/cpu/nf4*), the definition elsewhere. Up to 16 rows of x meet the packed weights as they stream from memory; for
more, tiles of W are made float, in the format of x, and multiplied by torch's matmul. W is never whole in floating
point. The gradient is for x and bias: that of the dequantised weights.

Codes, absmax, bytes and nested state are those of bitsandbytes 0.50 on the CPU, bit for bit, its habits included: a
short last block is divided by absmax where whole ones are multiplied by 1 / absmax, and an all-zero short block has
absmax 1e-38; absmax is rounded to the nearest of the 256 codes on a grid of 65,536 steps, not exactly. Where we differ:
training and evaluation compute the same (there, on the CPU, not); a forward packs nothing anew; blocks may be of any
even size; and where K is no multiple of `block`, numbers are right (there, on AVX-512, they take the absmax of other
blocks).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm import memory
from minillm.ops import native

#: Kind -> its 16 codes. NF4: quantiles of the normal distribution, as bitsandbytes has them. FP4: sign, two bits of
#: exponent, one of mantissa, over the largest.
CODES = {
    "nf4": torch.tensor(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ]
    ),
    "fp4": torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12,
}
#: Kind -> codes in rising order. FP4 has two zeros: 0 itself becomes code 0, a little more code 8.
_ORDER = {"nf4": list(range(16)), "fp4": [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]}
_KINDS = list(CODES)  # as csrc/cpu/nf4.h counts them
#: Numbers of absmax that share a scale in double quantisation.
NESTED_BLOCK = 256
#: Up to so many rows of x meet the packed weights themselves. Measured, bf16, 2 cores, W (5632, 2048): 8 rows 0.4 ms
#: against 1.9 in tiles; at 32 rows tiles win.
_FEW = 16
#: Rows, or in the backward pass columns, of W that are in floating point at a time.
_TILE = 1024


class Nested(NamedTuple):
    """absmax (ceil(blocks / 256),) · map (256,) · offset (), all fp32: what the 8-bit absmax codes mean."""

    absmax: Tensor
    map: Tensor
    offset: Tensor


class Weight(NamedTuple):
    """A quantised W (N, K) and the bias.

    packed (ceil(N K / 2), 1) uint8, even numbers in the high four bits · absmax (blocks,) fp32, or uint8 with `nested`
    · shape (N, K) · bias (N,) in the format of x, or None.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    kind: str = "nf4"
    block: int = 64
    nested: Nested | None = None
    bias: Tensor | None = None

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] * self.shape[1] // self.block)


def check(kind: str, block: int) -> None:
    """ValueError unless the kind is known and blocks are even and of 32 to 4096 numbers."""
    if kind not in CODES:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(CODES)}")
    if block % 2 or not 32 <= block <= 4096:
        raise ValueError(f"block is {block}; it must be even, from 32 to 4096")


def quantise_ref(x: Tensor, kind: str = "nf4", block: int = 64) -> tuple[Tensor, Tensor]:
    """The definition: x of any shape, n numbers -> packed (ceil(n / 2), 1) uint8, absmax (ceil(n / block),) fp32."""
    check(kind, block)
    flat = x.detach().reshape(-1).float()
    whole, rest = flat.split([len(flat) // block * block, len(flat) % block])
    absmax = whole.view(-1, block).abs().amax(dim=1)  # (blocks,)
    scaled = (whole.view(-1, block) * (1 / absmax.clamp(min=1e-38))[:, None]).reshape(-1)
    if len(rest):
        largest = rest.abs().amax().clamp(min=1e-38)
        absmax, scaled = torch.cat([absmax, largest[None]]), torch.cat([scaled, rest / largest])
    if len(flat) % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    order = torch.tensor(_ORDER[kind], device=x.device)
    rising = CODES[kind].to(x.device)[order]
    q = order[torch.bucketize(scaled, (rising[:-1] + rising[1:]) / 2)].to(torch.uint8)  # number of midpoints below
    return (q[::2] << 4 | q[1::2])[:, None], absmax


def quantise(x: Tensor, kind: str = "nf4", block: int = 64, *, isa: str | None = None) -> tuple[Tensor, Tensor]:
    """`quantise_ref`, fast."""
    check(kind, block)
    if not native.serves(x):
        return quantise_ref(x, kind, block)
    x = x.detach().contiguous()
    count = x.numel()
    packed = memory.huge(((count + 1) // 2, 1), torch.uint8)
    absmax = torch.empty(-(-count // block), dtype=torch.float32)
    _module().nf4_quantise(
        x.data_ptr(),
        native.FORMATS[x.dtype],
        count,
        block,
        _KINDS.index(kind),
        packed.data_ptr(),
        absmax.data_ptr(),
        native.isa_number(isa),
        torch.get_num_threads(),
    )
    return packed, absmax


@cache
def dynamic_map() -> Tensor:
    """The 256 signed 8-bit codes of arXiv 2110.02861 §2.2, rising: 7 ranges of powers of ten, 0, and 1.

    >>> dynamic_map()[[0, 127, 255]].tolist()
    [-0.992968738079071, 0.0, 1.0]
    """
    codes = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1)
        means = 10 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        codes += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(codes))


def quantise_absmax(absmax: Tensor) -> tuple[Tensor, Nested]:
    """Double quantisation: absmax (blocks,) fp32 -> codes (blocks,) uint8 and what they mean.

    As bitsandbytes on the CPU: the scaled number goes to the nearest of 65,536 steps, and that to the nearest code.
    """
    offset = absmax.mean()
    around = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scale = around.abs().amax(dim=1)
    # A block of zeros has codes 0 there and scale 0, which makes every code mean the offset.
    inverse = torch.where(scale > 0, 1 / scale, 0)
    steps = (((around * inverse[:, None]).clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).floor()
    code = dynamic_map().to(absmax.device)
    q = torch.bucketize(-1 + 2 * steps / 65535, 0.5 * (code[:-1] + code[1:])).to(torch.uint8)
    q = q.masked_fill(scale[:, None] == 0, 0)
    return q.view(-1)[: len(absmax)].contiguous(), Nested(scale, code.clone(), offset)


def scales(weight: Weight) -> Tensor:
    """absmax (blocks,) in fp32, double quantised or not."""
    if weight.nested is None:
        return weight.absmax
    scale = weight.nested.absmax.repeat_interleave(NESTED_BLOCK)[: weight.blocks]
    return weight.nested.map[weight.absmax.int()] * scale + weight.nested.offset


def dequantise_ref(
    weight: Weight, dtype: torch.dtype, rows: range | None = None, columns: range | None = None
) -> Tensor:
    """The definition: the tile of W that rows and columns name, or all of it."""
    rows, columns = rows or range(weight.shape[0]), columns or range(weight.shape[1])
    device = weight.packed.device
    row, column = (torch.arange(part.start, part.stop, device=device) for part in (rows, columns))
    i = row[:, None] * weight.shape[1] + column  # (rows, columns) places in W, read row by row
    q = weight.packed.view(-1)[i // 2] >> (4 * (1 - i % 2)) & 15
    return (CODES[weight.kind].to(device)[q.int()] * scales(weight)[i // weight.block]).to(dtype)


def dequantise(
    weight: Weight,
    dtype: torch.dtype,
    rows: range | None = None,
    columns: range | None = None,
    *,
    out: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    """`dequantise_ref`, fast; into `out` (len(rows), len(columns)) where it is given."""
    rows, columns = rows or range(weight.shape[0]), columns or range(weight.shape[1])
    if rows.stop > weight.shape[0] or columns.stop > weight.shape[1]:
        raise ValueError(f"rows {rows} and columns {columns} reach beyond the shape {weight.shape}")
    size = (len(rows), len(columns))
    if out is None:
        out = torch.empty(size, dtype=dtype, device=weight.packed.device)
    if not native.serves(out) or weight.packed.device.type != "cpu":
        return out.copy_(dequantise_ref(weight, dtype, rows, columns))
    _module().nf4_dequantise(
        addresses(weight),
        rows.start,
        size[0],
        columns.start,
        size[1],
        native.address("out", out, dtype, size),
        native.FORMATS[dtype],
        native.isa_number(isa),
        torch.get_num_threads(),
    )
    return out


def addresses(weight: Weight) -> tuple[Any, ...]:
    """The weight as csrc/cpu/bind_nf4.cpp takes it, after the checks."""
    check(weight.kind, weight.block)
    (outputs, width), blocks, nested, find = weight.shape, weight.blocks, weight.nested, native.address
    packed = find("packed", weight.packed, torch.uint8, ((outputs * width + 1) // 2, 1))
    if nested is None:
        absmax = (find("absmax", weight.absmax, torch.float32, (blocks,)), 0, 0, 0, 0)
    else:
        absmax = (
            0,
            find("absmax", weight.absmax, torch.uint8, (blocks,)),
            find("nested.absmax", nested.absmax, torch.float32, (-(-blocks // NESTED_BLOCK),)),
            find("nested.map", nested.map, torch.float32, (256,)),
            find("nested.offset", nested.offset, torch.float32, ()),
        )
    return packed, absmax, _KINDS.index(weight.kind), outputs, width, weight.block


def linear_ref(x: Tensor, weight: Weight) -> Tensor:
    """The definition: x (..., K) float -> y (..., N) in the format of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ dequantise_ref(weight, wide).T
    return (y if weight.bias is None else y + weight.bias.to(wide)).to(x.dtype)


def linear(x: Tensor, weight: Weight, *, isa: str | None = None) -> Tensor:
    """`linear_ref`, fast, with gradients for x and bias: x (..., K) float -> (..., N).

    In plain inference the kernel is called as it is; under autograd and torch.compile through the registered operator.
    """
    bias = weight.bias
    trains = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if trains or torch.compiler.is_compiling():
        return _linear(x, bias, *flat(weight), isa)
    return _forward(x, weight, isa)


def _forward(x: Tensor, weight: Weight, isa: str | None) -> Tensor:
    outputs, width = weight.shape
    if x.shape[-1] != width:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last size must be {width}")
    rows = x.reshape(-1, width)  # (M, K)
    direct = native.serves(x) and len(rows) <= _FEW
    y = x.new_empty(*x.shape[:-1], outputs)  # no view is returned: what is one may not be changed in place
    (_direct if direct else _tiled)(rows.contiguous(), weight, y.view(len(rows), outputs), isa)
    return y


def _direct(x: Tensor, weight: Weight, y: Tensor, isa: str | None) -> None:
    outputs = weight.shape[0]
    _module().nf4_linear(
        x.data_ptr(),
        native.FORMATS[x.dtype],
        len(x),
        addresses(weight),
        0 if weight.bias is None else native.address("bias", weight.bias, x.dtype, (outputs,)),
        y.data_ptr(),
        native.isa_number(isa),
        torch.get_num_threads(),
    )


def _tiles(weight: Weight, dtype: torch.dtype, across: str, isa: str | None = None) -> Iterator[tuple[range, Tensor]]:
    """W tile by tile, as whole rows or whole columns: which they are, and their numbers in memory used again."""
    outputs, width = weight.shape
    length = outputs if across == "rows" else width
    memory = torch.empty(min(_TILE, length) * (outputs + width - length), dtype=dtype, device=weight.packed.device)
    for first in range(0, length, _TILE):
        part = range(first, min(first + _TILE, length))
        size = (len(part), width) if across == "rows" else (outputs, len(part))
        tile = memory[: size[0] * size[1]].view(size)
        yield part, dequantise(weight, dtype, **{across: part}, out=tile, isa=isa)


def _format(x: Tensor) -> torch.dtype:
    """In which format x meets tiles. On the CPU, matmuls of fp16 are slower than those of fp32: 3 to 60 times."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def _tiled(x: Tensor, weight: Weight, y: Tensor, isa: str | None) -> None:
    dtype = _format(x)
    wide = x.to(dtype)
    for rows, tile in _tiles(weight, dtype, "rows", isa):
        part = y[:, rows.start : rows.stop]
        if weight.bias is None and part.dtype == dtype:
            torch.mm(wide, tile.T, out=part)
        else:
            bias = None if weight.bias is None else weight.bias[rows.start : rows.stop].to(dtype)
            part.copy_(torch.nn.functional.linear(wide, tile, bias))


# --- the registered operator: tensors and sizes of a Weight, laid flat


def flat(weight: Weight) -> tuple[list[Tensor], list[int]]:
    """As the registered operators take it: tensors, and (N, K, kind, block)."""
    layout = [*weight.shape, _KINDS.index(weight.kind), weight.block]
    return [weight.packed, weight.absmax, *(weight.nested or ())], layout


def _weight(state: Sequence[Tensor], layout: Sequence[int], bias: Tensor | None = None) -> Weight:
    outputs, width, kind, block = layout
    nested = Nested(*state[2:]) if len(state) > 2 else None
    return Weight(state[0], state[1], (outputs, width), _KINDS[kind], block, nested, bias)


@torch.library.custom_op("minillm::nf4_linear", mutates_args=())
def _linear(x: Tensor, bias: Tensor | None, state: Sequence[Tensor], layout: Sequence[int], isa: str | None) -> Tensor:
    return _forward(x, _weight(state, layout, bias), isa)


@_linear.register_fake
def _(x: Tensor, bias: Tensor | None, state: Sequence[Tensor], layout: Sequence[int], isa: str | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], layout[0])


@torch.library.custom_op("minillm::nf4_input_gradient", mutates_args=())
def input_gradient(gradient: Tensor, state: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    """g (..., N) -> g W (..., K), W as `linear` has it; tiles of whole columns, so that each number is rounded once."""
    weight = _weight(state, layout)
    dtype = _format(gradient)
    g = gradient.reshape(-1, weight.shape[0]).to(dtype)  # (M, N)
    out = gradient.new_empty(len(g), weight.shape[1])
    for columns, tile in _tiles(weight, dtype, "columns"):
        out[:, columns.start : columns.stop] = g @ tile
    return out.view(*gradient.shape[:-1], weight.shape[1])


@input_gradient.register_fake
def _(gradient: Tensor, state: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], layout[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, state, layout, _ = inputs
    ctx.save_for_backward(*state)
    ctx.layout = layout


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, list[None], None, None]:
    state = list(ctx.saved_tensors)
    for_x = input_gradient(gradient, state, ctx.layout) if ctx.needs_input_grad[0] else None
    for_bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
    return for_x, for_bias, [None] * len(state), None, None


_linear.register_autograd(_backward, setup_context=_remember)


def _module() -> Any:
    return native.cpu()
