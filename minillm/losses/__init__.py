"""Losses as pure functions of tensors; they never see a model."""

from minillm.losses.chunked import chunked_cross_entropy, chunked_next_token_loss
from minillm.losses.dpo import DpoLoss, Rewards, dpo, dpo_losses, implicit_rewards
from minillm.losses.kl import KL_ESTIMATORS, estimated_kl, full_kl
from minillm.losses.kto import kto, kto_reference_point
from minillm.losses.logprobs import (
    kept_mean,
    row_logprobs,
    sequence_means,
    sequence_sums,
    token_entropy,
    token_logprobs,
)
from minillm.losses.next_token import count_targets, next_token_loss
from minillm.losses.orpo import log_odds, orpo
from minillm.losses.pair_weights import desensitised_sums, wpo_weights
from minillm.losses.reward import bradley_terry, preference_accuracy

__all__ = [
    "KL_ESTIMATORS",
    "DpoLoss",
    "Rewards",
    "bradley_terry",
    "chunked_cross_entropy",
    "chunked_next_token_loss",
    "count_targets",
    "desensitised_sums",
    "dpo",
    "dpo_losses",
    "estimated_kl",
    "full_kl",
    "implicit_rewards",
    "kept_mean",
    "kto",
    "kto_reference_point",
    "log_odds",
    "next_token_loss",
    "orpo",
    "preference_accuracy",
    "row_logprobs",
    "sequence_means",
    "sequence_sums",
    "token_entropy",
    "token_logprobs",
    "wpo_weights",
]
