"""The decoder: embed, L blocks, norm, head. Every model that minillm knows is this one class and a config."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.config import DecoderConfig
from minillm.errors import InputError
from minillm.model.alibi import alibi_bias
from minillm.model.attention import visible_keys
from minillm.model.block import make_block
from minillm.model.cache import KVCache
from minillm.model.heads import ScalarHead
from minillm.model.linear import Linear, times
from minillm.model.norms import make_norm
from minillm.model.rope import Rotary


class Decoder(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V), or values (B, T) with a scalar head.

        x = embed[tokens];   x = block_l(x) for l = 1 .. L;   logits = norm(x) W_head^T

    keep (B, T) bool marks real tokens, on either side of padding; None means that all are. With a cache, T tokens
    follow those already in it, and only they are computed.

    >>> tiny = DecoderConfig(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_size=4,
    ...                      ffn_size=16, context=32)
    >>> Decoder(tiny)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 9])
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(make_block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.rotary = Rotary(config) if config.position == "rotary" else None
        self.lm_head: nn.Linear | ScalarHead | None
        if config.head == "scalar":
            self.lm_head = ScalarHead(config.hidden_size)
        elif config.tied_embeddings:
            self.lm_head = None
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        #: Whether training keeps only the blocks' inputs and computes the rest again backward (arXiv 1604.06174).
        self.recompute = False
        #: What the checkpoint's generation_config.json says; `minillm.generate` starts from it.
        self.generation_defaults: Mapping[str, object] = {}

    def forward(self, tokens: Tensor, *, keep: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        return self.head(self.hidden(tokens, keep=keep, cache=cache))

    def hidden(self, tokens: Tensor, *, keep: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The normed state under the head: (B, T) -> (B, T, D). For a head of your own, or logits of a few tokens."""
        batch, queries = tokens.shape
        if keep is not None and (keep.shape != tokens.shape or keep.dtype != torch.bool):
            raise InputError(
                f"keep is {keep.dtype} {tuple(keep.shape)}; it must be bool and of the tokens' shape {batch, queries}, "
                "without those already cached"
            )
        past = 0 if cache is None else cache.length
        if cache is not None:
            keep = cache.reserve(keep, batch, queries)
        positions = _positions(keep, past + queries, tokens.device)  # (B or 1, S)
        x = self.embed(tokens)
        rotation = None if self.rotary is None else self.rotary(positions[:, past:], x.dtype)
        mask = self._mask(keep, positions, queries, x.dtype)
        for layer, block in enumerate(self.blocks):
            if self.recompute and self.training and cache is None:
                x = checkpoint(block, x, rotation, mask, None, use_reentrant=False)
            else:
                x = block(x, rotation, mask, None if cache is None else cache.layer(layer))
        if cache is not None:
            cache.advance(queries)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V), through the embedding itself where the two are tied."""
        return times(hidden, self.embed.weight) if self.lm_head is None else self.lm_head(hidden)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache in the model's dtype and on its device."""
        weight = self.embed.weight
        return KVCache(self.config, batch, capacity, dtype=weight.dtype, device=weight.device)

    def _mask(self, keep: Tensor | None, positions: Tensor, queries: int, dtype: torch.dtype) -> Tensor | None:
        """None for plain causal attention, else (B or 1, H or 1, T, S); see `minillm.model.attention`."""
        config, keys = self.config, positions.shape[1]
        everything = keep is None and queries == 1  # a single token sees all before it
        if config.position == "rotary":
            plain = everything or (keep is None and queries == keys)
            return None if plain else visible_keys(keep, queries, keys, positions.device)
        bias = alibi_bias(positions, config.num_heads, config.head_size, dtype)
        if everything:
            return bias
        return torch.where(visible_keys(keep, queries, keys, positions.device), bias, torch.finfo(dtype).min)


def _positions(keep: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Real tokens before each slot: keep (B, S) -> (B, S) int64, or (1, S) without padding. Pads count as 0."""
    if keep is None:
        return torch.arange(length, device=device)[None]
    return (keep.long().cumsum(dim=1) - 1) * keep
