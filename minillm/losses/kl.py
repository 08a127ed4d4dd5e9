"""How far a policy has moved from its reference: Kullback-Leibler divergence, estimated from samples or in full.

    KL(policy || reference) = E_(x ~ policy) [ log policy(x) - log reference(x) ]                              nats

With log r = log reference(x) - log policy(x) at a token x that the *policy* drew (J. Schulman, "Approximating KL
divergence", joschu.net/blog/kl-approx.html):

    k1 = -log r               unbiased, may be negative           the penalty of InstructGPT's reward
    k2 = (log r)^2 / 2        biased, low variance                "mse" of trl 0.11.4
    k3 = (r - 1) - log r      unbiased, never negative            GRPO
    abs = |log r|             no estimate of KL: trl 0.11.4's way of keeping a penalty from turning into a reward

As a *penalty* within a reward these are constants. As a *loss* that is differentiated the estimators differ in more
than variance: the expected gradient of k1 is 0 (E[grad log policy] = 0), that of k2 is the gradient of KL, and that of
k3 is the gradient of KL(reference || policy).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.errors import InputError, nearest
from minillm.losses.logprobs import at_places, by_rows, predicted_places

#: log policy - log reference -> the estimate.
_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda ahead: ahead,
    "k2": lambda ahead: 0.5 * ahead.square(),
    "k3": lambda ahead: torch.expm1(-ahead) + ahead,
    "abs": lambda ahead: ahead.abs(),
}
KL_ESTIMATORS = tuple(_ESTIMATORS)


def estimated_kl(logprobs: Tensor, reference: Tensor, kind: str = "k3") -> Tensor:
    """KL at each token from log-probabilities of both models: two of any one shape, (B, T) -> the same, at least fp32.

    kind: one of `KL_ESTIMATORS`. Both at the temperature that the tokens were drawn at. r - 1 is taken by expm1: in
    fp32 the plain difference has no correct digit where the policies are within 1e-4 of each other.

    >>> estimated_kl(torch.tensor([-1.0]), torch.tensor([-3.0]), "k1").item()
    2.0
    """
    if kind not in _ESTIMATORS:
        known = f"{', '.join(KL_ESTIMATORS)}; the exact one is full_kl"
        raise InputError(f"KL estimator {kind!r} is unknown{nearest(kind, KL_ESTIMATORS)}; there are {known}")
    if logprobs.shape != reference.shape:
        raise InputError(f"logprobs have shape {tuple(logprobs.shape)} and reference {tuple(reference.shape)}")
    wide = torch.promote_types(torch.promote_types(logprobs.dtype, reference.dtype), torch.float32)
    return _ESTIMATORS[kind](logprobs.to(wide) - reference.to(wide))


def full_kl(logits: Tensor, reference: Tensor, keep: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) of the distribution that token t was drawn from, over the whole vocabulary.

        KL_(b,t) = sum_v p_v (log p_v - log q_v)        p, q = softmax of the logits at t - 1 / temperature

    logits, reference (B, T, V) · keep (B, T) bool as in `token_logprobs` -> (B, T) nats, at least fp32; 0 where not
    kept. A token of policy 0 adds 0. Differentiable once, in the policy's logits: the reference gets no gradient. Not
    the KL of whole answers: this sum over t, on sampled answers, is an estimate of that.

    >>> full_kl(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)).tolist()
    [[0.0, 0.0]]
    """
    if reference.shape != logits.shape:
        raise InputError(f"logits have shape {tuple(logits.shape)} and reference {tuple(reference.shape)}")
    places = predicted_places(logits, logits[..., 0], keep)
    rows, fixed = places - 1, reference.detach().flatten(0, 1)

    def measure(policy: Tensor, part: slice) -> Tensor:
        logq = (fixed.index_select(0, rows[part]).to(policy.dtype) / temperature).log_softmax(dim=-1)
        logp = policy.log_softmax(dim=-1)
        p = logp.exp()
        return (p * (logp - logq).masked_fill(p == 0, 0)).sum(dim=-1)  # -inf - -inf where both exclude a token

    return at_places(by_rows(measure, logits.flatten(0, 1), rows, temperature), places, logits[..., 0])
