"""A model and the loss of its tokens as one module: tokens in, a number out, and never all logits between.

    loss = sum over taught tokens of  -log p(token | those before it)  / total

One module, since whoever spreads a model over processes (DDP, FSDP) sees only what goes through a `forward`. The head
multiplies a chunk of rows at a time (`minillm.losses.chunked`) where it is a plain matrix; where it is quantised, has
adapters, or somebody watches its call, the logits are whole and `next_token_loss` takes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minillm.data.batches import Batch
from minillm.losses import chunked_next_token_loss, next_token_loss
from minillm.model import Decoder
from minillm.model.linear import is_watched


class TokenLoss(nn.Module):
    """batch, total -> the sum of its token losses / total: scalar, at least fp32. `model` gives logits for tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, total: Tensor | int) -> Tensor:
        weight, how = self._head(), batch.layout()
        if weight is None:
            return next_token_loss(self.model(batch.tokens, **how), batch.tokens, batch.taught, total=total)
        hidden = self.model.hidden(batch.tokens, **how)  # type: ignore[operator]
        return chunked_next_token_loss(hidden, weight, batch.tokens, batch.taught, total=total)

    def _head(self) -> Tensor | None:
        """W (V, D) where logits are hidden W^T and nothing else, seen by nobody; else None."""
        model: Any = self.model
        if not isinstance(model, Decoder) or is_watched(model):
            return None
        head = model.lm_head
        if head is None:
            return model.embed.weight
        if not isinstance(head, nn.Linear) or head.bias is not None or is_watched(head):
            return None
        return head.weight


def whole_rows(tokens: Tensor) -> Batch:
    """tokens (B, T) int64, one text a row without padding, all of it taught."""
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.ones_like(tokens))
