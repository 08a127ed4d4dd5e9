"""Where outliers live, and what keeping them in floating point buys (LLM.int8(), arXiv 2208.07339 §4).

    outlier           |x[t, k]| >= threshold            token t, column k of what a linear reads: x (T, K)
    outlier column    one with an outlier in any token of the call
    feature           a column of the residual stream, the same number in every layer

`find` runs a model over text and looks at what its linears read, by hooks; the model does not know. Each row of tokens
is one call, as a prompt is. Kept are statistics of the columns and of the tokens' ids, never the activations.

The sweep asks of every linear, on the same x: with this threshold, how far is the int8 product from the float one,
and how much of it is float? Its ends are 0 (all columns float: what is left is the rounding of the weights) and
infinity (none). No memory is saved or lost by a threshold, since the weights stay int8 whole; a column that is kept
is multiplied in float, N of the N K products, and its N weights are read for that a second time. Errors do not add up
from layer to layer: each linear reads what the model as it is gives it. A linear that is int8 already has no float
weights left; its dequantised ones then stand for them, and the end at 0 has no error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillm.errors import InputError, NumericsError
from minillm.ops import int8
from minillm.quant.convert import HEAD, skipped
from minillm.quant.int8_linear import LinearInt8

#: One linear of each kind that reads the residual stream through a norm; the others read the same numbers.
STREAM = ("q_proj", "up_proj")
#: A feature is systematic where it is an outlier in these shares of the layers and of the tokens (paper §4.1).
SYSTEMATIC_LAYERS, SYSTEMATIC_TOKENS = 0.25, 0.06


@dataclass(frozen=True, eq=False)
class LinearOutliers:
    """What one linear (N, K) read over all tokens.

    largest (K,) fp32, of |x| · hits (K,) int64, tokens with an outlier in that column · raised: id -> how many of its
    tokens have an outlier in any column · kept: share of the columns that are outlier columns, mean over calls.
    """

    name: str
    inputs: int
    outputs: int
    tokens: int
    largest: Tensor
    hits: Tensor
    raised: Mapping[int, int]
    kept: float

    @property
    def layer(self) -> int | None:
        """Its block, or None outside them."""
        first, _, rest = self.name.partition(".")
        return int(rest.partition(".")[0]) if first == "blocks" else None

    @property
    def projection(self) -> str:
        """`q_proj` of `blocks.3.attention.q_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def columns(self) -> list[int]:
        """Columns with an outlier in any token, in order."""
        return [int(column) for column in self.hits.nonzero()]

    @property
    def share(self) -> float:
        """Of the columns, those with an outlier in any token."""
        return int((self.hits > 0).sum()) / self.inputs

    @property
    def disturbed(self) -> float:
        """Share of the tokens that have an outlier in any column."""
        return sum(self.raised.values()) / self.tokens


@dataclass(frozen=True)
class Split:
    """What one threshold does; shares and errors are means over linears and calls unless they say otherwise.

    columns         kept in float, in a call of a whole row         columns_alone   in a call of one token
    products        share of all multiplications that are float     products_alone  with one token: also the share of
    error           |int8 - float| / |float|, Euclidean                             the weights that is read once more
    worst           the largest error, and whose
    """

    threshold: float
    columns: float
    columns_alone: float
    products: float
    products_alone: float
    error: float
    worst: float
    worst_name: str


@dataclass(frozen=True)
class Feature:
    """A column of the stream: in what share of layers and tokens it is an outlier, and its largest size."""

    column: int
    layers: float
    tokens: float
    largest: float

    @property
    def systematic(self) -> bool:
        """By the paper's rule."""
        return self.layers >= SYSTEMATIC_LAYERS and self.tokens >= SYSTEMATIC_TOKENS


class Raiser(NamedTuple):
    """An id with outliers: how often it occurs, and in what share of the linears it then has any."""

    token: int
    seen: int
    share: float


@dataclass(frozen=True, eq=False)
class Outliers:
    """All of it. seen: id -> how often it occurs · positions (T,): share of linears with an outlier, by place."""

    threshold: float
    tokens: int
    linears: tuple[LinearOutliers, ...]
    seen: Mapping[int, int]
    positions: Tensor
    sweep: tuple[Split, ...] = ()

    @property
    def layers(self) -> list[int]:
        return sorted({linear.layer for linear in self.linears if linear.layer is not None})

    @property
    def projections(self) -> list[str]:
        """In the order in which they run."""
        return list(dict.fromkeys(linear.projection for linear in self.linears if linear.layer is not None))

    def at(self, layer: int, projection: str) -> LinearOutliers | None:
        """The one linear, or None where it is not measured."""
        return next((x for x in self.linears if (x.layer, x.projection) == (layer, projection)), None)

    def features(self) -> list[Feature]:
        """Columns of the stream with outliers, those of most layers and tokens first."""
        readers = [linear for linear in self.linears if linear.projection in STREAM and linear.layer is not None]
        if not readers:
            return []
        layers: dict[int, set[int]] = {}
        for linear in readers:
            for column in linear.columns:
                layers.setdefault(column, set()).add(linear.layer or 0)
        hits = torch.stack([linear.hits for linear in readers]).sum(dim=0) / sum(linear.tokens for linear in readers)
        largest = torch.stack([linear.largest for linear in readers]).amax(dim=0)
        count = len(self.layers)
        found = [Feature(c, len(layers[c]) / count, float(hits[c]), float(largest[c])) for c in layers]
        return sorted(found, key=lambda f: (-f.layers, -f.tokens, -f.largest))

    def raisers(self) -> list[Raiser]:
        """Ids with outliers, those that disturb most linears first.

        For the order each id counts as seen once more, without outliers: one seen a single time must be far above the
        others to lead them, as a first token often is.
        """
        total: Counter[int] = Counter()
        for linear in self.linears:
            total.update(linear.raised)
        found = [Raiser(i, self.seen[i], n / self.seen[i] / len(self.linears)) for i, n in total.items()]
        return sorted(found, key=lambda raiser: (-raiser.share * raiser.seen / (raiser.seen + 1), raiser.token))

    def as_json(self, *, most: int = 32) -> dict[str, Any]:
        """Plain numbers; of columns, features and ids the first `most`. An infinite threshold is null."""
        return {
            "threshold": self.threshold,
            "tokens": self.tokens,
            "linears": [_linear_as_json(linear, most) for linear in self.linears],
            "features": [vars(feature) | {"systematic": feature.systematic} for feature in self.features()[:most]],
            "raisers": [raiser._asdict() for raiser in self.raisers()[:most]],
            "positions": [round(share, 6) for share in self.positions.tolist()],
            "sweep": [
                vars(split) | {"threshold": split.threshold if math.isfinite(split.threshold) else None}
                for split in self.sweep
            ],
        }


def _linear_as_json(linear: LinearOutliers, most: int) -> dict[str, Any]:
    order = linear.largest.argsort(descending=True)[:most].tolist()
    return {
        **{name: getattr(linear, name) for name in ("name", "inputs", "outputs", "share", "kept", "disturbed")},
        "columns": [
            {"column": c, "largest": float(linear.largest[c]), "tokens": int(linear.hits[c]) / linear.tokens}
            for c in order
            if linear.hits[c]
        ],
    }


# --- measuring


@torch.no_grad()
def find(
    model: nn.Module,
    tokens: Tensor,
    *,
    threshold: float = int8.THRESHOLD,
    sweep: Sequence[float] = (),
    skip: Collection[str] = HEAD,
    report: Callable[[int, int], None] | None = None,
) -> Outliers:
    """Run tokens (B, T) through the model, a row at a time, and tell what its linears (float or int8) read.

    sweep: thresholds to try, beside 0 and infinity; empty: none, which is far faster. skip: as in `quantize_linears`;
    the head is not looked at. report: called with (rows done, rows in all).
    Raises InputError for a threshold that is not above 0 and for a model without such linears, NumericsError where
    what a linear reads is not finite.
    """
    for value in (threshold, *sweep):
        if not value > 0:
            raise InputError(f"threshold is {value}; give a positive number like 6.0")
    if not tokens.numel():
        raise InputError("there are no tokens to run; give some text")
    thresholds = sorted({0.0, *sweep, math.inf}) if sweep else []
    watched = [
        _Watch(name, module, threshold, thresholds)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | LinearInt8) and not skipped(name, skip)
    ]
    if not watched:
        raise InputError("the model has no float or int8 linear to look at; load it as float or int8, and skip less")
    positions = torch.zeros(tokens.shape[1], dtype=torch.float64)
    device = next(model.parameters()).device
    hooks = [watch.linear.register_forward_pre_hook(watch) for watch in watched]
    try:
        for done, row in enumerate(tokens, start=1):
            model(row[None].to(device))
            for watch in watched:
                positions += watch.take_row(row) / len(watched)
            if report is not None:
                report(done, len(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    return Outliers(
        threshold,
        tokens.numel(),
        tuple(watch.result() for watch in watched),
        Counter(tokens.flatten().tolist()),
        positions / len(tokens),
        tuple(_split(n, value, watched) for n, value in enumerate(thresholds)),
    )


class _Watch:
    """The hook of one linear, and its running statistics."""

    def __init__(self, name: str, linear: nn.Linear | LinearInt8, threshold: float, sweep: Sequence[float]) -> None:
        self.name, self.linear, self.threshold, self.sweep = name, linear, threshold, sweep
        self.outputs, self.inputs = linear.weight.shape
        self.largest, self.hits = torch.zeros(self.inputs), torch.zeros(self.inputs, dtype=torch.int64)
        self.raised: Counter[int] = Counter()
        self.tokens = self.calls = 0
        self.kept = 0.0  # this and the next three: sums over calls
        self.columns, self.alone, self.squared = (torch.zeros(len(sweep), dtype=torch.float64) for _ in range(3))
        self.exact = 0.0
        self._outside = torch.zeros(0, dtype=torch.bool)  # (T,) of the last call: tokens with an outlier

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, self.inputs).float()  # (T, K)
        size = x.abs()
        if not bool(size.amax().isfinite()):
            raise NumericsError(f"{self.name} reads a NaN or infinity; run `minillm verify` on this model")
        outlier = size >= self.threshold
        self.largest = self.largest.maximum(size.amax(dim=0).cpu())
        self.hits += outlier.sum(dim=0).cpu()
        self.kept += float(outlier.any(dim=0).float().mean())
        self._outside = outlier.any(dim=1).cpu()
        self.tokens += len(x)
        self.calls += 1
        if self.sweep:
            self._try(x, size)

    def _try(self, x: Tensor, size: Tensor) -> None:
        """Every threshold of the sweep on one x (T, K)."""
        weight, full = self._weights()
        exact = x @ full.T  # (T, N)
        self.exact += float(exact.double().pow(2).sum())
        for n, threshold in enumerate(self.sweep):
            outlier = size >= threshold
            self.columns[n] += float(outlier.any(dim=0).double().mean())
            self.alone[n] += float(outlier.double().mean())
            error = int8.linears(x, [weight], threshold)[0] - exact
            self.squared[n] += float(error.double().pow(2).sum())

    def _weights(self) -> tuple[int8.Weight, Tensor]:
        """Rounded, and as the product is held against: fp32. No bias: it is the same in both."""
        linear = self.linear
        if isinstance(linear, LinearInt8):
            return int8.Weight(linear.weight, linear.scale), linear.dequantised(torch.float32)
        return int8.Weight(*int8.quantise(linear.weight.contiguous())[:2]), linear.weight.float()

    def take_row(self, row: Tensor) -> Tensor:
        """After the forward of row (T,): count whose tokens had an outlier -> (T,) bool."""
        if len(self._outside) != len(row):
            raise InputError(
                f"{self.name} read {len(self._outside)} tokens of {len(row)}; only decoders can be watched"
            )
        self.raised.update(row.cpu()[self._outside].tolist())
        outside, self._outside = self._outside, self._outside[:0]
        return outside

    def result(self) -> LinearOutliers:
        size = (self.name, self.inputs, self.outputs, self.tokens)
        return LinearOutliers(*size, self.largest, self.hits, self.raised, self.kept / self.calls)

    def error(self, n: int) -> float:
        """Relative, of the n-th threshold. What is all zero is exact."""
        return math.sqrt(float(self.squared[n]) / self.exact) if self.exact else 0.0


def _split(n: int, threshold: float, watched: Sequence[_Watch]) -> Split:
    errors = [watch.error(n) for watch in watched]
    worst = max(range(len(watched)), key=errors.__getitem__)
    whole = [float(watch.columns[n]) / watch.calls for watch in watched]
    alone = [float(watch.alone[n]) / watch.calls for watch in watched]
    return Split(
        threshold,
        _mean(whole),
        _mean(alone),
        _mean(whole, [watch.inputs * watch.outputs for watch in watched]),
        _mean(alone, [watch.inputs * watch.outputs for watch in watched]),
        _mean(errors),
        errors[worst],
        watched[worst].name,
    )


def _mean(values: Sequence[float], weights: Sequence[int] | None = None) -> float:
    """Weighted where weights are given.

    >>> _mean([1.0, 3.0]), _mean([1.0, 3.0], [3, 1])
    (2.0, 1.5)
    """
    weights = weights or [1] * len(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
