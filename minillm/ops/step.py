"""One new token a row through a whole block of the Llama kind, in one native call (csrc/cpu/block_step.h).

    h = x + attention(norm(x))        y = h + mlp(norm(h))        with the modules of minillm/model one by one

The bits are those of the modules, which call the same kernels; the way through Python between them is saved: 0.2 ms a
block. `BlockStep` is made once of a block's weights and called for every token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.ops import int8, native, nf4
from minillm.ops.block import FEW_ROWS, streamed_rows


class Floating(NamedTuple):
    """W (N, K) and bias (N,) or None, in the format of x."""

    w: Tensor
    bias: Tensor | None = None


class Int8(NamedTuple):
    """A weight of `minillm.ops.int8`, and from where on a column of x is an outlier; 0: nowhere."""

    weight: int8.Weight
    threshold: float


Linear = Floating | Int8 | nf4.Weight


class Block(NamedTuple):
    """The weights of a block: D wide, H query heads and G key/value heads of E numbers.

    norms (D,) each: before the attention, before the MLP · linears: q, k, v, o, gate, up, down.
    """

    norms: tuple[Tensor, Tensor]
    eps: float
    heads: int
    kv_heads: int
    head_size: int
    linears: tuple[Linear, ...]


class Past(NamedTuple):
    """Keys and values (B, G, capacity, E) of which `length` tokens are there; keep (B, length + 1) bool, or None."""

    keys: Tensor
    values: Tensor
    length: int
    keep: Tensor | None


class BlockStep:
    """Where a block's weights lie, checked once; called with what changes from token to token.

    It keeps no weight alive: whoever calls it knows that they lie where they did. `most_rows`: above, torch is faster.
    """

    def __init__(self, block: Block) -> None:
        norm = block.norms[0]
        self.dtype, self.width, self.kv_heads, self.head_size = norm.dtype, len(norm), block.kv_heads, block.head_size
        norms = [native.address("norm", norm, self.dtype, (self.width,)) for norm in block.norms]
        sizes = (self.width, block.heads, block.kv_heads, block.head_size)
        linears = [
            _linear(linear, self.dtype, shape) for linear, shape in zip(block.linears, _shapes(block), strict=True)
        ]
        module: Any = native.cpu()
        self._native = module.BlockWeights(native.format_of("norm", norm), block.eps, sizes, *norms, linears)
        has_floats = any(isinstance(linear, Floating) for linear in block.linears)
        self.most_rows = streamed_rows(self.dtype) if has_floats else FEW_ROWS

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past) -> Tensor:
        """x (B, 1, D) and its keys' and values' past -> y (B, 1, D); the new keys and values are in the past then.

        cos, sin (B or 1, 1, 1, d). Raises TypeError and ValueError that name the argument.
        """
        batch, (tables, _, _, turning) = x.shape[0], cos.shape
        capacity, table = past.keys.shape[2], (tables, 1, 1, turning)
        stored = (batch, self.kv_heads, capacity, self.head_size)
        if not 0 <= past.length < capacity or batch % tables or turning > stored[3] or turning % 2:
            raise ValueError(f"{past.length} tokens in keys {stored} and tables {table} do not fit x {tuple(x.shape)}")
        x = x.contiguous()
        y = torch.empty_like(x)
        self._native.step(
            native.address("x", x, self.dtype, (batch, 1, self.width)),
            y.data_ptr(),
            batch,
            native.address("cos", cos, self.dtype, table),
            native.address("sin", sin, self.dtype, table),
            tables,
            turning,
            native.address("keys", past.keys, self.dtype, stored),
            native.address("values", past.values, self.dtype, stored),
            past.length,
            capacity,
            0 if past.keep is None else native.address("keep", past.keep, torch.bool, (batch, past.length + 1)),
            native.isa_number(None),
            torch.get_num_threads(),
        )
        return y


def _shapes(block: Block) -> list[tuple[int, int]]:
    """(N, K) of each linear: they follow from the width, the heads and the width of gate."""
    width, inner = len(block.norms[0]), _shape(block.linears[4])[0]
    all_heads, kv_heads = (count * block.head_size for count in (block.heads, block.kv_heads))
    around_attention = [(all_heads, width), (kv_heads, width), (kv_heads, width), (width, all_heads)]
    return [*around_attention, (inner, width), (inner, width), (width, inner)]


def _shape(linear: Linear) -> tuple[int, ...]:
    match linear:
        case Floating(w, _) | Int8(int8.Weight(w, _, _), _):
            return tuple(w.shape)
        case nf4.Weight():
            return tuple(linear.shape)


def _linear(linear: Linear, dtype: torch.dtype, shape: tuple[int, int]) -> tuple[Any, ...]:
    """As csrc/cpu/bind_step.cpp takes it, after the checks."""
    if _shape(linear) != shape:
        raise ValueError(f"a linear of the block has shape {_shape(linear)}; it must be {shape}")
    matrix: tuple[Any, ...]
    match linear:
        case Floating(w, bias):
            matrix = (native.address("weight", w, dtype, shape),)
        case Int8(int8.Weight(w, scale, bias), threshold):
            native.check_length(shape[1])
            address = native.address("weight", w, torch.int8, shape)
            matrix = (address, native.address("scale", scale, torch.float32, shape[:1]), threshold or math.inf)
        case nf4.Weight():
            matrix, bias = nf4.addresses(linear), linear.bias
    return matrix, 0 if bias is None else native.address("bias", bias, dtype, shape[:1]), *shape
