"""Losses as pure functions of tensors; they never see a model."""

from minillm.losses.next_token import count_targets, next_token_loss

__all__ = ["count_targets", "next_token_loss"]
