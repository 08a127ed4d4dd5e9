"""Linears of one x with their adapters, as a single step of autograd: q, k and v; gate and up; or one alone.

    y_i = W_i x + b_i + s_i B_i (A_i x)             u_i = s_i B_i^T g_i,   g_i = dL/dy_i
    dL/dA_i = u_i x^T        dL/dB_i = s_i g_i (A_i x)^T        dL/dx = sum_i W_i^T g_i + A_i^T u_i

The formulas are those of `LoraLinear`, whose code is the definition. Here the A of all linears are one matrix, so that
x is read once for all adapters, forward and backward; a quantised kind rounds x once for all; products are added in the
place of what they belong to. Kept until the backward pass: x, and R numbers a row and linear (autograd would keep x
again in the adapters' fp32). Adapters multiply in the format of x, as everything does under autocast: beside a 16-bit
base A, B and their gradients are rounded to 16 bits for the products, while they are kept, and updated, in fp32.

What is out of the common (DoRA, PiSSA, OLoRA, a bias of B, dropout, adapters by row, trained bases, hooks, autocast,
torch.compile, torch.func, fp16 on the CPU) goes through the modules one by one: `serves` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minillm.model.linear import is_watched
from minillm.ops import native
from minillm.ops.lean import swiglu_gradients
from minillm.ops.matmul import product


class Factors(NamedTuple):
    """One adapter of a linear: A (R, K), B (N, R), s."""

    a: Tensor
    b: Tensor
    scale: float


def serves(layers: Sequence[Any], x: Tensor) -> bool:
    """Whether `linears` computes these `LoraLinear`s of x (..., K)."""
    if native.is_transformed() or _is_autocast(x.device.type) or not x.is_floating_point():
        return False
    if x.dtype == torch.float16 and x.is_cpu:  # torch's fp16 products are slow there: the modules' in fp32 take 3/5
        return False
    choice = layers[0].choice
    if not choice.enabled or choice.rows is not None:
        return False
    return all(layer.choice is choice and _is_common(layer) for layer in layers)


def _is_common(layer: Any) -> bool:
    base = layer.base
    if is_watched(base) or not (isinstance(base, nn.Linear) or hasattr(base, "transposed")):
        return False
    if any(parameter.requires_grad for parameter in base.parameters()):
        return False
    return all(_is_plain(layer.adapters[name]) for name in layer.choice.active if name in layer.adapters)


def _is_plain(adapter: Any) -> bool:
    drops = adapter.training and adapter.dropout.p > 0
    special = (adapter.magnitude, adapter.bias, adapter.start_a)
    return all(part is None for part in special) and not drops and not is_watched(adapter)


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def linears(layers: Sequence[Any], x: Tensor, up: Tensor | None = None) -> list[Tensor]:
    """x (..., K) -> y_i (..., N_i) of each `LoraLinear`; differentiable once, in x and the adapters.

    up (..., K): the layers' x is silu(x) up (SwiGLU), which is computed again in the backward pass instead of kept.
    """
    factors = [_factors(layer) for layer in layers]
    counts = [len(each) for each in factors]
    scales = [each.scale for layer in factors for each in layer]
    tensors = [tensor for layer in factors for each in layer for tensor in (each.a, each.b)]
    plan = _Plan([layer.base for layer in layers], counts, scales)
    return list(_Together.apply(x, up, plan, *tensors))


def _factors(layer: Any) -> list[Factors]:
    """Of the active adapters."""
    found = []
    for name in layer.choice.active:
        if name in layer.adapters:
            adapter = layer.adapters[name]
            found.append(Factors(adapter.a, adapter.b, adapter.scale))
    return found


class _Plan(NamedTuple):
    """The linears without their adapters, how many factors each has, and s of each of these."""

    bases: list[Any]
    counts: list[int]
    scales: list[float]

    def by_base(self, factors: Sequence[Any]) -> list[Sequence[Any]]:
        """What belongs to each factor, in a list for each base."""
        found, begin = [], 0
        for count in self.counts:
            found.append(factors[begin : begin + count])
            begin += count
        return found


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor | None, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows = _rows_of(x, up)  # (M, K)
        outputs = _bases(plan.bases, rows.view(x.shape))
        factors = list(zip(tensors[::2], tensors[1::2], plan.scales, strict=True))
        middle = rows @ _stacked(tensors[::2], rows).T if factors else rows[:, :0]  # (M, sum of R)
        parts = plan.by_base(list(zip(factors, _columns(middle, tensors[::2]), strict=True)))
        for y, part in zip(outputs, parts, strict=True):
            for (_, b, scale), inner in part:
                y.view(-1, y.shape[-1]).addmm_(inner, b.T.to(y.dtype), alpha=scale)
        # the weights of now: functional_call, for one, has others in their place when the gradients are taken
        weights = [base.weight if isinstance(base, nn.Linear) else None for base in plan.bases]
        ctx.plan, ctx.transposed = plan, [None if isinstance(b, nn.Linear) else b.transposed() for b in plan.bases]
        ctx.save_for_backward(x, up, middle, *weights, *tensors)
        return tuple(y.detach() for y in outputs)  # no view of an inner one: that may not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        device = gradients[0].device.type
        with torch.autocast(device, enabled=False) if _is_autocast(device) else nullcontext():  # as it was forward
            return _backward(ctx, gradients)


def _backward(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    x, up, middle, *saved = ctx.saved_tensors
    plan: _Plan = ctx.plan
    weights, tensors = saved[: len(plan.bases)], saved[len(plan.bases) :]
    flat = [g.reshape(-1, g.shape[-1]) for g in gradients]  # (M, N) each
    of_factor = [g for g, count in zip(flat, plan.counts, strict=True) for _ in range(count)]
    found: list[Tensor | None] = [None] * len(tensors)
    outer = []  # u, (M, R) each
    for n, (g, inner) in enumerate(zip(of_factor, _columns(middle, tensors[::2]), strict=True)):
        b, scale = tensors[2 * n + 1], plan.scales[n]
        outer.append(g @ (b * scale).to(g.dtype))
        if ctx.needs_input_grad[3 + 2 * n + 1]:
            found[2 * n + 1] = (inner.T @ g).T.to(b.dtype).mul_(scale)
    together = torch.cat(outer, dim=1) if outer else middle
    if any(ctx.needs_input_grad[3::2]):
        found[::2] = _rows(together.T @ _rows_of(x, up), tensors[::2])
    for_x = for_up = None
    if any(ctx.needs_input_grad[:2]):
        for_x = _input_gradient(weights, ctx.transposed, flat)
        if outer:
            for_x.addmm_(together, _stacked(tensors[::2], together))
        for_x = for_x.view(x.shape)
        if up is not None:
            for_x, for_up = swiglu_gradients(for_x, x, up, wants_up=ctx.needs_input_grad[1])
    return for_x, for_up, None, *found


def _rows_of(x: Tensor, up: Tensor | None) -> Tensor:
    """What the layers multiply: (M, K)."""
    x = x if up is None else F.silu(x).mul_(up)
    return x.reshape(-1, x.shape[-1])


def _bases(bases: Sequence[Any], x: Tensor) -> list[Tensor]:
    """W_i x + b_i; x is rounded once by a kind that can."""
    together = getattr(type(bases[0]), "together", None)
    if together is not None and all(type(base) is type(bases[0]) for base in bases):
        return list(together(bases, x))
    return [base(x) for base in bases]


def _input_gradient(weights: Sequence[Tensor | None], transposed: Sequence[Any], gradients: Sequence[Tensor]) -> Tensor:
    """sum_i g_i W_i (M, K): W_i itself, or g -> g W_i of a quantised kind."""
    total: Tensor | None = None
    for weight, times, g in zip(weights, transposed, gradients, strict=True):
        if weight is None:
            part = times(g)
            total = part if total is None else total.add_(part)
        else:
            total = product(g, weight, out=total, add=total is not None)
    assert total is not None
    return total


def _stacked(a: Sequence[Tensor], like: Tensor) -> Tensor:
    """All A as one matrix (sum of R, K), in the format of `like`."""
    return (a[0] if len(a) == 1 else torch.cat(list(a))).to(like.dtype)


def _columns(middle: Tensor, a: Sequence[Tensor]) -> Sequence[Tensor]:
    """(M, sum of R) -> (M, R) of each factor."""
    return middle.split([len(each) for each in a], dim=1)


def _rows(stacked: Tensor, a: Sequence[Tensor]) -> list[Tensor | None]:
    """(sum of R, K) -> the gradient of each A."""
    return [part.to(own.dtype) for part, own in zip(stacked.split([len(x) for x in a]), a, strict=True)]
