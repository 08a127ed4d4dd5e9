"""What `minillm.quant.outliers.find` found, as a picture.

left    layer x projection: share of the columns with an outlier, from white (none) over a logarithmic scale
right   how many columns of what the linears read have which largest |x|; outliers are right of the line
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from minillm.atomic import atomic_file
from minillm.errors import InputError
from minillm.quant.outlier_table import percent, short
from minillm.quant.outliers import Outliers

_KINDS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_BINS_A_DECADE = 12
_INCHES = {"layer": 0.16, "least": 2.6, "most": 9.0, "around": 1.3, "width": 12.0}
_WRITTEN = 24  # with so many layers or fewer, cells carry their count


def draw(found: Outliers, path: str | Path, title: str) -> None:
    """Write the PNG. Raises InputError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('drawing needs matplotlib; pip install "minillm[plot]"') from error
    height = min(max(_INCHES["layer"] * len(found.layers), _INCHES["least"]), _INCHES["most"])
    figure = Figure(figsize=(_INCHES["width"], height + _INCHES["around"]), layout="constrained")
    figure.suptitle(f"{title}: outliers are |x| ≥ {found.threshold:g}", fontsize=11)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    bar = figure.colorbar(_draw_shares(left, found), ax=left, pad=0.02, format="%g")
    bar.set_label("share of the columns with an outlier, %")
    _draw_sizes(right, found)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _draw_shares(axes: Any, found: Outliers) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    shares = torch.full((len(found.layers), len(found.projections)), math.nan)
    for y, layer in enumerate(found.layers):
        for x, projection in enumerate(found.projections):
            linear = found.at(layer, projection)
            shares[y, x] = math.nan if linear is None else 100 * linear.share
            if linear is not None and linear.share and len(found.layers) <= _WRITTEN:
                shade = "white" if linear.share > 0.1 else "black"
                axes.text(x, y, percent(linear.share), ha="center", va="center", fontsize=8, color=shade)
    colours = colormaps["YlOrRd"].with_extremes(under="white")
    least = min(100 / linear.inputs for linear in found.linears)
    scale = LogNorm(vmin=min(least, 50.0), vmax=100.0)
    image = axes.imshow(
        shares.clamp(min=least / 1e3).numpy(), aspect="auto", interpolation="none", cmap=colours, norm=scale
    )
    axes.patch.set(facecolor="0.85")
    axes.set_xticks(range(len(found.projections)), labels=[short(name) for name in found.projections])
    axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xticks([x + 0.5 for x in range(len(found.projections) - 1)], minor=True)
    axes.grid(which="minor", axis="x", color="0.8", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.set(ylabel="layer", xlabel="columns of what it reads")
    return image


def _draw_sizes(axes: Any, found: Outliers) -> None:
    sizes = {
        label: torch.cat([linear.largest for linear in found.linears if linear.projection in names] or [torch.zeros(0)])
        for label, names in _KINDS.items()
    }
    visible = torch.cat(list(sizes.values()))
    visible = visible[visible > 0]
    low = math.floor(math.log10(min(float(visible.min()) if len(visible) else 1.0, found.threshold)))
    high = math.ceil(math.log10(max(float(visible.max()) if len(visible) else 1.0, 1.01 * found.threshold)))
    edges = torch.logspace(low, high, (high - low) * _BINS_A_DECADE + 1, dtype=torch.float64).tolist()
    for label, values in sizes.items():
        if len(values):
            count = int((values >= found.threshold).sum())
            axes.hist(
                values.tolist(),
                bins=edges,
                histtype="step",
                linewidth=1.6,
                label=f"{label}: {count:,} of {len(values):,}",
            )
    axes.axvline(found.threshold, color="black", linewidth=1, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="largest |x| of a column", ylabel="columns")
    axes.set_ylim(bottom=0.7)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="columns with outliers, as read by", title_fontsize=8, frameon=False)
