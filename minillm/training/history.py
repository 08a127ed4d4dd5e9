"""A run's numbers, read back from its folder, be it finished, stopped, or still training.

metrics.jsonl ─or else─▶ training.json ─▶ History: for each number, where along the run it was taken, and its value
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minillm.errors import InputError
from minillm.training.metrics import METRICS, read_lines
from minillm.training.output import FINISHED

#: What runs along the x axis.
X = Literal["step", "tokens", "minutes"]
_ALONG = ("step", "tokens", "seconds")  # numbers that say where in the run a line is, and nothing about the model


@dataclass(frozen=True)
class History:
    """series: for each number (loss, held_out, learning_rate ...) its places along x and its values, of equal length.

    step: the last one made; finished: whether a model or an adapter lies in the folder.
    """

    name: str
    series: dict[str, tuple[list[float], list[float]]]
    step: int
    finished: bool


def read_histories(folders: Sequence[Path], x: X = "step") -> list[History]:
    """The runs in these folders, named by as much of their paths as tells them apart."""
    return [read_history(folder, x, name) for folder, name in zip(folders, short_names(folders), strict=True)]


def read_history(folder: Path, x: X = "step", name: str | None = None) -> History:
    """The run in `folder`. Raises InputError where there is none, none of its lines has a number, or none says `x`."""
    lines = _lines(folder)
    along = "seconds" if x == "minutes" else x
    if not any(along in line for line in lines):
        raise InputError(f"{folder}: its lines do not say {along}; choose --x step")
    series: dict[str, tuple[list[float], list[float]]] = {}
    at = 0.0  # a line that does not say how far the run is was written where the one before was
    for line in lines:
        at = float(line.get(along, at))
        for key, value in line.items():
            if key not in _ALONG and _is_number(value):
                places, values = series.setdefault(key, ([], []))
                places.append(at / 60 if x == "minutes" else at)
                values.append(float(value))
    if not series:
        raise InputError(f"{folder}: no step is finished yet; try again in a moment")
    finished = any((folder / each).is_file() for each in FINISHED)
    return History(name or folder.name, series, max(line["step"] for line in lines), finished)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell them apart.

    >>> short_names([Path("runs/a/sft"), Path("runs/b/sft")]), short_names([Path("runs/demo")])
    (['a/sft', 'b/sft'], ['demo'])
    """
    parts = [folder.resolve().parts for folder in folders]
    count, most = 1, max(map(len, parts), default=1)
    while count < most and len({each[-count:] for each in parts}) < len(set(parts)):
        count += 1
    return ["/".join(each[-count:]) for each in parts]


def _lines(folder: Path) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the --output of a run")
    if (folder / METRICS).is_file():
        return read_lines(folder / METRICS) or [{"step": 0}]
    if not (folder / "training.json").is_file():
        raise InputError(f"{folder}: holds no {METRICS} and no training.json; give the --output of a run")
    try:
        return _lines_of_old(json.loads((folder / "training.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}/training.json: is not what a run writes ({error!r:.80})") from error


def _lines_of_old(run: dict[str, Any]) -> list[dict[str, Any]]:
    """What metrics.jsonl would hold, from training.json: one loss a step, the rest spread evenly."""
    steps = max(len(run["losses"]), 1)
    each = {key: run[key] / steps for key in ("tokens", "seconds") if key in run}
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": loss, **{key: step * share for key, share in each.items()}}
        for step, loss in enumerate(run["losses"], 1)
    ]
    lines += [{"step": step, "held_out": loss} for step, loss in run["evaluated"]]
    return sorted(lines, key=lambda line: (line["step"], "held_out" in line))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
