"""The key/value cache: what attention has already computed for the tokens so far.

    keys, values   one tensor a layer, (B, G, capacity, E): G key/value heads, never expanded to H

`slots` filled are the same for every row; padding on the left makes rows of one batch equally long. The cache owns the
positions: a token's position is the number of *real* tokens before it in its row. Layers only write; the decoder alone
advances the cache, once after all its layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minillm.config import DecoderConfig
from minillm.errors import InputError


class KVCache:
    """Preallocated keys and values of `batch` rows of up to `capacity` tokens.

    Memory: 2 · layers · B · G · capacity · E numbers (`DecoderConfig.cache_bytes_per_token`); pages that no token has
    reached yet are not touched.
    """

    def __init__(
        self, config: DecoderConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (batch, config.num_kv_heads, capacity, config.head_size)
        layers = range(config.num_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.capacity = capacity
        self.length = 0
        self._keep: Tensor | None = None  # (B, length) once any row has padding

    def reserve(self, keep: Tensor | None, batch: int, queries: int) -> Tensor | None:
        """Make room for T more tokens; keep (B, T) bool or None -> keep of all S slots, or None without padding."""
        if self.keys and batch != self.keys[0].shape[0]:
            raise InputError(f"the batch has {batch} rows, its cache {self.keys[0].shape[0]}; use one cache a batch")
        if self.length + queries > self.capacity:
            raise InputError(
                f"{self.length + queries} tokens do not fit a cache of {self.capacity}; ask for a larger capacity"
            )
        if keep is None and self._keep is None:
            return None
        device = self.keys[0].device
        past = torch.ones(batch, self.length, dtype=torch.bool, device=device) if self._keep is None else self._keep
        new = torch.ones(batch, queries, dtype=torch.bool, device=device) if keep is None else keep
        self._keep = torch.cat((past[:, : self.length], new), dim=1)  # (B, S)
        return self._keep

    def layer(self, number: int) -> LayerCache:
        """What one layer may do with its keys and values."""
        return LayerCache(self, number)

    def advance(self, queries: int) -> None:
        """Count T tokens as seen, after every layer has written them."""
        self.length += queries

    def grow(self, capacity: int) -> None:
        """Raise the capacity, keeping what is cached; a smaller one is left alone."""
        if capacity <= self.capacity:
            return
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                store[layer] = old.new_empty(*old.shape[:2], capacity, old.shape[3])
                store[layer][:, :, : self.length] = old[:, :, : self.length]
        self.capacity = capacity

    def select(self, rows: list[int]) -> None:
        """Keep only these rows of the batch, in this order."""
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                store[layer] = old.new_empty(len(rows), *old.shape[1:])
                store[layer][:, :, : self.length] = old[rows, :, : self.length]
        if self._keep is not None:
            self._keep = self._keep[rows]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` slots: a rejected draft, or an edited conversation."""
        if not 0 <= length <= self.length:
            raise InputError(f"cannot rewind a cache of {self.length} tokens to {length}")
        self.length = length
        if self._keep is not None:
            self._keep = self._keep[:, :length]


class LayerCache(NamedTuple):
    """The cache as one layer sees it."""

    cache: KVCache
    number: int

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values in whole, (B, G, capacity, E) each."""
        return self.cache.keys[self.number], self.cache.values[self.number]

    @property
    def length(self) -> int:
        """Filled slots."""
        return self.cache.length

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, E) behind the filled slots; returns views of all S = length + T: (B, G, S, E)."""
        keys, values = self.stored
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]
