"""Bytes of what lies there between two steps: weights, adapters, optimizer; counted tensor by tensor.

    format      bytes of a matrix W (N, K)
    float       N K · 4 (fp32), N K · 2 (bf16, fp16)
    int8        N K + 4 N                                    one byte a number, one fp32 scale a row
    nf4         ceil(N K / 2) + 4 ceil(N K / 64)             half a byte, one fp32 scale for 64 numbers
    nf4 double  ceil(N K / 2) + b + 4 ceil(b / 256)          b = ceil(N K / 64) scales of one byte, 256 share an fp32

Only the linear layers inside the blocks are quantised; embedding, norms, biases and lm_head stay in the model's format.
Sources: arXiv 2208.07339 §3 (int8), 2305.14314 §3 (NF4, double quantisation). Of double quantisation the scales' mean
(4 bytes a matrix) and the code tables (1 KiB) are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import nn

from minillm.checkpoint.load import without_memory
from minillm.config import DecoderConfig
from minillm.plan.use import Use


@dataclass(frozen=True)
class Shapes:
    """The tensors of a model. All blocks are alike, so that one is listed.

    linears: leaf name -> (N, K) of the matrices in a block. beside: sizes of a block's norms and biases.
    embedding: V D. ends: sizes of what follows the blocks, the last norm and, unless tied, the head.
    """

    layers: int
    linears: dict[str, tuple[int, int]]
    beside: tuple[int, ...]
    embedding: int
    ends: tuple[int, ...]

    @property
    def block(self) -> tuple[int, ...]:
        """Sizes of all tensors of a block."""
        return (*(rows * columns for rows, columns in self.linears.values()), *self.beside)

    @property
    def numbers(self) -> int:
        """All parameters."""
        return self.layers * sum(self.block) + self.embedding + sum(self.ends)


def shapes_of(config: DecoderConfig) -> Shapes:
    """Read off a model of one block on the meta device: shapes without memory."""
    model = without_memory(replace(config, num_layers=1))
    block = model.blocks[0]
    found = {name.rpartition(".")[2]: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}
    matrices = {id(linear.weight) for linear in found.values()}
    outside = {name: p.numel() for name, p in model.named_parameters() if not name.startswith("blocks.")}
    return Shapes(
        layers=config.num_layers,
        linears={name: (linear.out_features, linear.in_features) for name, linear in found.items()},
        beside=tuple(p.numel() for p in block.parameters() if id(p) not in matrices),
        embedding=outside.pop("embed.weight"),
        ends=tuple(outside.values()),
    )


def weight_bytes(shapes: Shapes, use: Use) -> int:
    """All weights in the formats of the module's table."""
    matrices = sum(_matrix_bytes(rows, columns, use) for rows, columns in shapes.linears.values())
    rest = shapes.layers * sum(shapes.beside) + shapes.embedding + sum(shapes.ends)
    return shapes.layers * matrices + rest * use.number


def _matrix_bytes(rows: int, columns: int, use: Use) -> int:
    numbers = rows * columns
    if use.quantize == "int8":
        return numbers + 4 * rows
    if use.quantize == "nf4":
        scales = math.ceil(numbers / 64)
        return math.ceil(numbers / 2) + (scales + 4 * math.ceil(scales / 256) if use.double_quant else 4 * scales)
    return numbers * use.number


def adapter_sizes(shapes: Shapes, use: Use) -> tuple[int, ...]:
    """Numbers in A (R, K) and B (N, R) of each adapter in one block: R · (K + N) an adapter, always fp32."""
    rank = use.lora_rank or 0
    pairs = (shapes.linears[name] for name in use.targets(shapes.linears))
    return tuple(size for rows, columns in pairs for size in (rank * columns, rank * rows))


def optimizer_bytes(size: int, number: int, use: Use) -> int:
    """What the optimizer keeps for one tensor of `size` numbers of `number` bytes: two moments.

    AdamW     2 · size · number                            torch keeps moments in the parameter's own format
    8-bit     2 · size + 2 · 4 ceil(size / 256)            one byte a moment, 256 share an fp32 scale (arXiv 2110.02861)
              2 · size · 4                                 tensors of fewer than 4096 numbers
    """
    if use.optimizer == "adamw":
        return 2 * size * number
    return 2 * (size + 4 * math.ceil(size / 256)) if size >= 4096 else 2 * 4 * size
