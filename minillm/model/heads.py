"""What sits on the last hidden state: logits over the vocabulary, or one number a token.

LM head      logits = h W^T          W (V, D), or the embedding itself where the two are tied
scalar head  value  = h · w          w (1, D): rewards and values; checkpoints name it `score`
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minillm.errors import InputError


class ScalarHead(nn.Module):
    """h (B, T, D) -> (B, T): one number for each token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.score(hidden).squeeze(-1)


def at_last_token(values: Tensor, keep: Tensor) -> Tensor:
    """The number at each row's last real token: values (B, T) · keep (B, T) bool, either side padded -> (B,).

    Found from the mask, not by comparing ids with the padding id: where padding and end-of-text share an id, that
    reads the token *before* the end (transformers' sequence classifiers do).

    >>> at_last_token(torch.tensor([[1., 2., 3.]]), torch.tensor([[True, True, False]])).tolist()
    [2.0]
    """
    if not bool(keep.any(dim=1).all()):
        raise InputError("a row has no real token to read a value at; remove empty rows")
    index = torch.arange(keep.shape[1], device=keep.device)
    last = torch.where(keep, index, -1).amax(dim=1)  # (B,)
    return values.gather(1, last[:, None]).squeeze(1)
