"""What `minillm.quant.outliers.find` found, for people: 80 columns wide. Colours repeat what the words say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minillm.quant.outliers import SYSTEMATIC_LAYERS, SYSTEMATIC_TOKENS, LinearOutliers, Outliers, Split

_MOST = 8  # features and tokens shown
_WIDEST = 20  # letters of a token
_RULE = f"{SYSTEMATIC_LAYERS:.0%} of layers, {SYSTEMATIC_TOKENS:.0%} of tokens"
_SWEEP_NOTES = (
    "products: share of the multiplications that are float, in a row of tokens and,",
    "as in decoding, for one token; there also the share of weights read once more.",
    "No memory depends on it: the weights stay int8 whole.",
    "error: of a linear's output, relative, on what it reads in this model.",
)


def describe(found: Outliers, what: str, spell: Callable[[int], str] = str) -> RenderableType:
    """what: the model and the text, in words; spell: id -> token."""
    title = Text(f"{what}: outliers are |x| >= {found.threshold:g}", "bold")
    return Group(title, *_layers(found), *_features(found), *_tokens(found, spell), *_sweep(found), *_verdict(found))


def _layers(found: Outliers) -> Iterator[RenderableType]:
    yield _title("Outlier columns of what each linear reads")
    table = _table()
    table.add_column("layer", justify="right")
    for projection in found.projections:
        table.add_column(short(projection), justify="right", no_wrap=True)
    table.add_column("largest", justify="right", no_wrap=True)
    table.add_column("in column", no_wrap=True)
    for layer in found.layers:
        row = [found.at(layer, projection) for projection in found.projections]
        largest = max((linear for linear in row if linear), key=lambda linear: float(linear.largest.max()))
        size, column = largest.largest.max(dim=0)
        place = f"{int(column)} of {short(largest.projection)}"
        table.add_row(str(layer), *(_count(linear) for linear in row), _size(float(size), found.threshold), place)
    table.add_section()
    every = [[x for x in found.linears if x.projection == name and x.layer is not None] for name in found.projections]
    table.add_row("of", *(f"{linears[0].inputs:,}" for linears in every))
    table.add_row("kept", *(percent(_mean([x.kept for x in linears])) for linears in every))
    table.add_row("hit", *(percent(_mean([x.disturbed for x in linears])) for linears in every))
    yield table
    yield Text("of: columns there are. kept: float in a row of tokens. hit: tokens with any.", "dim")


def _features(found: Outliers) -> Iterator[RenderableType]:
    features = found.features()
    if not features:
        return
    yield _title("Columns of the stream with outliers: what q, k, v, gate and up read")
    table = _table()
    for name in ("column", "layers", "tokens", "largest"):
        table.add_column(name, justify="right")
    table.add_column("")
    for feature in features[:_MOST]:
        word = Text("systematic", "yellow") if feature.systematic else Text("")
        shares = (percent(feature.layers), percent(feature.tokens))
        table.add_row(str(feature.column), *shares, _size(feature.largest, found.threshold), word)
    yield table
    if len(features) > _MOST:
        yield Text(f"and {len(features) - _MOST} more", "dim")


def _tokens(found: Outliers, spell: Callable[[int], str]) -> Iterator[RenderableType]:
    raisers = found.raisers()
    if not raisers:
        return
    yield _title("Tokens that raise them")
    table = _table()
    table.add_column("token", no_wrap=True)
    for name in ("id", "seen", "outliers in"):
        table.add_column(name, justify="right")
    for raiser in raisers[:_MOST]:
        text = spell(raiser.token)
        text = text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."
        table.add_row(Text(text), str(raiser.token), f"{raiser.seen:,}", f"{percent(raiser.share)} of linears")
    yield table
    first, others = float(found.positions[0]), found.positions[1:]
    if len(others):
        rest = float(others.mean())
        yield Text(f"the first token of a row: in {percent(first)} of linears; the others: {percent(rest)}", "dim")


def _sweep(found: Outliers) -> Iterator[RenderableType]:
    if not found.sweep:
        return
    yield _title("Thresholds: what stays float, and how far int8 is from float then")
    table = _table()
    for name in ("threshold", "columns", "products", "products,\none token", "error", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for split in found.sweep:
        shares = (split.columns, split.products, split.products_alone)
        style = "bold" if split.threshold == found.threshold else ""
        table.add_row(
            _threshold(split),
            *map(percent, shares),
            percent(split.error),
            percent(split.worst),
            _where(split),
            style=style,
        )
    yield table
    for line in _SWEEP_NOTES:
        yield Text(line, "dim")


def _verdict(found: Outliers) -> Iterator[Text]:
    yield Text()
    kept = _mean([linear.kept for linear in found.linears])
    systematic = sum(feature.systematic for feature in found.features())
    yield Text(f"{percent(kept)} of the columns stay float in a row of tokens at {found.threshold:g}.")
    verb = "column of the stream has" if systematic < 2 else "columns of the stream have"
    style = "yellow" if systematic else "green"
    yield Text(f"{systematic or 'No'} {verb} systematic outliers ({_RULE}).", style)


# --- words and numbers


def short(projection: str) -> str:
    """`q` for `q_proj`."""
    return projection.removesuffix("_proj")


def percent(share: float) -> str:
    """Two digits that count, or none.

    >>> [percent(share) for share in (0.0, 1e-7, 0.00042, 0.0312, 0.09996, 1.0, 12.0)]
    ['0', '<0.001%', '0.042%', '3.1%', '10%', '100%', '1200%']
    """
    if share < 1e-5:
        return "<0.001%" if share else "0"
    rounded = float(f"{100 * share:.2g}")
    return f"{rounded:.{max(0, 1 - math.floor(math.log10(rounded)))}f}%"


def _count(linear: LinearOutliers | None) -> Text:
    if linear is None:
        return Text("-")
    count = len(linear.columns)
    return Text(f"{count:,}", "yellow" if count else "dim")


def _size(size: float, threshold: float) -> Text:
    return Text(f"{size:.3g}" if size < 1000 else f"{size:,.0f}", "yellow" if size >= threshold else "")


def _threshold(split: Split) -> str:
    ends = {0.0: "0, all float", math.inf: "none float"}
    return ends.get(split.threshold, f"{split.threshold:g}")


def _where(split: Split) -> str:
    """`3 down` for `blocks.3.mlp.down_proj`."""
    if split.worst == 0:
        return ""
    parts = split.worst_name.split(".")
    return f"{parts[1]} {short(parts[-1])}" if parts[0] == "blocks" else split.worst_name


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def _title(text: str) -> Text:
    return Text(f"\n{text}", "bold")


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
