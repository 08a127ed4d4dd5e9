"""Merge an adapter into its model: a folder without adapters that transformers loads, and what the merging lost.

    python scripts/merge.py --model FOLDER --adapter runs/sft --output runs/merged

W' = W + s B A is computed in fp32 and rounded once to the model's format; how much of the change that rounding loses is
said for every layer. A quantised model is merged in floating point: its codes stay as they are on the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from minillm import load, lora, save
from minillm.errors import InputError
from minillm.training.recipe import run


@dataclass(frozen=True)
class Merge:
    """Which adapter into which model."""

    model: str
    """Folder or id of the base."""
    adapter: Path
    """Folder of the adapter."""
    output: Path
    """Where the merged model goes."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Format of the merged weights; auto is the checkpoint's own."""
    overwrite: bool = False
    """Write where a model lies already."""


def main(recipe: Merge) -> dict[str, Any]:
    """Load, merge, compare, save."""
    if (recipe.output / "config.json").exists() and not recipe.overwrite:
        raise InputError(f"{recipe.output}: holds a model; give --overwrite, or another --output")
    model, tokenizer = load(recipe.model, dtype=None if recipe.dtype == "auto" else recipe.dtype)
    lora.load(model, recipe.adapter)
    tokens = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    made = lora.merged(model, tokens=tokens)
    drawn = Table("layer", "|ΔW| / |W|", "lost in rounding", title="of the change, layer by layer")
    for name, change in made.layers.items():
        drawn.add_row(name, f"{change.size:.2%}", f"{change.lost:.2e}")
    Console(stderr=True, highlight=False).print(drawn)
    save(made.model, recipe.output, tokenizer=tokenizer)
    return {
        "output": str(recipe.output),
        "layers": len(made.layers),
        "most_lost": max((change.lost for change in made.layers.values()), default=0.0),
        "logits_max": made.logits_max,
        "logits_mean": made.logits_mean,
    }


if __name__ == "__main__":
    run(main, Merge)
