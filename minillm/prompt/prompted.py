"""A model with virtual tokens before every text.

    prompted = minillm.prompt.add(model, kind="prompt", tokens=20)      the model is frozen; prompted.prompt is trained
    logits = prompted(tokens, keep=keep)                               (B, T) -> (B, T, V), of the real tokens
    minillm.generate(prompted, tokenizer, "...")                       cache and all
    prompted.base                                                      the model itself, bit for bit

    slots    virtual (P) | tokens (T), real and padding                positions 0 .. P-1 | P + real tokens before it

Whatever the model is made of (int8, NF4, LoRA), nothing in it changes. Where we differ from peft (0.21):

- Positions count real tokens only, so that a row padded on the left has the logits it has alone. In peft prompt tuning
  and P-tuning turn real tokens by the padding too, and position_ids are ignored with a warning; prefix tuning is right
  where the caller passes position_ids, and off without.
- Logits are of the real tokens. peft returns P more, and its loss asks the last virtual token for the first real one;
  with labels[:, 0] = -100 the two losses are equal.
- The longest text is P shorter than the model's context, as `minillm.generate` sees it.
- Packed rows (segments) are refused: each segment would need virtual tokens of its own.

With a prefix, blocks are not computed again for the backward pass (`Decoder.recompute`), as they are not with a cache;
peft refuses that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minillm.data.tokenizer import Tokenizer
from minillm.errors import InputError
from minillm.model import Decoder
from minillm.prompt.cache import PromptCache, with_prefix
from minillm.prompt.config import PromptConfig, settings
from minillm.prompt.virtual import Virtual, fresh


class Prompted(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V) of the real tokens, after the virtual ones of `prompt`.

    base: the model. prompt: what is trained. settings: what it is. `keep` and `cache` as `Decoder` has them.
    """

    def __init__(self, base: Decoder, settings: PromptConfig, prompt: Virtual) -> None:
        super().__init__()
        self.base, self.settings, self.prompt = base, settings, prompt
        whole = base.config
        taken = math.ceil(settings.tokens * whole.context / whole.longest)
        #: The model's, with the context that is left to the text.
        self.config = replace(whole, context=whole.context - taken)

    @property
    def embed(self) -> nn.Module:
        """The model's."""
        return self.base.embed

    @property
    def generation_defaults(self) -> Mapping[str, object]:
        """The model's."""
        return self.base.generation_defaults

    def forward(
        self,
        tokens: Tensor,
        *,
        keep: Tensor | None = None,
        cache: PromptCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        return self.head(self.hidden(tokens, keep=keep, cache=cache, segments=segments))

    def hidden(
        self,
        tokens: Tensor,
        *,
        keep: Tensor | None = None,
        cache: PromptCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """The normed state of the real tokens under the head: (B, T) -> (B, T, D)."""
        if segments is not None:
            raise InputError("rows are packed, and each text of a row would need virtual tokens; do not pack them")
        if cache is not None:
            if not isinstance(cache, PromptCache):
                raise InputError("the cache has no virtual tokens; make it with new_cache of the prompted model")
            return self.base.hidden(tokens, keep=keep, cache=cache.inner)
        values, (batch, queries) = self.values(), tokens.shape
        if self.settings.kind == "prefix":
            return self.base.hidden(tokens, keep=keep, cache=with_prefix(self.base.config, values, batch, queries))
        if keep is not None:
            if keep.shape != tokens.shape or keep.dtype != torch.bool:
                raise InputError(f"keep is {keep.dtype} {tuple(keep.shape)}; it must be bool, {batch, queries}")
            keep = torch.cat((keep.new_ones(batch, self.settings.tokens), keep), dim=1)  # (B, P + T)
        x = torch.cat((values.expand(batch, -1, -1), self.base.embed(tokens)), dim=1)  # (B, P + T, D)
        return self.base.hidden(x, keep=keep)[:, self.settings.tokens :]

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V)."""
        return self.base.head(hidden)

    def values(self) -> Tensor:
        """The virtual tokens (P, D) or (P, 2 L N E), in the model's dtype."""
        values: Tensor = self.prompt()
        return values.to(self.base.embed.weight.dtype)

    @torch.no_grad()
    def new_cache(self, batch: int, capacity: int) -> PromptCache:
        """A cache that holds the virtual tokens as they now are, and has room for `capacity` tokens of text."""
        values, tokens = self.values(), self.settings.tokens
        if self.settings.kind == "prefix":
            return PromptCache(with_prefix(self.base.config, values, batch, capacity), tokens)
        inner = self.base.new_cache(batch, tokens + capacity)
        self.base.hidden(values.expand(batch, -1, -1), cache=inner)
        return PromptCache(inner, tokens)


def check(model: Decoder, config: PromptConfig) -> None:
    """InputError where a model cannot have such a prompt."""
    if not isinstance(model, Decoder):
        raise InputError(f"a prompt goes before a Decoder, not a {type(model).__name__}; a model takes one at a time")
    if model.config.head != "lm":
        raise InputError("the model has a scalar head and peft's files no place for it; prompt a language model")
    if config.tokens >= model.config.longest:
        raise InputError(
            f"{config.tokens} virtual tokens leave no room in a context of {model.config.longest}; give fewer tokens"
        )


def add(
    model: Decoder, config: PromptConfig | None = None, *, tokenizer: Tokenizer | None = None, **fields: Any
) -> Prompted:
    """A fresh prompt before a model, which is frozen and otherwise left alone; `prompted.prompt` is trained.

    config, or its fields by keyword. tokenizer: for init "text". Random numbers are torch's own stream: peft draws the
    same after the same `torch.manual_seed`. Raises InputError for settings that do not go together.
    """
    config = settings(config, fields)
    check(model, config)
    prompt = fresh(model, config, tokenizer)
    model.requires_grad_(False)
    return Prompted(model, config, prompt)
