"""Losses as pure functions of tensors; they never see a model."""

from minillm.losses.chunked import chunked_cross_entropy, chunked_next_token_loss
from minillm.losses.next_token import count_targets, next_token_loss

__all__ = ["chunked_cross_entropy", "chunked_next_token_loss", "count_targets", "next_token_loss"]
