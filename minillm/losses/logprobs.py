"""How probable a model finds tokens, and how sure it is: log-probabilities and entropies, from logits.

    z = logits_(b,t-1) / temperature                                      (V,), at least fp32
    logp_(b,t) = z[token_(b,t)] - log(sum_v exp z_v)                      the token, given those before it
    H_(b,t) = -sum_v p_v log p_v,   p = softmax(z)                        the entropy of what it was drawn from

Everything is aligned to the *token*: entry t belongs to token t and comes of the logits at t - 1, so that one `keep`,
True on the tokens of the answer, serves tokens, log-probabilities, entropies, KL, rewards and values alike. Entry 0,
which nothing predicts, is 0. All is in nats.

Temperature. Where tokens were sampled at a temperature, all log-probabilities that are compared with each other are
taken at it, of the whole distribution, top-k and top-p left out (or KL turns negative: trl issues 235, 1857).

Memory. The log-softmax of all rows is as large as the logits, in fp32 twice as large as in bf16, and autograd would
keep it. Here rows are taken some at a time, only those that are kept, and computed again in the backward pass: beside
the logits and their gradient there is nothing of size V but a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.errors import InputError
from minillm.losses.arguments import positive

#: Numbers of a chunk of logits: 4 MiB in fp32, small enough for a core's cache to help, large against Python's part.
_CHUNK = 2**20

#: Rows (m, V), at least fp32 and at the temperature · which of the n kept rows these are -> one number for each (m,).
Measure = Callable[[Tensor, slice], Tensor]


def token_logprobs(logits: Tensor, tokens: Tensor, keep: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """log p(token_t | tokens before t): logits (B, T, V) · tokens (B, T) int64 -> (B, T) nats, at least fp32.

    keep (B, T) bool, True on the tokens that count, as in `next_token_loss`; the others get 0 and cost nothing.
    Differentiable once, in the logits. Raises InputError for a token outside the vocabulary and a temperature of 0.

    >>> token_logprobs(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]])).exp().tolist()
    [[1.0, 0.125, 0.125]]
    """
    places = predicted_places(logits, tokens, keep)
    targets = tokens.flatten()[places]
    found = row_logprobs(logits.flatten(0, 1), targets, places - 1, temperature=temperature)
    return at_places(found, places, tokens)


def token_entropy(logits: Tensor, keep: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """Entropy of the distribution that token t was drawn from: logits (B, T, V) -> (B, T) nats, at least fp32.

    keep as in `token_logprobs`. A token of probability 0 (logit -inf) adds 0. Differentiable once.

    >>> token_entropy(torch.tensor([[[0.0, 0.0, -1e30], [0.0, 0.0, 0.0]]])).exp().tolist()
    [[1.0, 2.0]]
    """
    places = predicted_places(logits, logits[..., 0], keep)
    found = by_rows(lambda z, _: _entropy(z), logits.flatten(0, 1), places - 1, temperature)
    return at_places(found, places, logits[..., 0])


def row_logprobs(logits: Tensor, targets: Tensor, rows: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits[rows_i])[targets_i], nothing shifted: logits (M, V) · targets, rows (n,) int64 -> (n,).

    rows: which of the M rows, each once; None for all. For logits that were made only where a token is predicted.
    """
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    if targets.shape != rows.shape:
        raise InputError(f"targets have shape {tuple(targets.shape)} for {len(rows)} rows of logits")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        odd = int(targets.max() if targets.min() >= 0 else targets.min())
        raise InputError(f"token {odd} is outside the logits' vocabulary of {logits.shape[-1]}; check the tokenizer")

    def measure(z: Tensor, part: slice) -> Tensor:
        return -F.cross_entropy(z, targets[part], reduction="none")

    return by_rows(measure, logits, rows, temperature)


def sequence_sums(values: Tensor, keep: Tensor) -> Tensor:
    """Sum of each row over kept tokens: (B, T), keep (B, T) bool -> (B,). Of log-probabilities: log p(answer | prompt).

    >>> sequence_sums(torch.tensor([[0.0, -1.0, -2.0]]), torch.tensor([[False, True, True]])).tolist()
    [-3.0]
    """
    return _kept(values, keep).sum(dim=-1)


def sequence_means(values: Tensor, keep: Tensor) -> Tensor:
    """`sequence_sums` / number of kept tokens: (B,). A row without any has 0."""
    return sequence_sums(values, keep) / keep.sum(dim=-1).clamp(min=1)


def kept_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean over all kept tokens of the batch, each with the same weight: scalar. Without any it is 0.

    >>> kept_mean(torch.tensor([[1.0, 5.0], [3.0, 9.0]]), torch.tensor([[True, False], [True, False]])).item()
    2.0
    """
    return _kept(values, keep).sum() / keep.sum().clamp(min=1)


def _kept(values: Tensor, keep: Tensor) -> Tensor:
    """0 elsewhere: not multiplied by 0, which would leave a NaN or -inf of the padding what it is."""
    if keep.dtype != torch.bool or keep.shape != values.shape:
        raise InputError(f"keep is {keep.dtype} {tuple(keep.shape)}; it must be bool {tuple(values.shape)}")
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.masked_fill(~keep, 0)


def predicted_places(logits: Tensor, tokens: Tensor, keep: Tensor | None) -> Tensor:
    """Places b T + t of the tokens to be measured, (n,) int64; the first of a row is never one."""
    if logits.ndim != 3 or tokens.shape != logits.shape[:2]:
        raise InputError(f"logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)} must be (B, T, V) and (B, T)")
    if keep is None:
        keep = torch.ones(tokens.shape, dtype=torch.bool, device=logits.device)
    elif keep.shape != tokens.shape or keep.dtype != torch.bool:
        raise InputError(f"keep is {keep.dtype} {tuple(keep.shape)}; it must be bool {tuple(tokens.shape)}")
    return F.pad(keep[:, 1:], (1, 0)).flatten().nonzero().squeeze(1)


def at_places(found: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """Numbers (n,) at their places of a (B, T), 0 elsewhere."""
    return found.new_zeros(like.numel()).index_copy(0, places, found).view(like.shape)


def by_rows(measure: Measure, logits: Tensor, rows: Tensor, temperature: float = 1.0) -> Tensor:
    """measure(logits[rows] / temperature) -> (n,), a chunk of rows at a time; its gradient likewise.

    logits (M, V) · rows (n,) int64, each once. The measure sees at least fp32, and is called again in the backward.
    """
    found: Tensor = _ByRows.apply(logits, rows, measure, positive("temperature", temperature))
    return found


def _entropy(logits: Tensor) -> Tensor:
    """(m, V) -> (m,). Where p is 0 its logarithm may be -inf: p log p is 0 there, and so is its gradient."""
    logp = logits.log_softmax(dim=-1)
    p = logp.exp()
    return -(p * logp.masked_fill(p == 0, 0)).sum(dim=-1)


class _ByRows(torch.autograd.Function):
    """`by_rows`. Indexing within autograd would add up gradients as large as the logits, one for each chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, measure: Measure, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, rows)
        ctx.measure, ctx.temperature = measure, temperature
        wide = torch.promote_types(logits.dtype, torch.float32)
        found = logits.new_empty(len(rows), dtype=wide)
        for part in _parts(len(rows), logits.shape[-1]):
            found[part] = measure(logits.index_select(0, rows[part]).to(wide) / temperature, part)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, rows = ctx.saved_tensors
        total = torch.zeros_like(logits)
        for part in _parts(len(rows), logits.shape[-1]):
            with torch.enable_grad():
                chunk = logits.index_select(0, rows[part]).detach().requires_grad_()
                found = ctx.measure(chunk.to(gradient.dtype) / ctx.temperature, part)
            total.index_copy_(0, rows[part], torch.autograd.grad(found, chunk, gradient[part])[0])
        return total, None, None, None


def _parts(count: int, vocabulary: int) -> list[slice]:
    size = max(1, _CHUNK // vocabulary)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
