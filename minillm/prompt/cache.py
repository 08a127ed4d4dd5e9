"""A prefix as keys and values in the cache, and a cache whose first slots are virtual tokens.

    values (P, 2 L N E) = P rows of    k_1 v_1 k_2 v_2 ... k_L v_L        each (N, E), put into the cache as they are:
                                                                          keys are not turned by rotary embedding

N is G, but on Falcons with grouped heads H: transformers' Falcon repeats each key/value head H/G times *before* they go
into its cache (`FalconAttention._split_heads`, 5.23), so there peft's prefix has a head for every query head. The cache
is then as wide, and the keys and values of the text are repeated into it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from minillm.checkpoint.falcon import config_to_hf
from minillm.config import DecoderConfig
from minillm.model import KVCache
from minillm.model.cache import LayerCache


def cached_heads(config: DecoderConfig) -> int:
    """N: key/value heads in transformers' cache of this model, and so in peft's prefix for it."""
    is_repeated = config.family == "falcon" and config_to_hf(config)["new_decoder_architecture"]
    return config.num_heads if is_repeated else config.num_kv_heads


def split(values: Tensor, layers: int, heads: int) -> list[tuple[Tensor, Tensor]]:
    """values (P, 2 L N E) -> keys, values (1, N, P, E) of each layer."""
    tokens = len(values)
    parts = values.view(tokens, 2 * layers, heads, -1).permute(1, 2, 0, 3)[:, None]  # (2 L, 1, N, P, E)
    return [(parts[2 * layer], parts[2 * layer + 1]) for layer in range(layers)]


def with_prefix(config: DecoderConfig, values: Tensor, batch: int, capacity: int) -> KVCache:
    """A cache of B rows that begin with the prefix values (P, 2 L N E), with room for `capacity` tokens after it.

    The values may want a gradient; it comes through what attention reads, for one forward pass.
    """
    tokens, width = values.shape
    heads = width // (2 * config.num_layers * config.head_size)
    kind = KVCache if heads == config.num_kv_heads else _WideCache
    shape = replace(config, num_kv_heads=heads)
    cache = kind(shape, batch, tokens + capacity, dtype=values.dtype, device=values.device)
    for layer, (k, v) in enumerate(split(values, config.num_layers, heads)):
        cache.layer(layer).write(k, v)
    cache.advance(tokens)
    return cache


class _WideCache(KVCache):
    """More heads than the model's: each of the model's is repeated."""

    def layer(self, number: int) -> LayerCache:
        return _WideLayer(self, number)


class _WideLayer(LayerCache):
    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        repeats = self.stored[0].shape[1] // k.shape[1]
        k, v = (torch.repeat_interleave(x, repeats, dim=1) for x in (k, v))
        return LayerCache.write(self, k, v)


class PromptCache:
    """The text's part of a `KVCache` that begins with P virtual tokens: lengths and capacities count the text alone."""

    def __init__(self, inner: KVCache, virtual: int) -> None:
        self.inner, self.virtual = inner, virtual

    @property
    def length(self) -> int:
        """Tokens of the text in it."""
        return self.inner.length - self.virtual

    @property
    def capacity(self) -> int:
        """Tokens of the text that fit."""
        return self.inner.capacity - self.virtual

    def grow(self, capacity: int) -> None:
        """As `KVCache.grow`."""
        self.inner.grow(self.virtual + capacity)

    def select(self, rows: list[int]) -> None:
        """As `KVCache.select`."""
        self.inner.select(rows)

    def rewind(self, length: int) -> None:
        """As `KVCache.rewind`; the virtual tokens stay."""
        self.inner.rewind(self.virtual + length)
