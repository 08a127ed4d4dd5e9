"""A step of LoRA training on the CPU, minillm beside transformers + peft: tokens a second, and the peak of memory.

    python scripts/bench/training.py                                  160 M parameters, adapters on every linear
    python scripts/bench/training.py --shape tinyllama                1.1 B, q and v, blocks recomputed
    python scripts/bench/training.py --only int8 --rounds 5 --save

One step: forward, loss of every token, backward, clipping, AdamW. Each measurement is a process of its own; rounds go
over all of them in turn, and medians count. Both start from one random checkpoint, train the same adapters (rank 16, no
dropout) in the same format, and count the same tokens. On quantised bases peft runs as its documentation has it
(`prepare_model_for_kbit_training`).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import inference
import tyro
from rich.console import Console
from rich.table import Table

SHAPES: dict[str, dict[str, Any]] = {
    "160m": {"rows": 2, "tokens": 512, "targets": "all-linear", "recompute": False},
    "tinyllama": {"rows": 1, "tokens": 256, "targets": ["q_proj", "v_proj"], "recompute": True},
}
KINDS = ("fp32", "bf16", "int8", "nf4")


@dataclass
class Training:
    """Measure a training step of both."""

    shape: Literal["160m", "tinyllama"] = "160m"
    """160m: width 768, 12 layers, 2 rows of 512 tokens; tinyllama: width 2048, 22 layers, 1 row of 256, recomputed."""
    only: tuple[str, ...] = ()
    """Parts of names (minillm, peft, int8 ...); all if none."""
    rounds: int = 3
    """Measurements of each; the median counts."""
    steps: int = 3
    """Steps that are timed, after one that is not."""
    recompute: bool | None = None
    """Activation checkpointing; as the shape has it where not given."""
    peers_python: str = sys.executable
    """The interpreter that has peft and bitsandbytes."""
    files: Path | None = None
    """Where the random checkpoint is kept; a temporary folder if not said."""
    save: bool = False
    """Keep the result as JSON in scripts/bench/results."""


def main(args: Training) -> dict[str, Any]:
    """Measure all in turn, print the table, return what the JSON line holds."""
    import random

    shape = SHAPES[args.shape]
    names = [f"{library}-{kind}" for kind in KINDS for library in ("minillm", "peft")]
    names = [name for name in names if not args.only or any(part in name for part in args.only)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint(args, args.files or Path(scratch))
        draw = random.Random(0)
        ids = [[draw.randrange(32_000) for _ in range(shape["tokens"])] for _ in range(shape["rows"])]
        recompute = shape["recompute"] if args.recompute is None else args.recompute
        job = json.dumps({"ids": ids, "steps": args.steps, "targets": shape["targets"], "recompute": recompute})
        rounds: list[dict[str, Any]] = []
        for number in range(args.rounds):
            rounds.append({})
            for name in names:
                inference.say(f"round {number + 1} of {args.rounds}: {name}")
                rounds[-1][name] = called(args, *name.split("-"), str(folder), job)
    found = {
        name: {key: statistics.median(each[name][key] for each in rounds) for key in rounds[0][name]} for name in names
    }
    result = {"args": vars(args) | {"files": None, "peers_python": None}, "found": found, "rounds": rounds}
    Console(highlight=False).print(table(found, args.shape))
    if args.save:
        (inference.HERE / "results" / f"training-{args.shape}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def checkpoint(args: Training, files: Path) -> Path:
    """Random weights of the shape."""
    name: Any = "small" if args.shape == "160m" else args.shape
    return inference.random_checkpoint(inference.Bench(shape=name, layers=None), files)


def called(args: Training, *rest: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    python = sys.executable if rest[0] == "minillm" else args.peers_python
    done = subprocess.run(
        [python, str(inference.HERE / "trainers.py"), *rest], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{'-'.join(rest[:2])}: {done.stderr.strip().splitlines()[-1][:300]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(found: dict[str, dict[str, float]], shape: str) -> Table:
    """Rates, peaks, and minillm's ratios to peft in the same format."""
    drawn = Table(
        "", "tok/s", "×", "peak GB", "×", "first loss", title=f"{shape}; ×: minillm's rate, and peak, over peft's"
    )
    for name, each in found.items():
        other = found.get(name.replace("minillm", "peft"))
        ours = name.startswith("minillm") and other is not None
        rate = f"{each['rate'] / other['rate']:.2f}" if ours and other else ""
        peak = f"{each['peak'] / other['peak']:.2f}" if ours and other else ""
        drawn.add_row(name, f"{each['rate']:.0f}", rate, f"{each['peak']:.2f}", peak, f"{each['first']:.4f}")
    return drawn


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Training, description=__doc__))))
