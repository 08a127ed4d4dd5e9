"""How well a model predicts text that it was not trained on.

    loss            mean of -log p(token | tokens before it), nats        perplexity = exp(loss)
    bits per byte   sum of -log2 p / bytes of the predicted text

Perplexity depends on the vocabulary: longer tokens are fewer, and each is harder. Bits per byte compares models with
different vocabularies, and both with a file compressor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minillm.data.corpus import Windows
from minillm.losses import count_targets
from minillm.training.loop import Precision, autocast
from minillm.training.token_loss import TokenLoss, whole_rows


class HeldOut(NamedTuple):
    """What `held_out` measures: loss in nats a token; tokens is how many were predicted."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def held_out(
    model: nn.Module,
    windows: Windows,
    bytes_per_token: Tensor,
    *,
    most: int | None = None,
    batch: int = 8,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> HeldOut:
    """Score the windows of a held-out stream, or `most` of them, evenly spread; bytes_per_token (V,) int64.

    Windows do not overlap, so the first tokens of each are predicted from little: the plain, slightly pessimistic way.
    """
    model.eval()
    count = len(windows) if most is None else min(most, len(windows))
    chosen = [index * len(windows) // count for index in range(count)]
    measured = TokenLoss(model)
    nats, tokens, size = 0.0, 0, 0
    for begin in range(0, count, batch):
        rows = torch.stack([windows.window(index) for index in chosen[begin : begin + batch]])  # (B, T)
        with autocast(device, precision):
            nats += measured(whole_rows(rows.to(device)), 1).item()
        tokens += int(count_targets(rows))
        size += int(bytes_per_token[rows[:, 1:]].sum())
    model.train()
    loss = nats / tokens
    return HeldOut(loss, math.exp(min(loss, 700.0)), nats / math.log(2) / max(size, 1), tokens)
