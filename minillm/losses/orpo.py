"""ORPO: fine-tuning and preference in one loss, without a reference model (arXiv 2403.07691 eq. 4-7).

    P(y | x) = exp( 1/|y| sum over t of logp_t )                                  the geometric mean of its tokens' p
    odds(y | x) = P / (1 - P)
    loss = nll(y_c)  -  beta  mean of  log sigmoid( log odds(y_c | x) - log odds(y_r | x) )

beta is the paper's lambda, 0.1 there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.errors import InputError
from minillm.losses.arguments import positive, wide_rows

#: The largest fp32 below 1 has this logarithm, about.
_ALMOST_CERTAIN = math.log1p(-(2**-24))


def orpo(chosen: Tensor, rejected: Tensor, nll: Tensor, beta: float = 0.1) -> Tensor:
    """The loss above: *mean* log-probabilities of each answer's tokens (B,), (B,) · nll scalar -> scalar.

    chosen, rejected: `sequence_means` over the answer · nll: `next_token_loss` of the chosen rows; trl 1.16 and the
    paper's own code count prompt tokens there, the paper's equation the answer only: the caller's `keep` decides.
    beta 0 leaves nll. Equal to trl's ORPOTrainer. Raises InputError for a log-probability above 0, NumericsError for
    one that is not finite.

    >>> p = torch.tensor([-0.5])
    >>> round(orpo(p, p, torch.tensor(0.25), beta=1.0).item() - 0.25, 6) == round(math.log(2), 6)
    True
    """
    return nll - positive("beta", beta, zero=True) * F.logsigmoid(log_odds(chosen) - log_odds(rejected)).mean()


def log_odds(logprob: Tensor) -> Tensor:
    """log P - log(1 - P) of log P (B,) -> (B,), at least fp32.

    Where we differ: P is bounded by 1 - 2^-24, and its gradient there 0. trl has odds of infinity, and NaN for two of
    them, once an answer is known by heart and P rounds to 1.

    >>> log_odds(torch.tensor([math.log(0.5)])).abs().item() < 1e-6
    True
    """
    (wide,) = wide_rows(logprob=logprob)
    if bool((wide > 0).any()):
        raise InputError(f"log-probability {wide.max().item():.3g} is above 0; give the mean over an answer's tokens")
    below = wide.clamp(max=_ALMOST_CERTAIN)
    return below - _log1mexp(below)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0 (M. Maechler 2012): each branch where it cancels nothing, and finite in the other."""
    small = x < -math.log(2)
    near, far = x.clamp(min=-math.log(2)), x.clamp(max=-math.log(2))
    return torch.where(small, torch.log1p(-far.exp()), torch.log(-torch.expm1(near)))
