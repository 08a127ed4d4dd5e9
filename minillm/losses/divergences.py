"""f-divergences of f-DPO (Wang et al., arXiv 2309.16240): what else than reverse KL holds a policy near its reference.

With u = policy(y) / reference(y) and h = log u, DPO's reward is beta f'(u) up to a constant that cancels in a
pair; reverse KL, f(u) = u log u, gives DPO itself.

    reverse_kl      f'(u) = log u                               s = h
    forward_kl      f'(u) = 1 - 1 / u                           s = 1 - exp(-h)
    js_divergence   f'(u) = log(2 u / (1 + u))                  s = log 2 + log sigmoid(h)
    alpha           f'(u) = (u^(a-1) - 1) / (a - 1)             s = (exp((a-1) h) - 1) / (a - 1)

All are 0 at h = 0, with slope 1 (js 1/2). alpha is trl's, 1 minus the paper's: 1 is reverse KL, 0 is forward KL.

Where we differ from trl 1.16: exp(-h) of forward_kl is bounded by exp(80) like that of alpha, for both in any format
that we compute in. Unbounded, an answer 89 nats less probable than under the reference gives inf in fp32, and two of
them NaN. Beyond the bound the gradient is 0. Also exp(x) - 1 is expm1(x), exact near 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: The largest exponent: exp(80) = 5.5e34 is below fp32's 3.4e38 by enough to be multiplied by a beta.
_LARGEST = 80.0


def _growth(exponent: Tensor) -> Tensor:
    """exp(x) - 1, bounded."""
    return torch.expm1(exponent.clamp(max=_LARGEST))


def _alpha(h: Tensor, alpha: float) -> Tensor:
    return h if alpha == 1 else _growth((alpha - 1) * h) / (alpha - 1)


_SCORES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda h, _: h,
    "forward_kl": lambda h, _: -_growth(-h),
    "js_divergence": lambda h, _: math.log(2) + F.logsigmoid(h),
    "alpha_divergence": _alpha,
}
DIVERGENCES = tuple(_SCORES)


def divergence_score(log_ratio: Tensor, divergence: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """s of the table: h = log policy - log reference, of any shape -> the same. alpha is for alpha_divergence alone.

    >>> divergence_score(torch.zeros(1), "js_divergence").item()
    0.0
    """
    return _SCORES[divergence](log_ratio, alpha)
