"""The course of a run as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from minillm.atomic import atomic_file


def draw_curve(
    path: Path, losses: Sequence[float], held_out: Iterable[tuple[int, float]] = (), *, title: str, per_step: int = 1
) -> bool:
    """Loss over the tokens seen -> a PNG at `path`; False where matplotlib is not installed.

    losses: one a step; held_out: pairs of steps made and loss there; per_step: tokens in a step.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # no pyplot: no window system, nothing global
    axes = figure.subplots()
    seen = [per_step * (step + 1) for step in range(len(losses))]
    axes.plot(seen, losses, color="tab:blue", alpha=0.2, linewidth=0.5)
    axes.plot(seen, _smooth(losses), color="tab:blue", label="training, smoothed")
    points = [(per_step * step, loss) for step, loss in held_out]
    if points:
        axes.plot(*zip(*points, strict=True), "o-", color="tab:orange", markersize=4, label="held out")
    axes.set(xlabel="tokens seen", ylabel="loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True


def _smooth(losses: Sequence[float]) -> list[float]:
    """Mean of the last 2% of the run up to each step: single batches are too noisy to read."""
    width = max(len(losses) // 50, 1)
    sums = [0.0, *accumulate(losses)]
    return [(sums[end] - sums[max(0, end - width)]) / min(end, width) for end in range(1, len(sums))]
