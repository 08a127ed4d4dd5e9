"""Outliers put into a model that has none, without changing what it computes.

    norm, then linears     a y_c  and  W[:, c] / a        y_c: channel c of the norm's output (weight and bias times a)
    v_proj, then o_proj    the same; attention is linear in the values, and a group's heads all read its channel
    up_proj, then down     the same, where the feed-forward is linear in up: gated, or plain with relu

The column c that the linears read is a times as large, its weights a times smaller, and their product the same. With a
power of two not a bit of a floating-point model changes (short of overflow); int8 sees real outliers. One thing a
trained model's outliers do not bring: weights that are a times smaller than the rest of their row are rounded a times
as coarsely in int8, and no care for the activations mends that (scripts/bench/outliers.py shows both).

SmoothQuant (arXiv 2211.10438 eq. 3) is the same identity, used the other way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from minillm.config import DecoderConfig
from minillm.errors import InputError
from minillm.model import Decoder

Where = Literal["norms", "values", "inner"]


class _Pair(NamedTuple):
    """`source` has `width` channels; channel c is read as columns `spread(c)` by the linears named."""

    source: str
    readers: tuple[str, ...]
    width: int
    heads: int = 1  # readers of one value channel: H / G, those of its group
    size: int = 0  # E, with heads

    def columns(self, channels: Sequence[int]) -> list[int]:
        if self.size == 0:
            return sorted(channels)
        groups = [(channel // self.size, channel % self.size) for channel in channels]
        return sorted((g * self.heads + h) * self.size + e for g, e in groups for h in range(self.heads))


@torch.no_grad()
def plant(
    model: Decoder,
    amount: float,
    *,
    channels: int | Sequence[int] = 1,
    where: Sequence[Where] = ("norms",),
    seed: int = 0,
) -> dict[str, tuple[int, ...]]:
    """Make some channels `amount` times as large, in place, and their readers' weights as much smaller.

    channels: which, or how many to draw with `seed`; the same ones in every layer, as in trained models (paper §4.1).
    Returns name of each linear that reads them -> its planted columns, in order.
    Raises InputError for an amount that is not above 0, channels there are not, a linear that is int8 already, and for
    "inner" where the activation would not let a factor pass.
    """
    if not 0 < amount < math.inf:
        raise InputError(f"amount is {amount}; give a positive number like 16")
    pairs = [pair for kind in where for pair in _pairs(model.config, kind)]
    planted: dict[str, tuple[int, ...]] = {}
    for pair in pairs:  # all is checked before anything is changed
        _check_float(model, pair)
    chosen = {pair.width: _choose(pair.width, channels, seed) for pair in pairs}
    for pair in pairs:
        source: Any = model.get_submodule(pair.source)
        drawn, columns = chosen[pair.width], pair.columns(chosen[pair.width])
        source.weight[drawn] *= amount  # of a norm the channel, of a linear the row
        if getattr(source, "bias", None) is not None:
            source.bias[drawn] *= amount
        for name in pair.readers:
            reader: Any = model.get_submodule(name)
            reader.weight[:, columns] /= amount
            planted[name] = tuple(columns)
    return planted


def _choose(width: int, channels: int | Sequence[int], seed: int) -> list[int]:
    if isinstance(channels, int):
        if not 1 <= channels <= width:
            raise InputError(f"{channels} channels of {width}; give a number between 1 and {width}")
        generator = torch.Generator().manual_seed(seed)
        return sorted(torch.randperm(width, generator=generator)[:channels].tolist())
    chosen = sorted(set(channels))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < width:
        raise InputError(f"channels {chosen} of {width}; give numbers from 0 to {width - 1}")
    return chosen


def _pairs(config: DecoderConfig, where: Where) -> Iterator[_Pair]:
    """All pairs of one kind, layer by layer."""
    if where == "inner" and config.mlp == "plain" and config.activation != "relu":
        raise InputError(f"where names inner, but {config.activation} lets no factor pass; leave it out")
    for layer in range(config.num_layers):
        attention, mlp = f"blocks.{layer}.attention", f"blocks.{layer}.mlp"
        reads_attention = tuple(f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj"))
        reads_mlp = tuple(f"{mlp}.{name}" for name in (("gate_proj",) if config.mlp == "gated" else ()) + ("up_proj",))
        if where == "values":
            value_width = config.num_kv_heads * config.head_size
            heads = (config.heads_per_group, config.head_size)
            yield _Pair(f"{attention}.v_proj", (f"{attention}.o_proj",), value_width, *heads)
        elif where == "inner":
            yield _Pair(f"{mlp}.up_proj", (f"{mlp}.down_proj",), config.ffn_size)
        elif config.block == "parallel" and config.parallel_norms == 1:
            yield _Pair(f"blocks.{layer}.attention_norm", reads_attention + reads_mlp, config.hidden_size)
        else:
            yield _Pair(f"blocks.{layer}.attention_norm", reads_attention, config.hidden_size)
            yield _Pair(f"blocks.{layer}.mlp_norm", reads_mlp, config.hidden_size)


def _check_float(model: Decoder, pair: _Pair) -> None:
    for name in (pair.source, *pair.readers):
        module: Any = model.get_submodule(name)
        is_norm = name == pair.source and name.endswith("norm")
        if not is_norm and not isinstance(module, nn.Linear):
            raise InputError(f"{name} is no float linear but {type(module).__name__}; plant before quantising")
