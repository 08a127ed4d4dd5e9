"""What keeping outlier columns in float buys: held-out perplexity as outliers grow (LLM.int8(), arXiv 2208.07339 §4).

    python scripts/bench/outliers.py                            the model of scripts/demo.sh, in runs/demo: one minute
    python scripts/bench/outliers.py --model runs/mine --channels 2 --output scripts/bench/results

A small model has hardly an outlier in its residual stream, so they are planted: in every layer the same channels of
what the norms put out become a times as large, and the weights that read them a times as small (`minillm.quant.plant`).
The float model stays what it was. Then the same held-out text is read five times:

    float          as trained
    split          int8, columns with |x| >= threshold in float: their weights are int8 too, as bitsandbytes has it
    exact split    the same with float weights for those columns, as the paper's eq. 8 has it
    no split       int8 throughout
    weights only   weights rounded to int8, activations left alone: what is lost there no split of activations saves

Beside perplexity stands KL(float || int8), mean, nats a token: perplexity may fall by chance, a divergence may not.
Written into --output: outliers.json and outliers.png.
"""

from __future__ import annotations

import copy
import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer as Pipeline
from torch import Tensor, nn

from minillm import Decoder, load_model
from minillm.atomic import atomic_file, write_atomically
from minillm.data.bpe import bytes_per_token
from minillm.data.corpus import Windows, read_text
from minillm.errors import InputError
from minillm.ops import int8
from minillm.quant.convert import HEAD, Quantisation, quantize_linears, skipped
from minillm.quant.outlier_table import percent
from minillm.quant.outliers import STREAM, find
from minillm.quant.plant import plant
from minillm.training.evaluate import held_out
from minillm.training.recipe import run


@dataclass(frozen=True)
class Outliers:
    """Plant outliers of growing size into a trained model, and measure it in float and in int8."""

    model: Path = Path("runs/demo")
    """Folder that scripts/pretrain.py wrote."""
    amounts: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    """Factors to plant; powers of two leave the float model the same to the bit."""
    channels: int = 6
    """Channels planted in each norm, the same in every layer; 6 are what the paper finds in models of 6.7 B."""
    threshold: float = int8.THRESHOLD
    """|x| from which the split keeps a column."""
    windows: int = 32
    """Windows of held-out text to read, evenly spread."""
    output: Path = Path("runs/outliers")
    """Where outliers.json and outliers.png go."""
    seed: int = 0
    """Of the channels."""


class SplitExactly(nn.Module):
    """The paper's eq. 8: outlier columns times the float weights, the rest in int8."""

    def __init__(self, linear: nn.Linear, threshold: float) -> None:
        super().__init__()
        self.linear, self.threshold = linear, threshold
        self.rounded = int8.Weight(*int8.quantise(linear.weight.detach())[:2])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (M, K)
        keep = (rows.abs() >= self.threshold).any(dim=0)
        y = int8.linears(rows.masked_fill(keep, 0), [self.rounded], math.inf)[0]
        y = y + rows[:, keep] @ self.linear.weight[:, keep].T
        y = y if self.linear.bias is None else y + self.linear.bias
        return y.reshape(*x.shape[:-1], -1)


class RoundedWeights(nn.Module):
    """Weights rounded to int8, activations left alone."""

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = int8.dequantise(*int8.quantise(linear.weight.detach())[:2], linear.weight.dtype)
        self.register_buffer("weight", weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


Change = Callable[[Decoder, float], object]
#: How each curve changes the (planted) model, given the threshold.
WAYS: dict[str, Change] = {
    "float": lambda model, threshold: None,
    "split": lambda model, threshold: quantize_linears(model, Quantisation("int8", threshold)),
    "exact split": lambda model, threshold: swap(model, lambda linear: SplitExactly(linear, threshold)),
    "no split": lambda model, threshold: quantize_linears(model, Quantisation("int8", 0.0)),
    "weights only": lambda model, threshold: swap(model, RoundedWeights),
}


def swap(model: Decoder, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put another layer in the place of each linear but the head."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in linears.items():
        if not skipped(name, HEAD):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(linear))


def main(args: Outliers) -> dict[str, Any]:
    """Measure, print the table, write JSON and picture; returns what the JSON line holds."""
    model = load_model(_folder(args.model), dtype="float32")
    windows, sizes = read_held_out(args.model, model.config.context)
    rows = torch.stack([windows.window(i * len(windows) // 4) for i in range(min(4, len(windows)))])
    say = Console(stderr=True, highlight=False).print
    points = []
    for amount in args.amounts:
        say(f"planting x {amount:g}")
        planted = copy.deepcopy(model)
        plant(planted, amount, channels=args.channels, seed=args.seed)
        found = find(planted, rows, threshold=args.threshold)
        stream = [linear for linear in found.linears if linear.projection in STREAM]
        point: dict[str, Any] = {"amount": amount, "largest": max(float(x.largest.max()) for x in stream)}
        point["kept"] = sum(linear.kept for linear in stream) / len(stream)
        for name, change in WAYS.items():
            changed = copy.deepcopy(planted)
            change(changed, args.threshold)
            score = held_out(changed, windows, sizes, most=args.windows)
            point[name] = {"perplexity": score.perplexity, "divergence": divergence(model, changed, rows)}
        points.append(point)
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    result = {**arguments, "machine": machine(), "points": points}
    Console(highlight=False).print(table(points))
    args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output / "outliers.json", json.dumps(result, indent=1) + "\n")
    picture = args.output / "outliers.png"
    if not draw(points, picture, args):
        say('no picture: matplotlib is not installed (pip install -e ".[plot]")')
    return result


def _folder(folder: Path) -> Path:
    if not (folder / "training.json").is_file():
        raise InputError(f"{folder}: holds no model of scripts/pretrain.py; make one: bash scripts/demo.sh")
    return folder


def read_held_out(folder: Path, context: int) -> tuple[Windows, Tensor]:
    """The files that the run of this folder was not trained on; and (V,) bytes of each token."""
    recipe = json.loads((folder / "training.json").read_text())["recipe"]
    pipeline = Pipeline.from_file(str(folder / "tokenizer.json"))
    chosen = {"suffixes": recipe["suffixes"], "leave_out": recipe["leave_out"]} if recipe["text"] else {}
    where = Path(recipe["text"]) if recipe["text"] else None
    text = read_text(where, held_out=recipe["held_out"], vocabulary=pipeline, **chosen)
    return Windows(text.held_out, context=context, seed=0), bytes_per_token(pipeline)


@torch.no_grad()
def divergence(model: nn.Module, other: nn.Module, rows: Tensor) -> float:
    """KL(model || other), mean over the next tokens of rows (B, T), nats."""
    ours, theirs = (m(rows).double().log_softmax(dim=-1) for m in (model, other))  # (B, T, V)
    return float((ours.exp() * (ours - theirs)).sum(dim=-1).mean())


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    return {"processor": platform.machine(), "torch": torch.__version__, "python": platform.python_version()}


def table(points: list[dict[str, Any]]) -> Table:
    """Perplexities by amount, and the divergence of the two that the claim is about; 80 columns are enough."""
    shown = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    shown.title = "Held-out perplexity, and KL from the float model in nats a token"
    headings = ("a", "largest\n|x|", "kept", *(name.replace(" ", "\n") for name in WAYS), "KL,\nsplit", "KL,\nno split")
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for point in points:
        shares = (f"{point['amount']:g}", f"{point['largest']:,.4g}", percent(point["kept"]))
        scores = [f"{point[name]['perplexity']:,.{2 if point[name]['perplexity'] < 1000 else 0}f}" for name in WAYS]
        apart = [f"{point[name]['divergence']:.1e}" for name in ("split", "no split")]
        shown.add_row(*shares, *scores, *apart)
    return shown


def draw(points: list[dict[str, Any]], path: Path, args: Outliers) -> bool:
    """Perplexity and divergence over the size of the outliers -> a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    styles: dict[str, dict[str, Any]] = {
        "float": {"color": "black", "linewidth": 5, "alpha": 0.25},
        "split": {"color": "tab:blue", "marker": "o", "label": f"int8, split at {args.threshold:g}"},
        "exact split": {"color": "tab:green", "marker": "^", "label": "int8, split with float weights (eq. 8)"},
        "no split": {"color": "tab:red", "marker": "s", "label": "int8, no split"},
        "weights only": {"color": "0.3", "linestyle": ":", "label": "int8 weights, float activations"},
    }
    figure = Figure(figsize=(11, 4.6), layout="constrained")  # no pyplot: no window system, nothing global
    figure.suptitle(f"Outliers planted in {args.channels} channels of {args.model.name}", fontsize=11)
    left, right = figure.subplots(1, 2)
    amounts = [point["amount"] for point in points]
    for name, style in styles.items():
        style = {"markersize": 4, "label": name, **style}
        left.plot(amounts, [point[name]["perplexity"] for point in points], **style)
        if name != "float":
            right.plot(amounts, [point[name]["divergence"] for point in points], **style)
    for axes, label in ((left, "held-out perplexity"), (right, "KL from the float model, nats a token")):
        axes.set(xscale="log", yscale="log", ylabel=label, xlabel="a, times as large", xticks=amounts)
        axes.set_xticks(amounts, labels=[f"{amount:g}" for amount in amounts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=8, frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)
    return True


if __name__ == "__main__":
    run(main, Outliers)
