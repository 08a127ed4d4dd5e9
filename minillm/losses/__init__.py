"""Losses as pure functions of tensors; they never see a model."""
