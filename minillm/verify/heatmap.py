"""A report as a picture: where each side leaves the formula, and how far rounding has carried it.

above   layer x operation, ours beside theirs: error / allowed of each operation on its own inputs. Blue is rounding;
        from 1 on, where rounding ends, the colour jumps to orange. What comes before and after the layers stands
        left and right of them, as high as all. Hatched: not recorded. The first fault is circled.
below   drift of what leaves each layer from a float64 run of the whole model, and of ours from theirs
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minillm.atomic import atomic_file
from minillm.errors import InputError
from minillm.verify.compare import Result
from minillm.verify.report import Report
from minillm.verify.table import by_layer, leaves, place, ratio

_SIDES: tuple[Literal["ours", "theirs"], ...] = ("ours", "theirs")
_DECADES = 3  # of error / allowed that the colours tell apart, on either side of 1
_GRAPHS = {"ours": ("tab:blue", "-"), "theirs": ("tab:orange", "--"), "apart": ("0.45", ":")}


def draw(report: Report, path: str | Path) -> None:
    """Write the PNG. Raises InputError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('drawing needs matplotlib; pip install "minillm[plot]"') from error
    grid = _Grid.of(report.results)
    height = min(max(0.14 * grid.layers, 1.2), 9.0)
    figure = Figure(figsize=(12, height + 4.2), layout="constrained")  # no pyplot: no window system, nothing global
    figure.suptitle(_title(report), fontsize=11)
    axes = figure.subplot_mosaic(
        [["ours", "theirs"], ["drift", "drift"]], height_ratios=[height + 0.4, 2.0], gridspec_kw={"hspace": 0.08}
    )
    for side in _SIDES:
        image = _draw_side(axes[side], report, grid, side)
    axes["theirs"].tick_params(labelleft=False)
    axes["ours"].set_ylabel("layer")
    bar = figure.colorbar(
        image, ax=[axes[side] for side in _SIDES], extend="both", pad=0.01, aspect=max(5 * height, 12)
    )
    bar.set_label("error / allowed")
    bar.set_ticks([*range(-_DECADES, _DECADES + 1)], labels=[f"$10^{{{n}}}$" if n else "1" for n in range(-3, 4)])
    _draw_drift(axes["drift"], report)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


class _Grid(NamedTuple):
    """Columns of the picture: operations before the layers, of a layer, after them; one empty column between."""

    before: tuple[str, ...]
    within: tuple[str, ...]
    after: tuple[str, ...]
    layers: int

    @staticmethod
    def of(results: Iterable[Result]) -> _Grid:
        parts: dict[str, dict[str, None]] = {"before": {}, "within": {}, "after": {}}  # dict: a set that keeps order
        layers = 0
        for result in results:
            where, layer = place(result.operation), result.operation.layer
            parts[where if layer is None else "within"][result.operation.short] = None
            layers = max(layers, 0 if layer is None else layer + 1)
        return _Grid(*(tuple(names) for names in parts.values()), max(layers, 1))

    @property
    def gaps(self) -> tuple[int, int]:
        return len(self.before), len(self.before) + 1 + len(self.within)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.before, "", *self.within, "", *self.after)

    def cells(self, result: Result) -> tuple[slice, int]:
        """(rows, column) of an operation: one row, or all where it belongs to no layer."""
        layer, short = result.operation.layer, result.operation.short
        if layer is not None:
            return slice(layer, layer + 1), self.gaps[0] + 1 + self.within.index(short)
        column = self.before.index(short) if place(result.operation) == "before" else self.after.index(short)
        return slice(0, self.layers), column if place(result.operation) == "before" else self.gaps[1] + 1 + column


def _draw_side(axes: Any, report: Report, grid: _Grid, side: Literal["ours", "theirs"]) -> Any:
    from numpy import full, ma, nan

    shades = full((grid.layers, len(grid.names)), nan)
    for result in report.results:
        errors = getattr(result, side)
        if errors is not None:
            shades[grid.cells(result)] = _shade(ratio(errors))
    axes.patch.set(facecolor="0.93", edgecolor="0.7", hatch="////", linewidth=0)
    image = axes.imshow(
        ma.masked_invalid(shades), cmap=_colours(), vmin=-_DECADES, vmax=_DECADES, aspect="auto", interpolation="none"
    )
    for column in grid.gaps:
        axes.axvspan(column - 0.5, column + 0.5, facecolor="white", zorder=2)
    for line in range(1, len(grid.names)):
        axes.axvline(line - 0.5, color="white", linewidth=0.6, zorder=2)
    axes.set_title(f"{side}: {getattr(report, side)}", fontsize=10)
    axes.set_xticks([n for n, name in enumerate(grid.names) if name], labels=[name for name in grid.names if name])
    axes.tick_params(axis="x", labelrotation=90, labelsize=8)
    axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _circle(axes, report, grid, side)
    return image


def _circle(axes: Any, report: Report, grid: _Grid, side: str) -> None:
    first = report.first
    if first is None or first.side != side:
        return
    for result in report.results:
        if result.operation.name == first.operation:
            rows, column = grid.cells(result)
            middle = (rows.start + rows.stop - 1) / 2
            for colour, width in (("white", 5), ("black", 2)):
                axes.plot(
                    column,
                    middle,
                    "o",
                    markersize=17,
                    fillstyle="none",
                    color=colour,
                    markeredgewidth=width,
                    clip_on=False,
                )


def _shade(times: float) -> float:
    """log10, within what the colours can tell.

    >>> _shade(0.0), _shade(0.1), _shade(float("inf"))
    (-3.0, -1.0, 3.0)
    """
    return min(max(math.log10(times), -_DECADES), _DECADES) if times > 0 else float(-_DECADES)


def _colours() -> Any:
    """Blues that pale up to 1, then oranges and reds that darken: a jump in the middle."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from numpy import linspace, vstack

    return ListedColormap(
        vstack([colormaps["Blues_r"](linspace(0.2, 0.95, 128)), colormaps["YlOrRd"](linspace(0.5, 1, 128))])
    )


def _draw_drift(axes: Any, report: Report) -> None:
    rows = [
        (label, next((r for r in results if leaves(r.operation)), results[-1]))
        for label, results in by_layer(report.results)
    ]
    series: dict[str, Sequence[float]] = {
        side: [nan_if_none(getattr(result, side), "chain") for _, result in rows] for side in _SIDES
    }
    series["apart"] = [nan_if_none(result.between, "relative") for _, result in rows]
    labels = {"ours": "ours, from float64", "theirs": "theirs, from float64", "apart": "ours from theirs"}
    for name, (colour, style) in _GRAPHS.items():
        axes.plot(
            [x if 0 < x < math.inf else math.nan for x in series[name]],
            style, marker=".", color=colour, label=labels[name],
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylabel("relative")
    axes.set_xlabel("leaving layer")
    axes.grid(alpha=0.3)
    axes.legend()


def nan_if_none(errors: Any, field: str) -> float:
    return math.nan if errors is None else getattr(errors, field)


def _title(report: Report) -> str:
    first = report.first
    found = "no operation is outside its bound" if first is None else f"first fault: {first.operation}, {first.side}"
    return ", ".join(chain((f"{report.ours} against {report.theirs}",), report.about.values())) + f"\n{found}"
