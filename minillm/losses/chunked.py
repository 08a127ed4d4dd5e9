"""The next-token loss of a whole batch whose logits are never whole: a chunk of rows at a time.

    z = h W^T                                     h (M, D) hidden states · W (V, D) the head, or the tied embedding
    loss = 1/N  sum over kept m of  log(sum_v exp z_mv) - z_m,target
    G = softmax(z) - onehot(target)               dloss/dh = G W / N  (M, D)         dloss/dW = G^T h / N  (V, D)

Logits are the largest tensor of a training step: 2048 rows over 32,000 tokens take 262 MB in fp32, and the plain way
holds four of that size (logits, log softmax, and the gradient of each), at the very moment when all activations are
there too. But a row of logits is of use only until its own loss and its own row of G are known. So both gradients are
made in the forward pass, chunk by chunk, as Liger's fused linear cross-entropy does (arXiv 2410.10989), in memory that
each chunk uses again. Kept until the backward pass: (n, D) for the n kept rows, and (V, D) where the head is trained.
The three matrix products are those of the plain way; none is computed twice. Rows that predict nothing are not
multiplied at all: in fine-tuning on answers, half of the head's work.

Formats. Products are in the format of h and W, or that of autocast; softmax, loss and the sum of dW over the chunks are
in fp32 (fp64 for fp64). G is not divided by N before it is rounded, so that in fp16 probabilities do not vanish; dh is
kept 1024 times too large there, and G^T h, a sum over rows which could leave fp16's range, multiplied in fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.errors import InputError
from minillm.losses.next_token import count_targets
from minillm.ops.matmul import product

#: Bytes of a chunk's logits in all formats that they take.
_CHUNK_BYTES = 2**26
#: Each chunk reads W and changes dW: with fewer rows that takes as long as the arithmetic. So, with W (32000, 1024) in
#: bf16, 2 cores, rows and ms a loss of 512: 87 and 448, 174 and 310, 349 and 300, 512 and 267.
_FEWEST_ROWS = 256
#: What G is multiplied by in fp16, a power of two: 2^-14 / 1024 = 6e-8 is then the least probability with all digits,
#: and G W stays in range while |W| < 65504 / 2048 = 32, as |G| of a row sums to at most 2.
_FP16_SCALE = 1024.0


def chunked_next_token_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, keep: Tensor | None = None, *, total: Tensor | int | None = None
) -> Tensor:
    """`next_token_loss(hidden W^T, tokens, keep, total=total)`: hidden (B, T, D) · weight (V, D) -> scalar.

    tokens (B, T) int64 · keep (B, T) bool · total as there: the sum of the losses with total=1, and the loss of one
    large batch where each of its parts gets the number of predicted tokens in all (`count_targets`). Raises as
    `chunked_cross_entropy`.

    >>> chunked_next_token_loss(torch.zeros(1, 3, 4), torch.ones(8, 4), torch.tensor([[1, 2, 3]])).exp().item()
    8.0
    """
    predicts = torch.ones_like(tokens, dtype=torch.bool)
    if keep is not None:
        predicts[:, :-1] = keep[:, 1:]
    predicts[:, -1] = False
    targets = tokens.roll(-1, dims=1)  # the last of each row would be its first, which nothing predicts
    total = count_targets(tokens, keep).clamp(min=1) if total is None else total
    return chunked_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), predicts.flatten(), total=total)


def chunked_cross_entropy_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, keep: Tensor | None = None, *, total: Tensor | int | None = None
) -> Tensor:
    """The definition, with all logits in at least fp32: see `chunked_cross_entropy`."""
    keep = torch.ones_like(targets, dtype=torch.bool) if keep is None else keep
    logits = F.linear(hidden, weight)[keep]  # (n, V)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    surprise = F.cross_entropy(wide, targets[keep], reduction="sum")
    return surprise / (keep.sum().clamp(min=1) if total is None else total)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    keep: Tensor | None = None,
    *,
    total: Tensor | int | None = None,
    rows: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of hidden W^T against targets / total: scalar in nats, at least fp32.

    hidden (M, D) · weight (V, D), of one float format or within autocast · targets (M,) int64 · keep (M,) bool, True
    where a row counts, None for all · total by default the number of rows that count · rows of a chunk by default
    `rows_in_chunk`. Differentiable once, in hidden and weight; what needs no gradient costs none. A batch in which no
    row counts has loss 0. Raises InputError for a target outside the vocabulary, ValueError for shapes that do not fit,
    TypeError for formats that differ.
    """
    dtype = _format(hidden, weight, targets)
    kept = _places(targets, keep)
    chosen = targets.index_select(0, kept)
    if len(kept) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(weight):
        odd = int(chosen.max() if chosen.min() >= 0 else chosen.min())
        raise InputError(f"target {odd} is outside the head's vocabulary of {len(weight)}; check the tokenizer")
    count = max(len(kept), 1) if total is None else float(total)
    task = _Task(kept, chosen, count, dtype, rows or rows_in_chunk(len(weight), dtype))
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _Chunked.apply(hidden, weight, task)
        return loss
    return _in_chunks(hidden, weight, task, (False, False))[0]


def rows_in_chunk(vocabulary: int, dtype: torch.dtype) -> int:
    """How many rows of logits fill 64 MiB, but no fewer than 256: the memory of a chunk is rows · V numbers.

    A number takes 4 bytes in fp32, which its gradient overwrites, and 2 + 4 where products are in 16 bits.

    >>> rows_in_chunk(32_000, torch.float32), rows_in_chunk(128_256, torch.bfloat16)
    (524, 256)
    """
    wide = torch.promote_types(dtype, torch.float32)
    return max(_FEWEST_ROWS, _CHUNK_BYTES // (vocabulary * (wide.itemsize + (dtype.itemsize if dtype != wide else 0))))


class _Task(NamedTuple):
    """kept (n,) int64, the rows that count · targets (n,) of these · total · dtype of the products · rows a chunk."""

    kept: Tensor
    targets: Tensor
    total: float
    dtype: torch.dtype
    rows: int


def _format(hidden: Tensor, weight: Tensor, targets: Tensor) -> torch.dtype:
    """The format that the products are in, after the checks; autocast leaves fp64 alone."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (M, D) and (V, D)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets have shape {tuple(targets.shape)}; one for each of {len(hidden)} rows is wanted")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}; convert one, or compute within autocast")
    return hidden.dtype


def _places(targets: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return torch.arange(len(targets), device=targets.device)
    if keep.shape != targets.shape or keep.dtype != torch.bool:
        raise ValueError(f"keep is {keep.dtype} {tuple(keep.shape)}; it must be bool {tuple(targets.shape)}")
    return keep.nonzero().squeeze(1)


class _Chunked(torch.autograd.Function):
    """`_in_chunks` with its gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, task: _Task) -> Tensor:
        loss, for_hidden, for_weight = _in_chunks(hidden, weight, task, ctx.needs_input_grad[:2])
        ctx.save_for_backward(task.kept, for_hidden, for_weight)
        ctx.scale = 1 / (task.total * _scale(task.dtype))
        ctx.shape, ctx.dtypes = hidden.shape, (hidden.dtype, weight.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        kept, for_hidden, for_weight = ctx.saved_tensors
        if for_hidden is not None:
            part = (for_hidden.to(gradient.dtype) * (gradient * ctx.scale)).to(ctx.dtypes[0])
            for_hidden = part.new_zeros(ctx.shape).index_copy_(0, kept, part)
        if for_weight is not None and gradient != 1:  # spares a copy of (V, D) where the loss itself is differentiated
            for_weight = for_weight * gradient
        return for_hidden, None if for_weight is None else for_weight.to(ctx.dtypes[1]), None


def _scale(dtype: torch.dtype) -> float:
    return _FP16_SCALE if dtype == torch.float16 else 1.0


def _in_chunks(
    hidden: Tensor, weight: Tensor, task: _Task, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss; G W (n, D) scaled and not divided by N, in the products' format; G^T h / N (V, D) in at least fp32."""
    count, dtype = len(task.kept), task.dtype
    wide = torch.promote_types(dtype, torch.float32)
    pieces = max(-(-count // task.rows), 1)
    rows = max(-(-count // pieces), 1)  # all chunks about as long
    losses = hidden.new_empty(count, dtype=wide)
    for_hidden = hidden.new_empty(count, hidden.shape[1], dtype=dtype) if wanted[0] else None
    for_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    weight = weight.to(dtype)
    logits = hidden.new_empty(rows, len(weight), dtype=dtype)
    room = logits if dtype == wide else torch.empty_like(logits, dtype=wide)
    for first in range(0, count, rows):
        part = slice(first, min(first + rows, count))
        h = hidden.index_select(0, task.kept[part]).to(dtype)  # (m, D)
        z = product(h, weight.T, out=logits[: len(h)])  # (m, V)
        exponentials = room[: len(h)] if z.dtype == wide else room[: len(h)].copy_(z)
        losses[part], sums = _surprise(exponentials, task.targets[part])
        if any(wanted):
            slope = _slope(exponentials, sums, task.targets[part], out=z)
        if for_hidden is not None:
            product(slope, weight, out=for_hidden[part])
        if for_weight is not None:
            _add_product(for_weight, slope, exponentials, h, 1 / task.total)
    return losses.sum() / task.total, for_hidden, for_weight


def _surprise(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log(sum_v exp z_v) - z_target (m,) and sum_v exp(z_v - max) (m, 1); leaves exp(z_v - max) in z (m, V)."""
    z -= z.amax(dim=1, keepdim=True)
    of_target = z.gather(1, targets[:, None])
    sums = z.exp_().sum(dim=1, keepdim=True)
    return (sums.log() - of_target).squeeze(1), sums


def _slope(exponentials: Tensor, sums: Tensor, targets: Tensor, *, out: Tensor) -> Tensor:
    """G (m, V) in the format of `out`; where that is fp16, scaled, and as it is in the place of the exponentials.

    The one is taken off before the rounding: of p = 0.999 bf16 would leave 1 - 1 = 0.
    """
    exponentials.scatter_add_(1, targets[:, None], -sums)
    exponentials /= sums  # in their place: what torch rounds on the way out it first makes whole in fp32
    if out.dtype != torch.float16:
        return out.copy_(exponentials)
    out.copy_(exponentials.mul_(_FP16_SCALE))
    exponentials /= _FP16_SCALE  # a power of two: exact
    return out


def _add_product(total: Tensor, slope: Tensor, wide_slope: Tensor, h: Tensor, factor: float) -> None:
    """total (V, D) += factor * G^T h."""
    if h.dtype == torch.float16:
        total.addmm_(wide_slope.T, h.to(total.dtype), alpha=factor)
    elif h.dtype == total.dtype:
        product(slope.T, h * factor, out=total, add=True)
    else:
        total.add_(slope.T @ h, alpha=factor)
