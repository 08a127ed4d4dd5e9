"""What a plan is asked about: number formats, context, and whether and how the model is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from minillm.config import DecoderConfig
from minillm.errors import InputError, nearest

Quantize = Literal["none", "int8", "nf4"]
Dtype = Literal["float32", "bfloat16", "float16"]
Optimizer = Literal["adamw", "adamw8"]

BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Use:
    """How a model is to be held and used. Without `train`, it reads a prompt of `context` tokens and writes on."""

    quantize: Quantize = "none"  # format of the linear layers inside the blocks
    double_quant: bool = False  # NF4 only: its scales in 8 bits too
    dtype: Dtype = "bfloat16"  # format of everything that is not quantised, and of the cache
    context: int | None = None  # T, tokens a row; None is the longest that the model takes
    batch: int = 1  # B, rows at once
    lora_rank: int | None = None  # R; None: no adapters
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    train: bool = False  # all weights, or the adapters where there are any
    optimizer: Optimizer = "adamw"
    checkpointing: bool = False  # keep the input of each block, and compute the block again in the backward pass
    accumulate: bool = False  # gradients of earlier batches are there while the next one is computed

    @property
    def number(self) -> int:
        """Bytes of one number in `dtype`."""
        return BYTES[self.dtype]

    @property
    def full(self) -> bool:
        """All weights are trained, not adapters."""
        return self.train and self.lora_rank is None

    def tokens(self, config: DecoderConfig) -> int:
        """T, tokens a row."""
        return config.longest if self.context is None else self.context

    def targets(self, linears: dict[str, tuple[int, int]]) -> tuple[str, ...]:
        """The linear layers of a block that get an adapter, in the model's order."""
        if self.lora_rank is None:
            return ()
        return tuple(name for name in linears if ALL_LINEAR in self.lora_targets or name in self.lora_targets)

    def check(self, config: DecoderConfig, linears: dict[str, tuple[int, int]]) -> None:
        """InputError for what contradicts itself or the model."""
        for name, allowed in (("quantize", Quantize), ("dtype", Dtype), ("optimizer", Optimizer)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                hint = nearest(str(value), get_args(allowed))
                raise InputError(f"{name} {value!r} is unknown{hint}; choose one of {', '.join(get_args(allowed))}")
        for name in ("batch", "context", "lora_rank"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}; give a whole number of at least 1, or leave it out")
        if self.tokens(config) > config.longest:
            raise InputError(f"context is {self.context}, but the model takes {config.longest} tokens; give no more")
        for target in self.lora_targets if self.lora_rank is not None else ():
            if target not in (*linears, ALL_LINEAR):
                raise InputError(
                    f"lora_targets: no linear layer is named {target!r}{nearest(target, linears)}; "
                    f"choose from {', '.join(linears)}, or {ALL_LINEAR}"
                )
        self._check_training()

    def _check_training(self) -> None:
        if self.lora_rank is not None and not self.lora_targets:
            raise InputError(f"lora_targets is empty; name linear layers, or {ALL_LINEAR}, or leave lora_rank out")
        if self.double_quant and self.quantize != "nf4":
            raise InputError(f"double_quant is for nf4 and quantize is {self.quantize}; give nf4, or leave it out")
        if self.train and self.quantize != "none" and self.lora_rank is None:
            raise InputError(
                f"quantize is {self.quantize}: quantised weights cannot be trained; train adapters with lora_rank"
            )
        if not self.train:
            idle = (("checkpointing", self.checkpointing), ("accumulate", self.accumulate))
            for name, given in (*idle, ("optimizer", self.optimizer != "adamw")):
                if given:
                    raise InputError(f"{name} matters in training only; add train, or leave it out")


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes, from a number and a unit: kB, MB, GB, TB in powers of 1000, KiB, MiB, GiB, TiB in powers of 1024.

    >>> parse_size("24GB"), parse_size("1.5 GiB"), parse_size("700")
    (24000000000, 1610612736, 700)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE | re.ASCII)
    size = int(float(found[1]) * _UNITS[(found[2] or "").lower()]) if found else 0
    if size < 1:
        raise InputError(f"size {text!r:.40} is not understood; give a number and a unit, as in 24GB, 80GiB or 512MB")
    return size
