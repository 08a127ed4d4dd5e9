"""`minillm quantize`: a checkpoint rounded once, to be loaded as it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, UseAppendAction

from minillm.checkpoint.resolve import resolve
from minillm.checkpoint.save import save
from minillm.cli.checkpoint import Checkpoint, load_with_progress
from minillm.data.tokenizer import Tokenizer
from minillm.errors import InputError, TokenizerError
from minillm.quant.convert import HEAD, QUANTISED, Quantisation


@dataclass
class Quantize(Checkpoint):
    """Round a checkpoint's linear layers and write it; minillm, and transformers with bitsandbytes, load the result.

    minillm quantize tiiuae/falcon-7b falcon-7b-int8

    The weights stream through: memory holds the small model and one tensor of the large one. The head stays float.
    """

    output: Positional[Path] = Path()
    """The folder to write; it must not hold a model yet."""
    to: Literal["int8", "nf4", "fp4"] = "int8"
    """LLM.int8(), or QLoRA's 4 bits."""
    threshold: float = 6.0
    """int8: inputs from this size on make their column an outlier, which stays float; 0 keeps none."""
    single_quant: bool = False
    """4 bits: keep the blocks' scales in fp32 instead of 8 bits; 0.37 bits more a weight."""
    skip: Annotated[tuple[str, ...], UseAppendAction] = ()
    """Another layer that stays float, by name (down_proj) or path (blocks.0); may be given several times."""

    def run(self) -> None:
        if (self.output / "config.json").exists() or self.output == Path():
            raise InputError(f"{self.output}: name a folder that holds no model yet, to write the quantised one to")
        how = Quantisation(
            self.to, threshold=self.threshold, double_quant=not self.single_quant, skip=(*HEAD, *self.skip)
        )
        folder = resolve(self.model, revision=self.revision, allow_pickle=self.allow_pickle)
        started = time.perf_counter()
        model = load_with_progress(folder, quantize=how, allow_pickle=self.allow_pickle, ignore=self.ignore)
        try:
            tokenizer = Tokenizer.load(folder)
        except TokenizerError:
            tokenizer = None  # a checkpoint for programs that have their own
        save(model, self.output, tokenizer=tokenizer)
        layers = [module for module in model.modules() if isinstance(module, QUANTISED)]
        count, size = sum(n * k for n, k in (layer.shape for layer in layers)), _size(self.output)
        Console(highlight=False).print(
            f"{len(layers)} layers of {count:,} weights in {self.to}; {self.output}: {size / 1e9:.2f} GB, "
            f"{time.perf_counter() - started:.1f} s",
            soft_wrap=True,
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
