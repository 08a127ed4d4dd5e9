"""What the benchmark makes of its figures: medians, ratios, the bounds that the machine sets, a table, a chart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

#: Figure -> unit, and whether more is better.
FIGURES = {
    "load": ("s", False),
    "first": ("s", False),
    "peak": ("GB", False),
    "prefill": ("tok/s", True),
    "decode": ("tok/s", True),
    "batch": ("tok/s", True),
}
#: Bits of a weight -> the one of ours that its peers are compared with.
OURS = {32: "minillm-fp32", 16: "minillm-bf16", 8: "minillm-int8", 4: "minillm-nf4"}
#: Bits of a weight -> the products that can serve it: 4 bits are widened to 8.
RATES = {32: "fp32_gops", 16: "bf16_gops", 8: "int8_gops", 4: "int8_gops"}
Figures = Mapping[str, Any]


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure.

    >>> medians([{"decode": 1.0}, {"decode": 9.0}, {"decode": 2.0}])
    {'decode': 2.0}
    """
    return {key: statistics.median(run[key] for run in runs if key in run) for key in runs[0]}


def bounds(sizes: Mapping[str, int], limits: Mapping[str, float]) -> dict[int, dict[str, float]]:
    """Bits -> tokens a second that no engine passes on this machine.

    decode   read GB/s over the GB of all weights but the embedding, each read once
    prefill  10^9 operations/s over 2 for each number in the linears of the blocks (one product, one sum)
    """
    return {
        bits: {
            "decode": limits["read_gbs"] * 1e9 / ((sizes["linears"] + sizes["head"]) * bits / 8),
            "prefill": limits[rate] * 1e9 / (2 * sizes["linears"]),
        }
        for bits, rate in RATES.items()
    }


def ratios(peers: Mapping[str, Figures]) -> dict[str, dict[str, float]]:
    """Peer -> figure -> how many times better is ours of the same bits: above 1 is better, whichever way it points.

    >>> ratios({"minillm-int8": {"bits": 8, "decode": 30.0}, "x": {"bits": 8, "decode": 20.0}})
    {'x': {'decode': 1.5}}
    """
    found = {}
    for name, theirs in peers.items():
        ours = peers.get(OURS[theirs["bits"]])
        if ours is None or ours is theirs:
            continue
        both = [figure for figure in FIGURES if figure in ours and figure in theirs]
        found[name] = {
            figure: ours[figure] / theirs[figure] if FIGURES[figure][1] else theirs[figure] / ours[figure]
            for figure in both
        }
    return found


def table(result: Mapping[str, Any]) -> Table:
    """A row a peer, in groups of equal bits, each under what the machine allows; ratios last."""
    peers, limits, machine = result["peers"], result["limits"], result["machine"]
    shown = [figure for figure in FIGURES if any(figure in peer for peer in peers.values())]
    title = (
        f"{result['sizes']['all'] / 1e9:.2f} B weights · {machine['cpu']}, {machine['threads']} threads · reads "
        f"{limits['read_gbs']:.1f} GB/s · 10^9 operations/s: fp32 {limits['fp32_gops']:.0f}, "
        f"bf16 {limits['bf16_gops']:.0f}, int8 {limits['int8_gops']:.0f} · median of {len(result['rounds'])}"
    )
    drawn = Table(title=title, title_justify="left", caption="× how many times better minillm is, at the same bits")
    drawn.add_column("")
    for figure in shown:
        drawn.add_column(f"{figure}\n{FIGURES[figure][0]}", justify="right")
    drawn.add_column("r", justify="right")
    for figure in shown:
        drawn.add_column(f"{figure}\n×", justify="right")
    for bits in sorted({peer["bits"] for peer in peers.values()}, reverse=True):
        bound = result["bounds"][bits]
        drawn.add_section()
        drawn.add_row(f"limit, {bits} bits", *(_number(bound.get(figure)) for figure in shown), style="dim")
        for name, peer in peers.items():
            if peer["bits"] == bits:
                times = result["ratios"].get(name, {})
                figures = [_number(peer.get(figure)) for figure in shown]
                r = "" if peer["r"] is None else f"{peer['r']:.4f}"
                drawn.add_row(name, *figures, r, *(_number(times.get(figure)) for figure in shown))
    return drawn


def _number(value: float | None) -> str:
    """Three digits or more.

    >>> [_number(value) for value in (None, 0.126, 12.34, 123.4)]
    ['', '0.13', '12.3', '123']
    """
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Bars of decode and prefill; ours in colour, the machine's bound as a line over the bars of its bits."""
    from matplotlib.figure import Figure

    peers = result["peers"]
    shown = [figure for figure in ("decode", "prefill") if any(figure in peer for peer in peers.values())]
    figure = Figure(figsize=(6 * max(1, len(shown)), 0.34 * len(peers) + 1.4), layout="constrained")
    for axes, what in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        names = [name for name in peers if what in peers[name]]
        colours = ["tab:orange" if name in OURS.values() else "lightsteelblue" for name in names]
        bars = axes.barh(names, [peers[name][what] for name in names], color=colours)
        axes.bar_label(bars, [_number(peers[name][what]) for name in names], padding=3)
        for place, name in enumerate(names):
            limit = result["bounds"][peers[name]["bits"]][what]
            axes.vlines(limit, place - 0.5, place + 0.5, color="dimgrey", linestyle=":", linewidth=1.5)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"{what}, tokens/s (dotted: what the machine allows)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
