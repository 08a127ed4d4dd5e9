"""What attention does between its projections, watched from outside.

Rotation, scores and softmax are function calls, not modules, so module hooks do not see them. A `TorchFunctionMode`
sees every call of a torch function; of those made inside an attention module we need few:

    fused      scaled_dot_product_attention(q, k, v, mask, ..)        scores and softmax follow from its arguments
    by hand    q @ k^T  ->  softmax(scores)  ->  weights @ v          all of it in plain sight

Fused kernels keep scores to themselves: they are computed here from the very arguments, in float64, so that a wrong
scale, mask or head order still shows where it was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Masks fill with -inf, a dtype's least number, -1e9 or -1e4. To softmax all are the same: exp is 0 below -104.
HIDDEN = -5000.0

_MATMULS: tuple[object, ...] = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_SOFTMAXES: tuple[object, ...] = (F.softmax, torch.softmax, torch.Tensor.softmax)


class Fused(NamedTuple):
    """Arguments of one `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class Seen(NamedTuple):
    """q (B, H, T, E) and k (B, G, S, E) as they meet, after any rotation; scores and weights (B, H, T, S).

    source: the tensor that k was picked from; to_k makes its gradient that of k, the sum over the heads of a group.
    """

    q: Tensor
    k: Tensor
    scores: Tensor
    weights: Tensor
    source: Tensor
    to_k: Callable[[Tensor], Tensor]


class AttentionCalls(TorchFunctionMode):
    """Watches torch calls; `start` before an attention module runs, `finish` after it. Changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._fused: Fused | None = None
        self._products: list[tuple[Tensor, Tensor]] = []
        self._scores: Tensor | None = None
        self._watching = False

    def start(self) -> None:
        """Forget what was seen and watch."""
        self._fused, self._products, self._scores, self._watching = None, [], None, True

    @torch.no_grad()
    def finish(self, heads: int, groups: int) -> Seen | None:
        """What the module just did with H query and G key heads; None if it attended in some way not known here."""
        self._watching = False
        if self._fused is not None:
            return _from_fused(self._fused, heads, groups)
        if self._scores is not None and len(self._products) == 2:
            (q, k_transposed), (weights, _) = self._products
            scores = self._scores.masked_fill(self._scores <= HIDDEN, -math.inf)
            k, alike = k_transposed.mT, heads_of_groups(k_transposed.mT, groups)
            to_k = partial(_summed, alike=alike)
            return Seen(q, _first(k, alike), scores, weights, k_transposed, lambda gradient: to_k(gradient.mT))
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._watching:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self._fused is None:
            self._fused = Fused(*args, **kwargs)
        elif func in _SOFTMAXES and self._scores is None:
            self._scores = _operands(args, kwargs)[0].detach().clone()  # some code goes on to change it in place
        elif func in _MATMULS:
            x, y = _operands(args, kwargs)
            if x.ndim == y.ndim == 4:
                self._products.append((x, y))
        return func(*args, **kwargs)


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments in their order, the first two perhaps given by name."""
    return [*args, *(kwargs[name] for name in ("input", "other") if name in kwargs)]


def _from_fused(call: Fused, heads: int, groups: int) -> Seen:
    q, mask = call.query, call.attn_mask
    batch, first, second, size = q.shape
    if first != heads and first * second == heads:  # one token, its query heads in the place of tokens
        q = q.reshape(batch, heads, 1, size)
        if mask is not None and mask.shape[1] == first:
            mask = mask.expand(-1, -1, second, -1).reshape(-1, heads, 1, mask.shape[-1])
    keys = call.key.repeat_interleave(heads // call.key.shape[1], dim=1)
    scale = 1 / math.sqrt(size) if call.scale is None else call.scale
    scores = (q.double() @ keys.double().mT) * scale
    if call.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = (scores + mask.double()).masked_fill(mask <= HIDDEN, -math.inf)
    alike = heads_of_groups(call.key, groups)
    return Seen(q, _first(call.key, alike), scores, scores.softmax(dim=-1), call.key, partial(_summed, alike=alike))


def heads_of_groups(k: Tensor, groups: int) -> list[list[int]]:
    """Key heads (B, G or H, S, E), each perhaps repeated for the query heads that share it -> which are equal.

    Groups stand in the order of their first appearance, so that `repeat` and `repeat_interleave` give the same keys.

    >>> heads_of_groups(torch.tensor([1., 2., 1., 2.]).view(1, 4, 1, 1), 2)
    [[0, 2], [1, 3]]
    """
    heads = k.shape[1]
    alike: list[list[int]] = []
    for head in range(heads if heads != groups else 0):
        same = next((known for known in alike if torch.equal(k[:, head], k[:, known[0]])), None)
        if same is None:
            alike.append([head])
        else:
            same.append(head)
    each = heads // groups
    return alike if len(alike) == groups else [[*range(first, first + each)] for first in range(0, heads, each)]


def _first(k: Tensor, alike: list[list[int]]) -> Tensor:
    return k if k.shape[1] == len(alike) else k[:, [same[0] for same in alike]]


def _summed(gradient: Tensor, alike: list[list[int]]) -> Tensor:
    """The gradient of the heads (B, H, S, E) -> that of what was repeated (B, G, S, E), not rounded in between."""
    if gradient.shape[1] == len(alike):
        return gradient
    return torch.stack([gradient[:, same].double().sum(dim=1) for same in alike], dim=1)
