"""What a prompt's files hold, with or without its base: sizes, how long the virtual tokens are, in which directions.

part              rows of P numbers' length: the input embeddings (P, D), or a layer's keys or values (P, N E)
length            |row|, the mean, least and largest over the P tokens
sigma             singular values of the part; the largest is shown
effective rank    exp(-sum p log p), p = sigma / sum sigma (Roy & Vetterli 2007): P where the tokens are as different as
                  can be, 1 where they are all multiples of one
|row|/|word|      mean length beside the mean length of the model's own embeddings
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from minillm.errors import CheckpointError
from minillm.model import Decoder
from minillm.prompt.config import PromptConfig
from minillm.prompt.peft_config import TYPES
from minillm.prompt.peft_format import CONFIG, WEIGHTS, check_fit, read
from minillm.prompt.prompted import check


@dataclass(frozen=True)
class Part:
    """One matrix of the prompt; relative: beside the model's words, or None."""

    part: str
    mean: float
    least: float
    most: float
    largest: float
    effective_rank: float
    relative: float | None = None


@dataclass(frozen=True)
class Description:
    """A prompt: its settings, its shape (P, W), its parts, bytes in the file."""

    config: PromptConfig
    base: str
    shape: tuple[int, ...]
    parts: list[Part]
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        parts, numbers = [vars(part) for part in self.parts], math.prod(self.shape)
        about = {"base": self.base, "config": vars(self.config), "shape": list(self.shape)}
        return {**about, "parts": parts, "numbers": numbers, "bytes": self.bytes}


def is_prompt(raw: dict[str, Any]) -> bool:
    """Whether an adapter_config.json is one of these."""
    return raw.get("peft_type") in TYPES


def describe(folder: Path, model: Decoder | None = None) -> Description:
    """Read a prompt's folder; with a model also check that it is that model's, and compare with its embeddings.

    Raises CheckpointError where files are missing or broken, or do not fit the model.
    """
    raw, config, values = read(folder)
    word = None
    if model is not None:
        check(model, config)
        check_fit(raw, config, values, model.config, folder)
        if config.kind != "prefix":
            word = float(model.embed.weight.detach().float().norm(dim=1).mean())
    parts = [_part(name, rows.float(), word) for name, rows in _split(raw, config, values, folder)]
    size = values.numel() * values.element_size()
    return Description(config, str(raw.get("base_model_name_or_path") or ""), tuple(values.shape), parts, size)


def _split(raw: dict[str, Any], config: PromptConfig, values: Tensor, folder: Path) -> Iterator[tuple[str, Tensor]]:
    if config.kind != "prefix":
        yield "prompt", values
        return
    layers = raw.get("num_layers")
    if not layers or values.shape[1] % (2 * layers):
        raise CheckpointError(f"{folder / WEIGHTS}: has no keys and values of the {layers} layers that {CONFIG} names")
    for number, rows in enumerate(values.view(len(values), 2 * layers, -1).unbind(1)):
        yield f"layer {number // 2} {'values' if number % 2 else 'keys'}", rows


def _part(name: str, rows: Tensor, word: float | None) -> Part:
    lengths, sigma = rows.norm(dim=1), torch.linalg.svdvals(rows)
    p = sigma[sigma > 0] / sigma.sum()
    effective = math.exp(float(-(p * p.log()).sum())) if len(p) else 0.0
    mean, least, most = (float(x) for x in (lengths.mean(), lengths.min(), lengths.max()))
    return Part(name, mean, least, most, float(sigma.max()), effective, mean / word if word else None)


def tables(found: Description, folder: Path) -> Group:
    """For people: settings, then one line a part."""
    config, numbers = found.config, math.prod(found.shape)
    about = Table.grid(padding=(0, 2))
    kinds = {"prompt": "prompt tuning", "p-tuning": "P-tuning", "prefix": "prefix tuning"}
    about.add_row("adapter", f"{folder}: {kinds[config.kind]}, {numbers:,} numbers, {found.bytes / 1e6:.2f} MB")
    about.add_row("base", found.base or "not said")
    about.add_row("virtual tokens", f"{config.tokens}, each of {found.shape[1]:,} numbers")
    if config.encoder:
        about.add_row("made by", f"{config.encoder.upper()}{f' of width {config.width}' if config.width else ''}")
    columns = ("|row|", "least", "most", "σ max", "eff. rank", "|row|/|word|")
    drawn = Table("part", *columns, box=None, padding=(0, 1), pad_edge=False, title_justify="left")
    drawn.columns[0].no_wrap = True
    for column in drawn.columns[1:]:
        column.justify = "right"
    for part in found.parts:
        relative = "" if part.relative is None else f"{part.relative:.2f}"
        figures = [f"{x:.3g}" for x in (part.mean, part.least, part.most, part.largest)]
        drawn.add_row(part.part, *figures, f"{part.effective_rank:.1f}", relative)
    return Group(about, "", drawn)
