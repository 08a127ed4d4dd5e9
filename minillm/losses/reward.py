"""The loss of a reward model: of two answers, the better one should have the higher reward.

    P(chosen is better) = sigmoid(r_c - r_r)                                   Bradley & Terry 1952
    loss = mean( -log sigmoid(r_c - r_r - m) )  +  c mean( (r_c + r_r)^2 )

InstructGPT (arXiv 2203.02155 eq. 1) has the first term with m = 0; Llama 2 (2307.09288 eq. 2) the margin m, larger the
clearer the preference was. The second (2312.09244 eq. 2; c = 0.01) fixes the constant that the first leaves open:
rewards shifted by any number have the same differences. Equal to trl 1.16's RewardTrainer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.losses.arguments import positive, wide_rows


def bradley_terry(chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, centring: float = 0.0) -> Tensor:
    """The loss above: rewards of the chosen and the rejected answers (B,), margin (B,) or none -> scalar, nats.

    centring is c; 0 leaves rewards where they are. Equal rewards have loss ln 2. Computed in at least fp32. Raises
    InputError for shapes that differ or a negative c, NumericsError for a reward that is not finite.

    >>> bradley_terry(torch.tensor([2.0]), torch.tensor([2.0])).exp().item()
    2.0
    """
    positive("centring", centring, zero=True)
    margins = {} if margin is None else {"margin": margin}
    better, worse, *rest = wide_rows(chosen=chosen, rejected=rejected, **margins)
    ahead = better - worse - rest[0] if rest else better - worse
    loss = -torch.nn.functional.logsigmoid(ahead).mean()
    return loss + centring * (better + worse).square().mean() if centring else loss


def preference_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Share of pairs whose chosen answer has the higher reward: (B,), (B,) -> scalar. A tie is wrong, as in trl.

    >>> preference_accuracy(torch.tensor([1.0, 0.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 1.0, 4.0])).item()
    0.5
    """
    better, worse = wide_rows(chosen=chosen, rejected=rejected)
    return (better > worse).to(better.dtype).mean()
