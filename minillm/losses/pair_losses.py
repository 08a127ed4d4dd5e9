"""The losses of a preference pair, one small function each: what `minillm.losses.dpo` chooses from by name.

    h_c, h_r   log policy - log reference of the chosen and the rejected answer, summed over its tokens
    s_c, s_r   their scores: h itself, or f'(exp h) of another divergence (divergences.py)
    delta      s_c - s_r;   with beta the strength of the tie to the reference, e the label smoothing, S the sigmoid

Each takes a `Pair` and returns (B,); the loss is the mean. All equal trl 1.16's DPOTrainer but for what is said here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pair(NamedTuple):
    """What a loss may depend on, of B pairs; tensors are (B,), of one format, at least fp32.

    chosen, rejected: log policy, in nats · h_chosen, h_rejected: minus log reference · s_chosen, s_rejected: scores ·
    chosen_length, rejected_length: tokens (ones where the loss does not ask) · beta · smoothing · tau: discopop's.
    """

    chosen: Tensor
    rejected: Tensor
    h_chosen: Tensor
    h_rejected: Tensor
    s_chosen: Tensor
    s_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    beta: float
    smoothing: float
    tau: float

    @property
    def ahead(self) -> Tensor:
        """beta delta (B,): by how much the implicit reward of the chosen answer is higher."""
        return self.beta * (self.s_chosen - self.s_rejected)

    @property
    def delta_per_token(self) -> Tensor:
        """s_c / |y_c| - s_r / |y_r| (B,)."""
        return self.s_chosen / self.chosen_length - self.s_rejected / self.rejected_length


def _smoothed(ahead: Tensor, smoothing: float) -> Tensor:
    """-(1 - e) log S(x) - e log S(-x): the cross-entropy where a share e of the labels is expected to be wrong."""
    return -(1 - smoothing) * F.logsigmoid(ahead) - smoothing * F.logsigmoid(-ahead)


def sigmoid(pair: Pair) -> Tensor:
    """DPO (arXiv 2305.18290 eq. 7): -log S(beta delta). With smoothing, conservative DPO (E. Mitchell, "A note on DPO
    with noisy preferences", 2023): -(1 - e) log S(beta delta) - e log S(-beta delta), which trl dropped in version 1.
    """
    return _smoothed(pair.ahead, pair.smoothing)


def sigmoid_norm(pair: Pair) -> Tensor:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124 §5): -log S(beta (s_c / |y_c| - s_r / |y_r|)).

    A token's reward is a hundredth of an answer's: beta is about 5 there, not 0.1.
    """
    return _smoothed(pair.beta * pair.delta_per_token, pair.smoothing)


def hinge(pair: Pair) -> Tensor:
    """SLiC (arXiv 2305.10425), as RSO has it (2309.06657): max(0, 1 - beta delta)."""
    return torch.relu(1 - pair.ahead)


def ipo(pair: Pair) -> Tensor:
    """IPO (arXiv 2310.12036 eq. 17): (s_c / |y_c| - s_r / |y_r| - 1 / (2 beta))^2, beta being the paper's tau.

    Per token, as trl does and says that the paper's authors did; the equation itself has sums: give lengths of 1.
    """
    return (pair.delta_per_token - 1 / (2 * pair.beta)).square()


def exo_pair(pair: Pair) -> Tensor:
    """EXO (arXiv 2402.00856 eq. 16): KL( (S(x), S(-x)) || (1 - e, e) ), x = beta delta; the paper's e is 1e-3.

    S(x) (log S(x) - log(1 - e)) + S(-x) (log S(-x) - log e)
    """
    x, e = pair.ahead, pair.smoothing
    better = x.sigmoid() * (F.logsigmoid(x) - math.log1p(-e))
    return better + (-x).sigmoid() * (F.logsigmoid(-x) - math.log(e))


def nca_pair(pair: Pair) -> Tensor:
    """NCA of two answers (arXiv 2402.05369): -log S(beta h_c) - log S(-beta h_c) / 2 - log S(-beta h_r) / 2.

    It holds the chosen answer's own probability up, where DPO looks at the difference alone.
    """
    chosen, rejected = pair.beta * pair.h_chosen, pair.beta * pair.h_rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(pair: Pair) -> Tensor:
    """Robust DPO (arXiv 2403.00409): [-(1 - e) log S(x) + e log S(-x)] / (1 - 2 e), x = beta delta.

    Unbiased where a share e of the labels is flipped: its mean over flips is DPO's loss with the true labels.
    """
    x, e = pair.ahead, pair.smoothing
    return (e * F.logsigmoid(-x) - (1 - e) * F.logsigmoid(x)) / (1 - 2 * e)


def bco_pair(pair: Pair) -> Tensor:
    """BCO (arXiv 2404.04656) without its reward shift, as trl since 1.0: -log S(beta h_c) - log S(-beta h_r).

    For the paper's shift d, a running mean of rewards, add d / beta to both reference log-probabilities.
    """
    return -F.logsigmoid(pair.beta * pair.h_chosen) - F.logsigmoid(-pair.beta * pair.h_rejected)


def sppo_hard(pair: Pair) -> Tensor:
    """SPPO with P = 1 for the winner, 0 for the loser (arXiv 2405.00675 eq. 4.7), the paper's eta being 1 / beta:
    (h_c - 1 / (2 beta))^2 + (h_r + 1 / (2 beta))^2.
    """
    target = 1 / (2 * pair.beta)
    return (pair.h_chosen - target).square() + (pair.h_rejected + target).square()


def aot(pair: Pair) -> Tensor:
    """AOT, paired (arXiv 2406.05882): the k-th largest margin of the policy is to exceed the reference's k-th.

        x = beta (sort(log policy_c - log policy_r) - sort(log ref_c - log ref_r)),   -(1 - e) log S(x) - e log S(-x)

    Sorted over the batch: which pair a number belongs to is lost, and each process sorts its own part.
    """
    ours = pair.chosen - pair.rejected
    reference = (pair.chosen - pair.h_chosen) - (pair.rejected - pair.h_rejected)
    return _smoothed(pair.beta * (ours.sort().values - reference.sort().values), pair.smoothing)


def aot_unpaired(pair: Pair) -> Tensor:
    """AOT, unpaired (arXiv 2406.05882): as `aot` with x = beta (sort(h_c) - sort(h_r)); trl 0.12's aot_pair."""
    return _smoothed(pair.beta * (pair.h_chosen.sort().values - pair.h_rejected.sort().values), pair.smoothing)


def apo_zero(pair: Pair) -> Tensor:
    """APO-zero (arXiv 2408.06266 eq. 7): 1 - S(beta h_c) + S(beta h_r), for answers better than the model's own."""
    return 1 - (pair.beta * pair.h_chosen).sigmoid() + (pair.beta * pair.h_rejected).sigmoid()


def apo_down(pair: Pair) -> Tensor:
    """APO-down (arXiv 2408.06266 eq. 8): S(beta h_c) + 1 - S(beta (h_c - h_r)), for answers worse than its own."""
    apart = pair.beta * (pair.h_chosen - pair.h_rejected)
    return (pair.beta * pair.h_chosen).sigmoid() + 1 - apart.sigmoid()


def discopop(pair: Pair) -> Tensor:
    """DiscoPOP (arXiv 2406.08414 eq. 5), x = beta delta, m = S(x / tau), tau 0.05: -(1 - m) log S(x) + m exp(-x).

    Where we differ: m exp(-x) is taken as exp(log m - x). trl's product is 0 · inf = NaN below x = -89 in fp32.
    """
    x, mix = pair.ahead, pair.ahead / pair.tau
    return -(-mix).sigmoid() * F.logsigmoid(x) + (F.logsigmoid(mix) - x).exp()


def sft(pair: Pair) -> Tensor:
    """Cross-entropy of the chosen answers, a mean over the batch's tokens: -log policy_c · B / sum |y_c|."""
    return -pair.chosen * (len(pair.chosen) / pair.chosen_length.sum())


PAIR_LOSSES: dict[str, Callable[[Pair], Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, sigmoid_norm, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard),
        *(aot, aot_unpaired, apo_zero, apo_down, discopop, sft),
    )
}
SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired")
#: Those that see h only through s_c - s_r: in the others the constant that a divergence leaves open does not cancel.
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
PER_TOKEN = ("sigmoid_norm", "ipo", "sft")
