"""The course of one run or several as a picture.

┌──────────────────────────────────────┐   large: the loss, each step faint, smoothed over it, held-out points
│                                      │   small: learning rate, gradient norm, tokens a second, memory, and every
└──────────────────────────────────────┘          other number that the runs wrote, as reward or KL of PPO
┌────────┐ ┌────────┐ ┌────────┐ ┌─────┐   one colour a run
└────────┘ └────────┘ └────────┘ └─────┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from minillm.atomic import atomic_file
from minillm.errors import InputError, MinillmError
from minillm.training.history import History, X, read_history

#: Okabe and Ito's colours, which the colour-blind tell apart; beyond eight runs the dashes change.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_DASHES = ("-", "--", ":", "-.")
_HEADLINES = ("loss", "reward")  # the large panel shows the first that a run has
_FIRST = ("learning_rate", "gradient_norm", "tokens_per_second", "memory")
_TITLES = {
    "loss": "loss, nats a token",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens a second",
    "memory": "peak of memory, GB",
}
_LABELS = {"step": "step", "tokens": "tokens seen", "minutes": "minutes of training"}
_INCHES = {"width": 11.0, "large": 4.2, "small": 1.9, "around": 0.7, "legend": 0.22}
_SPARSE = 40  # a series of so few points shows each of them
_FEW = 3  # more runs are too many for strong single steps
_DECADES = 20.0  # a gradient norm that spans this factor is drawn on a logarithmic scale
_MOST = 4000  # points of a line: more than there are pixels


def draw(histories: Sequence[History], path: Path, *, x: X = "step", title: str = "") -> None:
    """Write the PNG; x is what the histories were read along.

    Raises InputError where matplotlib is not installed, CheckpointError where the disk does not take the picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('drawing needs matplotlib; pip install -e ".[plot]"') from error
    headline, others = panels(histories)
    columns = max(min((3, 4), key=lambda count: (-len(others) % count, -count)) if len(others) > 3 else len(others), 1)
    rows = -(-len(others) // columns)
    legend_rows = 1 if len(histories) == 1 else -(-len(histories) // _legend_columns(histories, headline)) + 1
    height = _INCHES["large"] + rows * _INCHES["small"] + _INCHES["around"] + _INCHES["legend"] * legend_rows
    figure = Figure(figsize=(_INCHES["width"], height), layout="constrained")  # no pyplot: no window, nothing global
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[_INCHES["large"], *[_INCHES["small"]] * rows])
    large = figure.add_subplot(grid[0, :])
    large.set_title(title, fontsize=12)
    _draw_headline(large, histories, headline, x)
    for place, key in enumerate(others):
        _draw_small(figure.add_subplot(grid[1 + place // columns, place % columns]), histories, key, x)
    _draw_legend(figure, histories, headline)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def draw_curve(folder: Path, *, title: str, say: Callable[[str], Any]) -> Path | None:
    """curve.png of the run in `folder`, as a recipe ends; where it cannot be drawn, a word to `say` and None."""
    try:
        draw([read_history(folder)], folder / "curve.png", title=title)
    except MinillmError as error:
        say(f"no curve: {error}")
        return None
    return folder / "curve.png"


def panels(histories: Sequence[History]) -> tuple[str, list[str]]:
    """What the large panel shows, and what the small ones do, in order."""
    keys = list(dict.fromkeys(key for history in histories for key in history.series))
    headline = next(key for key in (*_HEADLINES, *keys) if key in keys)
    rest = [key for key in keys if key not in (headline, *_FIRST, *(["held_out"] if headline == "loss" else []))]
    return headline, [key for key in _FIRST if key in keys and key != headline] + rest


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of the last 2% of the run up to each step, of 5 steps at least: single batches are too noisy to read."""
    width = max(len(values) // 50, min(len(values) // 8, 5), 1)
    sums = [0.0, *accumulate(values)]
    return [(sums[end] - sums[max(0, end - width)]) / min(end, width) for end in range(1, len(sums))]


def _draw_headline(axes: Any, histories: Sequence[History], key: str, x: X) -> None:
    for number, history in enumerate(histories):
        _draw_line(axes, history, key, number, width=1.8, faint=0.25 if len(histories) <= _FEW else 0.1)
        if key == "loss" and "held_out" in history.series:
            axes.plot(*history.series["held_out"], **_held_out(number, len(histories)))
    axes.set(xlabel=_LABELS[x], ylabel=_TITLES.get(key, key.replace("_", " ")))
    _tidy(axes, x)


def _draw_small(axes: Any, histories: Sequence[History], key: str, x: X) -> None:
    for number, history in enumerate(histories):
        _draw_line(axes, history, key, number, width=1.2, faint=0.25 if len(histories) <= _FEW else 0.1)
    values = [value for history in histories for value in history.series.get(key, ([], []))[1]]
    if key == "gradient_norm" and min(values) > 0 and max(values) > _DECADES * min(values):
        axes.set_yscale("log")
    elif min(values) >= 0 and max(values) > 0:
        axes.set_ylim(0, 1.06 * _shown(key, max(values)))
    axes.set_title(_TITLES.get(key, key.replace("_", " ")), fontsize=9, loc="left")
    _tidy(axes, x, key, size=8)


def _draw_line(axes: Any, history: History, key: str, number: int, *, width: float, faint: float) -> None:
    """A number of one run: as it is where it is calm or rare, else faint with its smoothed course."""
    places, values = history.series.get(key, ([], []))
    values = [_shown(key, value) for value in values]
    style = _style(number) | {"linewidth": width}
    if key in ("learning_rate", "memory"):
        axes.plot(*_thin(places, values), **style)
    elif len(values) <= _SPARSE:
        axes.plot(places, values, **style, marker="o", markersize=2 + width)
    else:
        axes.plot(*_thin(places, values), color=style["color"], alpha=faint, linewidth=0.6)
        axes.plot(*_thin(places, smooth(values)), **style)


def _style(number: int) -> dict[str, Any]:
    dashes = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": dashes}


def _held_out(number: int, runs: int) -> dict[str, Any]:
    """A single run's in a colour of its own; with several, the run's colour tells whose they are."""
    colour = _COLOURS[1] if runs == 1 else _COLOURS[number % len(_COLOURS)]
    look = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.8}
    return {"color": colour, "marker": "D", "linestyle": (0, (1, 1.5)), "linewidth": 1.2, "zorder": 3, **look}


def _draw_legend(figure: Any, histories: Sequence[History], headline: str) -> None:
    from matplotlib.lines import Line2D

    several = len(histories) > 1
    has_held_out = headline == "loss" and any("held_out" in history.series for history in histories)
    handles = []
    for number, history in enumerate(histories):
        handles.append(Line2D([], [], label=_label(history, headline), linewidth=1.8, **_style(number)))
    if has_held_out:
        style: dict[str, Any] = _held_out(0, len(histories)) | ({"color": "0.35"} if several else {})
        handles.append(Line2D([], [], label="held out", **style))
    columns = _legend_columns(histories, headline) if several else len(handles)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def _legend_columns(histories: Sequence[History], headline: str) -> int:
    longest = max(len(_label(history, headline)) for history in histories)
    return max(min(130 // (longest + 8), len(histories) + 1), 1)


def _label(history: History, headline: str) -> str:
    """`demo: loss 3.21, held out 3.40` with `, step 412, unfinished` where it is; the headline is smoothed."""
    parts = []
    if headline in history.series:
        parts.append(f"{headline.replace('_', ' ')} {smooth(history.series[headline][1])[-1]:#.4g}")
    if "held_out" in history.series:
        parts.append(f"held out {history.series['held_out'][1][-1]:#.4g}")
    if not history.finished:
        parts.append(f"step {history.step:,}, unfinished")
    return f"{history.name}: {', '.join(parts)}"


def _shown(key: str, value: float) -> float:
    """In the unit of the panel."""
    return value / 1e9 if key == "memory" else value


def _number(value: float, greatest: float) -> str:
    """For an axis whose greatest number is `greatest`.

    >>> _number(0.00025, 0.0003), _number(0.25, 1.0), _number(0.0, 0.0003)
    ('2.5e-4', '0.25', '0')
    """
    if value == 0 or greatest >= 0.01:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _tidy(axes: Any, x: X, key: str = "", *, size: int = 9) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=size, color="0.6")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(5 if key else 9, integer=x != "minutes"))
    if x != "minutes":
        axes.xaxis.set_major_formatter(
            EngFormatter(sep="") if x == "tokens" else FuncFormatter(lambda n, _: f"{n:,.0f}")
        )
    if key == "tokens_per_second":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif key:
        greatest = max(map(abs, axes.get_ylim()))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda n, _: _number(n, greatest)))
        if axes.get_yscale() == "log":
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda n, _: ""))


def _thin(places: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `_MOST` points that look the same: of each stretch its least and its greatest, in the order they came."""
    if len(values) <= _MOST:
        return list(places), list(values)
    width = -(-2 * len(values) // _MOST)
    chosen: list[int] = []
    for begin in range(0, len(values), width):
        stretch = range(begin, min(begin + width, len(values)))
        chosen += sorted({min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)})
    return [places[at] for at in chosen], [values[at] for at in chosen]
