"""The decoder: embed, L blocks, norm, head. Every model that minillm knows is this one class and a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from minillm.config import DecoderConfig
from minillm.errors import InputError
from minillm.model.alibi import alibi_bias
from minillm.model.attention import visible_keys, visible_within
from minillm.model.block import make_block
from minillm.model.cache import KVCache
from minillm.model.heads import ScalarHead
from minillm.model.linear import Linear, times
from minillm.model.norms import make_norm
from minillm.model.rope import Rotary

Contexts = Callable[[], tuple[AbstractContextManager[object], AbstractContextManager[object]]]


class Decoder(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V), or values (B, T) with a scalar head.

        x = embed[tokens];   x = block_l(x) for l = 1 .. L;   logits = norm(x) W_head^T

    keep (B, T) bool marks real tokens, on either side of padding; None means that all are. With a cache, T tokens
    follow those already in it, and only they are computed. segments (B, T) int64 instead: several texts share a row,
    each token sees those of its own segment alone, and each text begins at position 0.

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
        #: For each block: what it runs in, and what it runs in when it is computed again; whoever changes what a block
        #: does between the two passes sets it. Default: nothing.
        self.contexts: Contexts = noop_context_fn
        #: What the checkpoint's generation_config.json says; `minillm.generate` starts from it.
        self.generation_defaults: Mapping[str, object] = {}

    def forward(
        self,
        tokens: Tensor,
        *,
        keep: Tensor | None = None,
        cache: KVCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        return self.head(self.hidden(tokens, keep=keep, cache=cache, segments=segments))

    def hidden(
        self,
        tokens: Tensor,
        *,
        keep: Tensor | None = None,
        cache: KVCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """The normed state under the head: (B, T) -> (B, T, D). For a head of your own, or logits of a few tokens.

        tokens may also be what stands in their place, ready embeddings (B, T, D): `minillm.prompt`.
        """
        batch, queries = tokens.shape[:2]
        _check(tokens, keep, cache, segments)
        past = 0 if cache is None else cache.length
        if cache is not None:
            keep = cache.reserve(keep, batch, queries)
        positions = _positions(keep, past + queries, tokens.device) if segments is None else _positions_within(segments)
        x = tokens if tokens.is_floating_point() else self.embed(tokens)
        rotation = None if self.rotary is None else self.rotary(positions[:, past:], x.dtype)  # positions (B or 1, S)
        mask = self._mask(_visible(keep, segments, queries, past + queries, tokens.device), positions, queries, x.dtype)
        again: Any = {} if torch.compiler.is_compiling() else {"context_fn": self.contexts}  # it stays as compiled
        for layer, block in enumerate(self.blocks):
            if self.recompute and self.training and cache is None:
                x = checkpoint(block, x, rotation, mask, None, use_reentrant=False, **again)
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

    def _mask(self, visible: Tensor | None, positions: Tensor, queries: int, dtype: torch.dtype) -> Tensor | None:
        """What the attention layers take: None, or (B or 1, H or 1, T, S), bool or to be added to the scores."""
        config = self.config
        if config.position == "rotary":
            return visible
        bias = alibi_bias(positions, config.num_heads, config.head_size, dtype)
        if visible is None and queries == 1:
            return bias
        if visible is None:
            visible = visible_keys(None, queries, queries, positions.device)
        return torch.where(visible, bias, torch.finfo(dtype).min)


def _check(tokens: Tensor, keep: Tensor | None, cache: KVCache | None, segments: Tensor | None) -> None:
    if keep is not None and (keep.shape != tokens.shape[:2] or keep.dtype != torch.bool):
        raise InputError(
            f"keep is {keep.dtype} {tuple(keep.shape)}; it must be bool and of the tokens' shape "
            f"{tuple(tokens.shape[:2])}, without those already cached"
        )
    if segments is not None and (segments.shape != tokens.shape or keep is not None or cache is not None):
        raise InputError(
            f"segments has shape {tuple(segments.shape)}, tokens {tuple(tokens.shape)}; they must be of one shape, "
            "with neither keep nor cache: rows are packed to train on, not to write after"
        )


def _visible(
    keep: Tensor | None, segments: Tensor | None, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """(B or 1, 1, T, S) bool; None for plain causal attention: all tokens are new, or one that sees all before it."""
    if segments is not None:
        return visible_within(segments)
    if keep is None and queries in (1, keys):
        return None
    return visible_keys(keep, queries, keys, device)


def _positions_within(segments: Tensor) -> Tensor:
    """0, 1, 2, ... within each run of one number: (B, T) -> (B, T) int64."""
    place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return place - (place * begins).cummax(dim=1).values


def _positions(keep: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Real tokens before each slot: keep (B, S) -> (B, S) int64, or (1, S) without padding. Pads count as 0."""
    if keep is None:
        return torch.arange(length, device=device)[None]
    return (keep.long().cumsum(dim=1) - 1) * keep
