"""Direct preference optimisation: a pair's loss, from the log-probabilities that policy and reference give its answers.

    h = log policy(y | x) - log reference(y | x)                        sums over the answer's tokens, nats
    loss = mean over pairs of  -log sigmoid( beta (h_chosen - h_rejected) )            (arXiv 2305.18290 eq. 7)

beta h is the *implicit reward* of an answer. A policy equal to its reference has rewards 0 and loss ln 2, in the last
digit: anything else at step 0 means that the two took different paths (dropout, dtype, truncation).

    minillm.losses.dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1)
    minillm.losses.dpo(..., loss="hinge")
    minillm.losses.dpo(..., loss=DpoLoss("robust", label_smoothing=0.1))
    minillm.losses.dpo(..., loss="ipo", lengths=(chosen_tokens, rejected_tokens))

The losses stand in pair_losses.py, divergences in divergences.py, what weighs tokens and pairs in pair_weights.py. A
mixture, trl's `loss_type=[...]` with `loss_weights`, is a sum: `dpo(...) + 0.5 * dpo(..., loss="bco_pair")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.errors import InputError, nearest
from minillm.losses.arguments import positive, wide_rows
from minillm.losses.divergences import DIVERGENCES, divergence_score
from minillm.losses.pair_losses import DIVERGENT, PAIR_LOSSES, PER_TOKEN, SMOOTHED, Pair


@dataclass(frozen=True)
class DpoLoss:
    """Which loss of a pair, and its constants; checked when it is made.

    name: one of `DpoLoss.names()` · label_smoothing: share of labels that are expected to be wrong, in [0, 0.5) ·
    divergence: one of `divergences.DIVERGENCES`, with its alpha · tau: discopop's. Raises InputError for an unknown
    name, for constants out of range, and for one that the loss would ignore.

    >>> DpoLoss("hinge", label_smoothing=0.1)
    Traceback (most recent call last):
    minillm.errors.InputError: hinge has no label smoothing; sigmoid sigmoid_norm exo_pair robust aot aot_unpaired have
    """

    name: str = "sigmoid"
    label_smoothing: float = 0.0
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    tau: float = 0.05

    def __post_init__(self) -> None:
        for what, value, known in (("loss", self.name, PAIR_LOSSES), ("divergence", self.divergence, DIVERGENCES)):
            if value not in known:
                raise InputError(f"{what} {value!r} is unknown{nearest(value, known)}; there are {' '.join(known)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 0.5)")
        if self.label_smoothing and self.name not in SMOOTHED:
            raise InputError(f"{self.name} has no label smoothing; {' '.join(SMOOTHED)} have")
        if self.name == "exo_pair" and not self.label_smoothing:
            raise InputError("exo_pair takes the logarithm of label_smoothing, which is 0; the paper has 1e-3")
        if self.divergence != "reverse_kl" and self.name not in DIVERGENT:
            raise InputError(f"{self.name} has no other divergence than reverse_kl; {' '.join(DIVERGENT)} have")
        if not abs(self.alpha) < float("inf"):
            raise InputError(f"alpha is {self.alpha}; it must be a finite number")
        positive("tau", self.tau)

    @staticmethod
    def names() -> tuple[str, ...]:
        """Every loss."""
        return tuple(PAIR_LOSSES)


class Rewards(NamedTuple):
    """Implicit rewards beta h of B pairs: chosen, rejected (B,), without gradient."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margins(self) -> Tensor:
        """chosen - rejected (B,)."""
        return self.chosen - self.rejected

    @property
    def accuracy(self) -> Tensor:
        """Share of pairs whose chosen answer has the higher reward, scalar. A tie is wrong: 0 at the first step."""
        return (self.chosen > self.rejected).to(self.chosen.dtype).mean()


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    loss: str | DpoLoss = "sigmoid",
    lengths: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean of `dpo_losses` over the pairs: scalar, at least fp32.

    >>> x = torch.tensor([-40.0, -50.0])
    >>> dpo(x, x - 1, x, x - 1).exp().item()
    2.0
    """
    return dpo_losses(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta, loss=loss, lengths=lengths
    ).mean()


def dpo_losses(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    loss: str | DpoLoss = "sigmoid",
    lengths: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The loss of each pair (B,), for whoever weighs pairs or splits a batch: log-probabilities of whole answers (B,).

    beta: how strongly the policy is tied to the reference · loss: a name or a `DpoLoss` · lengths: tokens of the chosen
    and of the rejected answers, (B,) each; ipo, sigmoid_norm and sft need them, the others do not look. No gradient
    goes to the reference. Raises InputError for shapes that differ, beta 0 or negative, lengths missing or below 1, and
    NumericsError for a log-probability that is not finite.
    """
    positive("beta", beta)
    how = DpoLoss(loss) if isinstance(loss, str) else loss
    chosen, rejected, fixed_chosen, fixed_rejected = wide_rows(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen.detach(),
        reference_rejected=reference_rejected.detach(),
    )
    h_chosen, h_rejected = chosen - fixed_chosen, rejected - fixed_rejected
    chosen_length, rejected_length = _counts(how.name, lengths, like=chosen)
    pair = Pair(
        chosen=chosen,
        rejected=rejected,
        h_chosen=h_chosen,
        h_rejected=h_rejected,
        s_chosen=divergence_score(h_chosen, how.divergence, how.alpha),
        s_rejected=divergence_score(h_rejected, how.divergence, how.alpha),
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        beta=beta,
        smoothing=how.label_smoothing,
        tau=how.tau,
    )
    return PAIR_LOSSES[how.name](pair)


def implicit_rewards(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> Rewards:
    """beta (log policy - log reference) of each answer (B,), whatever the loss and its divergence: what trl logs too.

    >>> implicit_rewards(*torch.tensor([[-3.0], [-9.0], [-5.0], [-9.0]]), beta=0.5).margins.tolist()
    [1.0]
    """
    positive("beta", beta)
    chosen, rejected, fixed_chosen, fixed_rejected = wide_rows(
        policy_chosen=policy_chosen.detach(),
        policy_rejected=policy_rejected.detach(),
        reference_chosen=reference_chosen.detach(),
        reference_rejected=reference_rejected.detach(),
    )
    return Rewards(beta * (chosen - fixed_chosen), beta * (rejected - fixed_rejected))


def _counts(name: str, lengths: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor, Tensor]:
    if name not in PER_TOKEN:
        return torch.ones_like(like), torch.ones_like(like)
    if lengths is None:
        raise InputError(f"{name} is a loss per token; give lengths=(tokens of the chosen, tokens of the rejected)")
    for which, counts in zip(("chosen", "rejected"), lengths, strict=True):
        if counts.shape != like.shape or not bool((counts >= 1).all()):
            raise InputError(f"lengths of the {which} must be {tuple(like.shape)} numbers of at least 1; none is empty")
    return lengths[0].to(like.dtype), lengths[1].to(like.dtype)
