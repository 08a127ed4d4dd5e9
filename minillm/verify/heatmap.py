"""A report as a picture: where each side leaves the formula, and how far rounding has carried it.

above   layer x operation, ours beside theirs: error / allowed of each operation on its own inputs. Blue is rounding;
        from 1 on, where rounding ends, the colour jumps to orange. What comes before and after the layers stands
        left and right of them, as high as all. Hatched: not recorded. The first fault is circled.
below   drift of what leaves each layer from a float64 run of the whole model, and of ours from theirs; relative
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minillm.atomic import atomic_file
from minillm.errors import InputError
from minillm.verify.compare import Result
from minillm.verify.report import Report
from minillm.verify.table import leaves, place, ratio

_SIDES: tuple[Literal["ours", "theirs"], ...] = ("ours", "theirs")
_DECADES = 3  # of error / allowed that the colours tell apart, on either side of 1
_INCHES = {"layer": 0.14, "least": 1.2, "most": 9.0, "width": 12.0, "around": 1.6, "drift": 2.4}


def draw(report: Report, path: str | Path) -> None:
    """Write the PNG. Raises InputError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('drawing needs matplotlib; pip install "minillm[plot]"') from error
    grid = _Grid.of(report.results)
    height = min(max(_INCHES["layer"] * grid.layers, _INCHES["least"]), _INCHES["most"])
    size = (_INCHES["width"], height + _INCHES["around"] + _INCHES["drift"])
    figure = Figure(figsize=size, layout="constrained")  # no pyplot: no window system, nothing global
    figure.suptitle(_title(report), fontsize=11)
    axes = figure.subplot_mosaic([["ours", "theirs"], ["drift", "drift"]], height_ratios=[height, 1.4])
    for side in _SIDES:
        image = _draw_side(axes[side], report, grid, side)
    axes["ours"].set_ylabel("layer")
    axes["theirs"].tick_params(labelleft=False)
    bar = figure.colorbar(
        image, ax=[axes[side] for side in _SIDES], extend="both", pad=0.01, aspect=max(12, 5 * height)
    )
    bar.set_label("error / allowed")
    decades = range(-_DECADES, _DECADES + 1)
    bar.set_ticks([*decades], labels=[f"$10^{{{n}}}$" if n else "1" for n in decades])
    _draw_drift(axes["drift"], report.results)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _title(report: Report) -> str:
    what = ", ".join(
        [f"{report.ours} against {report.theirs}", *(f"{key} {value}" for key, value in report.about.items())]
    )
    first = report.first
    found = "no operation differs beyond rounding" if first is None else f"first fault: {first.what}, {first.side}"
    return f"{textwrap.fill(what, 120)}\n{found}"


# --- layer x operation


class _Grid(NamedTuple):
    """Columns: operations before the layers, of a layer, after them, with an empty one between. Rows: layers."""

    before: tuple[str, ...]
    within: tuple[str, ...]
    after: tuple[str, ...]
    layers: int

    @staticmethod
    def of(results: Iterable[Result]) -> _Grid:
        parts: dict[str, dict[str, None]] = {"before": {}, "within": {}, "after": {}}  # dict: a set that keeps order
        layers = 1
        for result in results:
            where, layer = place(result.operation), result.operation.layer
            parts[where if layer is None else "within"][result.operation.short] = None
            layers = max(layers, 0 if layer is None else layer + 1)
        return _Grid(*(tuple(names) for names in parts.values()), layers)  # type: ignore[call-arg, arg-type]

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
        if place(result.operation) == "before":
            return slice(0, self.layers), self.before.index(short)
        return slice(0, self.layers), self.gaps[1] + 1 + self.after.index(short)


def _draw_side(axes: Any, report: Report, grid: _Grid, side: Literal["ours", "theirs"]) -> Any:
    from numpy import full, ma, nan

    shades = full((grid.layers, len(grid.names)), nan)
    missing = False
    for result in report.results:
        errors = getattr(result, side)
        missing |= errors is None
        shades[grid.cells(result)] = nan if errors is None else _shade(ratio(errors))
    scale = {"cmap": _colours(), "vmin": -_DECADES, "vmax": _DECADES}
    image = axes.imshow(ma.masked_invalid(shades), aspect="auto", interpolation="none", **scale)
    axes.patch.set(facecolor="0.93", edgecolor="0.6", hatch="////", linewidth=0)
    _draw_lines(axes, grid)
    axes.set_title(f"{side}: {getattr(report, side)}" + (" (hatched: not recorded)" if missing else ""), fontsize=10)
    named = {n: name for n, name in enumerate(grid.names) if name}
    axes.set_xticks([*named], labels=[*named.values()])
    axes.tick_params(axis="x", labelrotation=90, labelsize=8)
    axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for result in report.results:
        first = report.first
        if first is not None and not first.backward and (first.side, first.operation) == (side, result.operation.name):
            _circle(axes, *grid.cells(result))
    return image


def _draw_lines(axes: Any, grid: _Grid) -> None:
    """White between cells; the two empty columns white."""
    style = {"color": "white", "linewidth": 0.5, "zorder": 2}
    axes.hlines([row + 0.5 for row in range(grid.layers - 1)], *(gap + 0.0 for gap in grid.gaps), **style)
    for column in range(1, len(grid.names)):
        axes.axvline(column - 0.5, **style)
    for gap in grid.gaps:
        axes.axvspan(gap - 0.5, gap + 0.5, facecolor="white", zorder=2)


def _circle(axes: Any, rows: slice, column: int) -> None:
    middle = (rows.start + rows.stop - 1) / 2
    for colour, width in (("white", 4.5), ("black", 2.0)):
        style = {"fillstyle": "none", "color": colour, "markeredgewidth": width, "markersize": 17, "zorder": 3}
        axes.plot(column, middle, "o", clip_on=False, **style)


def _shade(times: float) -> float:
    """log10, within what the colours can tell.

    >>> _shade(0.0), _shade(0.1), _shade(float("inf"))
    (-3.0, -1.0, 3.0)
    """
    return min(max(math.log10(times), -_DECADES), float(_DECADES)) if times > 0 else float(-_DECADES)


def _colours() -> Any:
    """Blues that pale up to 1, then orange and reds that darken: a jump in the middle."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from numpy import linspace, vstack

    rounding, fault = colormaps["Blues_r"](linspace(0.4, 0.93, 128)), colormaps["YlOrRd"](linspace(0.5, 1, 128))
    return ListedColormap(vstack([rounding, fault]))


# --- drift


def _draw_drift(axes: Any, results: Sequence[Result]) -> None:
    rows = [r for r in results if leaves(r.operation) and r.operation.name != "embed"]
    series = {
        ("ours, from float64", "tab:blue", "-", 3.0): [r.ours.chain if r.ours else None for r in rows],
        ("theirs, from float64", "tab:orange", "--", 1.5): [r.theirs.chain if r.theirs else None for r in rows],
        ("ours from theirs", "0.4", ":", 1.5): [r.between.relative if r.between else None for r in rows],
    }
    visible = [x for values in series.values() for x in values if x and math.isfinite(x)] or [1.0]
    top = 10.0 ** math.ceil(math.log10(2 * max(visible)))
    for (label, colour, line, width), values in series.items():
        beyond = [n for n, x in enumerate(values) if x is not None and not math.isfinite(x)]
        if beyond:
            label += " (x: not finite)"
            axes.plot(beyond, [top] * len(beyond), "x", color=colour, markersize=4 * width, clip_on=False, zorder=3)
        if any(values):  # equal bits have no logarithm
            found = [x if x and math.isfinite(x) else math.nan for x in values]
            style = {"linestyle": line, "linewidth": width, "marker": ".", "markersize": 4 * width}
            axes.plot(found, color=colour, label=label, **style)
    axes.set(yscale="log", ylim=(10.0 ** math.floor(math.log10(min(visible))), top))
    axes.minorticks_off()
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(rows) <= 20 * step)
    names = [r.operation.name.removeprefix("blocks.") for r in rows]
    ticks = [
        n
        for n, row in enumerate(rows)
        if row.operation.layer is None or (n % step == 0 and n + step // 2 < len(rows) - 1)
    ]
    axes.set_xticks(ticks, labels=[names[n] for n in ticks])
    axes.set(ylabel="drift", xlabel="behind layer", xlim=(-0.5, len(rows) - 0.5))
    axes.grid(alpha=0.3)
    if any(map(any, series.values())):
        axes.legend(fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
