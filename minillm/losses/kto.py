"""KTO: learning from single answers, each marked as desirable or not, instead of pairs (arXiv 2402.01306 eq. 7).

h  = log policy(y | x) - log reference(y | x)
z0 = max(0, mean of h over answers y' that belong to *other* prompts)            about KL(policy || reference)
loss = mean of   w_d (1 - sigmoid(beta (h - z0)))   where y is desirable
                 w_u (1 - sigmoid(beta (z0 - h)))   where it is not
"""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.errors import InputError
from minillm.losses.arguments import positive, wide_rows

KTO_LOSSES = ("kto", "apo_zero_unpaired")


def kto(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
    loss: str = "kto",
) -> Tensor:
    """The loss above: log-probabilities of B answers (B,), desirable (B,) bool -> scalar, at least fp32.

    kl: z0 of `kto_reference_point`, no gradient · weights: (w_d, w_u); the paper has w_d n_d / (w_u n_u) in [1, 4/3] ·
    loss "apo_zero_unpaired" is APO-zero (2408.06266 eq. 7) for single answers: the same with z0 = 0, whatever kl.
    Equal to trl 1.16's KTOTrainer. All answers of one kind are allowed. Raises InputError for shapes that differ, beta
    or weights below 0, NumericsError for a log-probability that is not finite.

    >>> kto(torch.tensor([-5.0, -5.0]), torch.tensor([-5.0, -5.0]), torch.tensor([True, False])).item()
    0.5
    """
    positive("beta", beta)
    if loss not in KTO_LOSSES:
        raise InputError(f"loss {loss!r} is unknown; KTO's are {' and '.join(KTO_LOSSES)}")
    ours, theirs = wide_rows(policy=policy, reference=reference.detach())
    if desirable.shape != ours.shape or desirable.dtype != torch.bool:
        raise InputError(
            f"desirable is {desirable.dtype} {tuple(desirable.shape)}; it must be bool {tuple(ours.shape)}"
        )
    wanted, unwanted = (positive(f"weights[{i}]", weights[i], zero=True) for i in (0, 1))
    z0 = torch.as_tensor(0.0 if loss == "apo_zero_unpaired" else kl, dtype=ours.dtype, device=ours.device).detach()
    ahead = beta * (ours - theirs - z0)
    return torch.where(desirable, wanted * (-ahead).sigmoid(), unwanted * ahead.sigmoid()).mean()


def kto_reference_point(policy: Tensor, reference: Tensor) -> Tensor:
    """z0: log-probabilities of answers to *other* prompts of the batch (n,) -> scalar of at least 0, no gradient.

    Answer i + 1 after prompt i, say: the policy's mean log-ratio on what it was not asked for. Across processes take
    the mean before the maximum.

    >>> kto_reference_point(torch.tensor([-4.0, -7.0]), torch.tensor([-5.0, -7.0])).item()
    0.5
    """
    ours, theirs = wide_rows(policy=policy.detach(), reference=reference.detach())
    return (ours - theirs).mean().clamp(min=0)
