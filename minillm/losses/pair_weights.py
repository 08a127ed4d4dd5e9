"""What weighs the tokens and the pairs of DPO: LD-DPO takes the edge off length, WPO prefers what the policy would say.

LD-DPO   log p^(y) = sum over t <= l of logp_t  +  alpha  sum over t > l of logp_t,     l = min(|y_c|, |y_r|)
WPO      w(y) = exp( 1/|y|  sum over t of [ logp_t - log sum_v p_tv^2 ] ),              a pair's weight w(y_c) w(y_r)
"""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.errors import InputError
from minillm.losses.logprobs import at_places, by_rows, predicted_places, sequence_means, sequence_sums, token_logprobs


def desensitised_sums(logprobs: Tensor, keep: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """LD-DPO's log-probability of each answer (arXiv 2409.06411): logprobs, keep (B, T) -> (B,).

    shared (B,) int64: the number of tokens of the shorter answer of the pair; kept tokens after that many count alpha,
    in [0, 1]. 1 gives `sequence_sums`, 0 leaves the surplus out. For policy *and* reference, with the same alpha
    (precomputed log-probabilities without it were trl's fault, PR 7084).

    >>> keep = torch.tensor([[False, True, True, True]])
    >>> desensitised_sums(torch.tensor([[0.0, -1.0, -2.0, -4.0]]), keep, torch.tensor([2]), alpha=0.5).tolist()
    [-5.0]
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}; it must be in [0, 1]")
    if shared.shape != keep.shape[:1]:
        raise InputError(f"shared has shape {tuple(shared.shape)}; it must hold a length for each of {len(keep)} rows")
    beyond = keep.cumsum(dim=-1) > shared[:, None]  # counts kept tokens: the k-th has k, wherever the answer starts
    return sequence_sums(logprobs, keep & ~beyond) + alpha * sequence_sums(logprobs, keep & beyond)


@torch.no_grad()
def wpo_weights(logits: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
    """WPO's weight of each answer (arXiv 2406.11827 eq. 2, aligned): (B,), without gradient.

    logits (B, T, V) · tokens, keep (B, T). sum_v p_v^2 is the probability that a token drawn from the policy gets: so
    an answer as probable as those that the policy draws has weight 1. Multiply `dpo_losses` by both answers' weights;
    not aot, which loses track of the pairs.

    >>> wpo_weights(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]])).tolist()
    [1.0]
    """
    places = predicted_places(logits, tokens, keep)
    drawn = by_rows(lambda z, _: (2 * z.log_softmax(dim=-1)).logsumexp(dim=-1), logits.flatten(0, 1), places - 1)
    return sequence_means(token_logprobs(logits, tokens, keep) - at_places(drawn, places, tokens), keep).exp()
