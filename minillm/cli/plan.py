"""`minillm plan`: whether it will fit, before anything is fetched or loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from minillm.checkpoint import meta
from minillm.checkpoint.families import read_config
from minillm.checkpoint.resolve import resolve
from minillm.cli.checkpoint import Checkpoint
from minillm.config import DecoderConfig
from minillm.errors import CheckpointError
from minillm.plan import Use, parse_size, plan
from minillm.plan.table import describe
from minillm.plan.use import Dtype, Optimizer, Quantize


@dataclass
class Plan(Checkpoint):
    """Memory and disk a model takes, counted from its config.json; reads no weights.

    minillm plan tiiuae/falcon-40b --quantize nf4 --available 24GB: will it answer on a 24 GB card?

    minillm plan FOLDER --train --context 1024 --batch 4: all weights trained

    minillm plan FOLDER --train --quantize nf4 --lora-rank 16 --lora-targets all-linear --checkpointing: QLoRA

    Tensors are counted; leave about 1 GB for a GPU's driver. Exit status: 0 it fits (or nothing was said to fit into),
    1 it does not, 2 bad input.
    """

    quantize: Quantize = "none"
    """Format of the linear layers; embedding, norms and head keep --dtype."""
    double_quant: bool = False
    """With nf4: its scales in 8 bits too."""
    dtype: Dtype = "bfloat16"
    """Number format of weights and cache."""
    context: int | None = None
    """Tokens a row, prompt and answer; left out, the longest that the model takes."""
    batch: int = 1
    """Rows at once."""
    lora_rank: int | None = None
    """Add LoRA adapters of this rank; with --train they alone are trained."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Linear layers that get an adapter, by name, or all-linear."""
    train: bool = False
    """Plan a training step instead of an answer."""
    optimizer: Optimizer = "adamw"
    """What moves the weights; adamw8 keeps its moments in 8 bits."""
    checkpointing: bool = False
    """Keep only each layer's input for the backward pass, and compute the layer again."""
    accumulate: bool = False
    """A step adds up gradients of several batches: those of the earlier ones stay."""
    available: str | None = None
    """Memory to fit into, as in 24GB (1000^3) or 24GiB (1024^3)."""

    def run(self) -> int:
        available = None if self.available is None else parse_size(self.available)
        use = Use(
            quantize=self.quantize,
            double_quant=self.double_quant,
            dtype=self.dtype,
            context=self.context,
            batch=self.batch,
            lora_rank=self.lora_rank,
            lora_targets=self.lora_targets,
            train=self.train,
            optimizer=self.optimizer,
            checkpointing=self.checkpointing,
            accumulate=self.accumulate,
        )
        folder = resolve(self.model, revision=self.revision, weights=False, allow_pickle=self.allow_pickle)
        config = self._config(folder)
        Console(highlight=False).print(describe(self.model, config, use, available))
        return 0 if available is None or plan(config, use).fits(available) else 1

    def _config(self, folder: Path) -> DecoderConfig:
        if not meta.is_meta_folder(folder):
            return read_config(folder, self.ignore)
        if not self.allow_pickle:
            raise CheckpointError(f"{folder}: Meta's format says some sizes in .pth files only; pass --allow-pickle")
        with meta.MetaFiles(folder) as files:
            return meta.config_from_params(folder, files)
