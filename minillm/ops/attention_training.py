"""Causal attention with its gradients, on the CPU: the native kernels (csrc/cpu/attention*, attention_backward*).

    p_(h,i,j) = e^((q_(h,i) · k_(g,j) - m_(h,i)) / sqrt(E)) / s_(h,i)       m the largest, s the sum, of the softmax
    ds        = p (dy_(h,i) · v_(g,j) - D_(h,i))               D_(h,i) = dy_(h,i) · y_(h,i)
    dq_(h,i)  = sum_j ds k_(g,j) / sqrt(E)                     g = h // (H/G), j <= i
    dk_(g,j)  = sum over h of the group, i  ds q_(h,i) / sqrt(E)           dv_(g,j) = sum over the same  p dy_(h,i)

All T tokens are new and none is padding: rows to train on are padded on the right, where no token looks. Kept until
the backward pass: q, k, v, y, m and s, and never a (T, T) matrix (arXiv 2205.14135). torch's own kernel keeps as much.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.ops import attention, native


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend` is right and fast for these: a gradient is wanted, all tokens are new."""
    if native.is_transformed() or not torch.is_grad_enabled() or not attention.is_chosen():
        return False
    length, size = q.shape[2:]
    if k.shape[2] != length or length == 1 or size > attention.LONGEST_HEAD:
        return False
    if not all(native.serves(x) and x.stride(-1) == 1 for x in (q, k, v)):
        return False
    return q.dtype == k.dtype == v.dtype and (q.requires_grad or k.requires_grad or v.requires_grad)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, T, E) · k, v (B, G, T, E), one float format -> y (B, H, T, E); differentiable once."""
    y: Tensor = _Attend.apply(q, k, v)
    return y


def gradients_ref(q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, with whole (T, T) matrices: dq (B, H, T, E), dk and dv (B, G, T, E) for dy (B, H, T, E)."""
    groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(repeats, dim=1) for x in (k, v))  # (B, H, T, E)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    p = (q @ keys.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -torch.inf).softmax(-1)  # (B, H, T, T)
    along = (dy * (p @ values)).sum(-1, keepdim=True)  # D
    ds = p * (dy @ values.mT - along) / math.sqrt(q.shape[-1])
    dk, dv = (x.unflatten(1, (groups, repeats)).sum(2) for x in (ds.mT @ q, p.mT @ dy))
    return ds @ keys, dk, dv


def gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], statistics: Tensor, dy: Tensor, *, isa: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`gradients_ref` from what the forward pass left: inputs q, k, v, y · statistics (B, H, T, 2) -> dq, dk, dv.

    The memory of dq is (B, T, H, E), of dk and dv (B, T, G, E). Only the last dimension of the inputs and of dy must be
    contiguous.
    """
    q, k = inputs[0], inputs[1]
    batch, heads, length, size = q.shape
    groups = k.shape[1]
    if groups < 1 or heads % groups:
        raise ValueError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}; H must be a multiple of G")
    shapes = {"q": heads, "k": groups, "v": groups, "y": heads, "dy": heads}
    found = [
        attention.heads_of(name, x, q.dtype, (batch, count, length, size))
        for (name, count), x in zip(shapes.items(), (*inputs, dy), strict=True)
    ]
    outputs = [q.new_empty(batch, length, count, size) for count in (heads, groups, groups)]
    if q.numel():
        _module().attention_backward(
            found,
            native.address("statistics", statistics, torch.float32, (batch, heads, length, 2)),
            tuple(each.data_ptr() for each in outputs),
            native.format_of("q", q),
            (batch, heads, groups, length, size),
            native.isa_number(isa),
            torch.get_num_threads(),
        )
    dq, dk, dv = (each.transpose(1, 2) for each in outputs)
    return dq, dk, dv


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        statistics = q.new_empty(*q.shape[:3], 2, dtype=torch.float32)
        y = attention.attend(q, k, v, statistics=statistics)
        ctx.save_for_backward(q, k, v, y, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, statistics = ctx.saved_tensors
        if dy.stride(-1) != 1:
            dy = dy.contiguous()
        q, k, v, y = inputs
        return gradients((q, k, v, y), statistics, dy)


def _module() -> Any:
    return native.cpu()
