"""Causal attention over grouped key/value heads, for inference on the CPU: the native kernel (csrc/cpu/attention*).

    score_(h,i,j) = q_(h,i) · k_(g,j) / sqrt(E) + bias_(h,j)        g = h // (H/G)
    y_(h,i)       = sum_j softmax_j(score_(h,i,j)) v_(g,j)          over the j that query i sees

Query i of T is token S - T + i; it sees token j where j <= S - T + i and keep_j, and always itself. The definition in
torch is `attention_ref` in model/attention.py. Scores, softmax and sums are fp32; in bf16 the weights are rounded to
bf16 for their product with v, as in torch's own kernel.

There is no gradient and no way around the kernel: ask `serves` first. Keys and values are read where they lie (views of
a cache of larger capacity), once for all the query heads that share them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from minillm.ops import native

#: The longest head that the kernel takes.
LONGEST_HEAD = 256
#: The plainest variant that is faster than torch's kernel.
_FAST = "avx512vnni"


def serves(*tensors: Tensor) -> bool:
    """Whether `attend` is right and fast for these (q, or q, k, v): see above, and no gradient is wanted of any.

    Not within torch.compile: there torch's own attention is what the compiler knows. Nor within `native.aside`.
    """
    if native.is_transformed() or not is_chosen() or not native.serves(tensors[0]):
        return False
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return not wanted and tensors[0].shape[-1] <= LONGEST_HEAD


def is_chosen() -> bool:
    """Whether this machine runs a variant that is faster than torch's kernel, and nobody has it step aside."""
    return _is_fast() and not native.is_aside()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    statistics: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    """q (B, H, T, E) · k, v (B, G, S, E) -> y (B, H, T, E), whose memory is (B, T, H, E).

    keep (B, S) bool, True on real tokens; None means that all are. bias (B or 1, H, 1, S) in the dtype of q, added to
    scaled scores (`alibi_bias`). statistics (B, H, T, 2) fp32, without a bias, is filled with max_j q · k_j and
    sum_j e^(score_j - the largest). Of q, k and v only the last dimension must be contiguous. Raises TypeError and
    ValueError that name the argument.
    """
    batch, heads, queries, size = _shape("q", q)
    _, groups, keys, _ = _shape("k", k)
    _shape("v", v)
    if groups < 1 or heads % groups or keys < queries or not 1 <= size <= LONGEST_HEAD:
        raise ValueError(
            f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}; H must be a multiple of G, T at most S, "
            f"E from 1 to {LONGEST_HEAD}"
        )
    shape = (batch, groups, keys, size)
    strides = (queries * heads * size, size, heads * size, 1)  # what transposing (B, T, H, E) gives, in one call
    y = torch.empty_strided((batch, heads, queries, size), strides, dtype=q.dtype)
    arguments = (
        heads_of("q", q, q.dtype, (batch, heads, queries, size)),
        heads_of("k", k, q.dtype, shape),
        heads_of("v", v, q.dtype, shape),
        y.data_ptr(),
        native.format_of("q", q),
        (batch, heads, groups, queries, keys, size),
        0 if keep is None else native.address("keep", keep, torch.bool, (batch, keys)),
        *_bias(bias, q, keys),
        0
        if statistics is None
        else native.address("statistics", statistics, torch.float32, (batch, heads, queries, 2)),
        native.isa_number(isa),
        torch.get_num_threads(),
    )
    if batch and queries:
        _module().attention(*arguments)
    return y


def _shape(name: str, x: Tensor) -> torch.Size:
    """Of four numbers, of a tensor that wants no gradient."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (batch, heads, tokens, head size)")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{name} wants a gradient, which the kernel has not; use torch's attention")
    return x.shape


def heads_of(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """What `native.address` does for contiguous tensors: the address, and the strides of (batch, head, token)."""
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")
    batch, head, token, number = x.stride()
    if number != 1 and shape[3] > 1:
        raise ValueError(f"{name} has stride {number} in its last dimension; call .contiguous() on it")
    if x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}; it must be {dtype}")
    if not x.is_cpu:
        raise ValueError(f"{name} is on {x.device}; it must be on the CPU")
    return x.data_ptr(), batch, head, token


def _bias(bias: Tensor | None, q: Tensor, keys: int) -> tuple[int, int]:
    """Address of the bias and its numbers a row of the batch; 0 where there is none, or where rows share one."""
    if bias is None:
        return 0, 0
    rows = q.shape[0] if bias.shape[:1] == q.shape[:1] else 1
    address = native.address("bias", bias, q.dtype, (rows, q.shape[1], 1, keys))
    return address, 0 if rows == 1 else q.shape[1] * keys


@cache
def _is_fast() -> bool:
    return native.isas().get(_FAST, False)


def _module() -> Any:
    return native.cpu()
