"""What an adapter's files hold, with or without its base: ranks, scales, and how large ΔW is in which directions.

ΔW = s B A = U diag(sigma) V^T            sigma from two small matrices: B = Q_B R_B, A^T = Q_A R_A,
                                          sigma = s * singular values of R_B R_A^T  (R, R)
|ΔW| = sqrt(sum sigma^2)                  Frobenius norm
effective rank = exp(-sum p log p)        p = sigma / sum sigma; Roy & Vetterli 2007. R where all directions weigh
                                          the same, 1 where one has it all
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

from minillm.checkpoint.families import read_json
from minillm.lora.config import LoraConfig
from minillm.lora.layer import float_weight
from minillm.lora.peft_config import from_peft
from minillm.lora.peft_format import CONFIG, PREFIX, WEIGHTS, load, read, sites
from minillm.lora.targets import pattern_value
from minillm.model import Decoder

_A, _B = (".lora_A.weight", ".lora_embedding_A"), (".lora_B.weight", ".lora_embedding_B")


@dataclass(frozen=True)
class ModuleChange:
    """One module: rank R and scale, |ΔW|, the largest sigma, the effective rank; relative: |ΔW| / |W|, or None."""

    module: str
    rank: int
    scale: float
    norm: float
    largest: float
    effective_rank: float
    relative: float | None = None


@dataclass(frozen=True)
class Description:
    """An adapter: its settings, what each module adds, the tensors that are no A or B, numbers and bytes in all."""

    config: LoraConfig
    base: str
    modules: list[ModuleChange]
    others: list[str]
    numbers: int
    bytes: int

    @property
    def does_nothing(self) -> bool:
        """Whether every ΔW is zero and nothing else is there: an adapter that was never trained, or lost its B."""
        return not self.others and all(change.norm == 0 for change in self.modules)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        modules = [vars(change) for change in self.modules]
        config = {name: getattr(self.config, name) for name in LoraConfig.__dataclass_fields__}
        return {
            "base": self.base, "config": config, "modules": modules, "others": self.others, "numbers": self.numbers,
            "bytes": self.bytes, "does_nothing": self.does_nothing,
        }  # fmt: skip


def describe(folder: Path, model: Decoder | None = None) -> Description:
    """Read an adapter's folder; with a model also fit it there, strictly, and compare with its weights.

    Raises CheckpointError where files are missing or broken, or do not fit the model.
    """
    raw = read_json(folder / CONFIG)
    config = from_peft(raw, str(folder / CONFIG), ())
    found, _ = read(folder / WEIGHTS)
    norms = {} if model is None else _weight_norms(model, folder)
    changes = [_change(module, a, b, config, norms) for module, a, b in _factors(found)]
    others = [key.removeprefix(PREFIX) for key in found if not key.endswith((*_A, *_B))]
    numbers = sum(x.numel() for x in found.values())
    size = sum(x.numel() * x.element_size() for x in found.values())
    return Description(config, str(raw.get("base_model_name_or_path") or ""), changes, others, numbers, size)


def _factors(found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for key, a in found.items():
        for end_a, end_b in zip(_A, _B, strict=True):
            b = found.get(key.removesuffix(end_a) + end_b)
            if key.endswith(end_a) and b is not None:
                yield key.removeprefix(PREFIX).removesuffix(end_a), a.float(), b.float()


def _change(module: str, a: Tensor, b: Tensor, config: LoraConfig, norms: dict[str, float]) -> ModuleChange:
    scale = config.scale(len(a), pattern_value(config.alpha_pattern, [module], config.alpha))
    sigma = abs(scale) * singular_values(a, b)
    norm, total = float(sigma.norm()), sigma.sum()
    p = sigma[sigma > 0] / total
    effective = math.exp(float(-(p * p.log()).sum())) if len(p) else 0.0
    relative = norm / norms[module] if norms.get(module) else None
    return ModuleChange(module, len(a), scale, norm, float(sigma.max()), effective, relative)


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Those of B A (min(R, K, N),), without making it: a (R, K), b (N, R).

    >>> singular_values(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]])).tolist()
    [10.0]
    """
    r_a, r_b = (torch.linalg.qr(x, mode="r").R for x in (a.T, b))
    return torch.linalg.svdvals(r_b @ r_a.T)


def _weight_norms(model: Decoder, folder: Path) -> dict[str, float]:
    """Module of the format -> |W|; the adapter is on the model after this."""
    load(model, folder, name="described")
    norms = {}
    for site in sites(model, "described"):
        layers: list[Any] = site.layers
        parts = [float_weight(getattr(layer, "base", layer), torch.float32).norm() ** 2 for layer in layers]
        norms[site.module] = math.sqrt(float(sum(parts)))
    return norms


def tables(found: Description, folder: Path) -> Group:
    """For people: settings, then one line a module."""
    config = found.config
    about = Table.grid(padding=(0, 2))
    kinds = [name for name, on in (("DoRA", config.dora), ("rsLoRA", config.rslora)) if on]
    about.add_row(
        "adapter", f"{folder}: {' '.join(kinds) or 'LoRA'}, {found.numbers:,} numbers, {found.bytes / 1e6:.2f} MB"
    )
    about.add_row("base", found.base or "not said")
    about.add_row("dropout, init", f"{config.dropout:g}, {config.init}")
    if found.others:
        about.add_row("beside A and B", ", ".join(found.others[:4]) + (" ..." if len(found.others) > 4 else ""))
    if found.does_nothing:
        about.add_row("does nothing", "every ΔW is zero: never trained, or saved without its B")
    columns = ("rank", "scale", "|ΔW|", "σ max", "eff. rank", "|ΔW|/|W|")
    drawn = Table("module", *columns, box=None, padding=(0, 1), pad_edge=False, title_justify="left")
    drawn.columns[0].no_wrap = True
    for column in drawn.columns[1:]:
        column.justify = "right"
    for each in found.modules:
        relative = "" if each.relative is None else f"{each.relative:.2%}"
        figures = (
            f"{each.scale:.3g}",
            f"{each.norm:.3g}",
            f"{each.largest:.3g}",
            f"{each.effective_rank:.1f}",
            relative,
        )
        drawn.add_row(each.module, str(each.rank), *figures)
    return Group(about, "", drawn)
