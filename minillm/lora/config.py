"""What an adapter is: its rank and scale, where it sits, how it starts.

    ΔW = s B A          A (R, K), B (N, R)          s = alpha / R, or alpha / sqrt(R) with `rslora`

LoRA: arXiv 2106.09685 §4.1. rsLoRA: 2312.03732. DoRA: 2402.09353. PiSSA: 2404.02948. OLoRA: 2406.01775.
The fields have the meaning of peft's `LoraConfig` (0.21), under the names of the papers; `minillm.lora.peft_config`
has the table.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from minillm.errors import InputError, nearest

Init = Literal["kaiming", "gaussian", "linear", "pissa", "olora"]
Biases = Literal["none", "all", "lora_only"]

#: Every linear but the head.
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """Settings of one adapter.

    rank, alpha: see above. dropout: of the adapter's input, while training.
    targets: leaf names ("q_proj"), ends of full names, or whole ones; a single string is a regular expression that must
    match a full name whole; "all-linear". Names are those of minillm or of the checkpoint's own format.
    exclude: the same, taken away again. layers: numbers of the blocks; None means all.
    rank_pattern, alpha_pattern: end of a name, as a regular expression -> another rank or alpha there.
    init: "kaiming" (A uniform, B zero), "gaussian" (A of deviation 1 / R, B zero), "linear" (both as a fresh linear: no
    zero start), "pissa", "olora" (from the weight itself; see `minillm.lora.init`).
    lora_bias: B has a bias. biases: which biases of the base are trained anew, "all" or those of adapted layers.
    retrain: modules whose parameters are trained anew as a whole (peft: modules_to_save).
    """

    rank: int = 8
    alpha: float = 8
    targets: str | tuple[str, ...] = ("q_proj", "v_proj")
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Init = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    lora_bias: bool = False
    biases: Biases = "none"
    retrain: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, rank in (("rank", self.rank), *((f"rank_pattern[{k!r}]", r) for k, r in self.rank_pattern.items())):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise InputError(f"{what} is {rank!r}; give a whole number of at least 1")
        for name, value in (("alpha", self.alpha), *self.alpha_pattern.items()):
            if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                raise InputError(f"alpha of {name!r} is {value!r}; give a number")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout!r}; give a number from 0 up to, but not, 1")
        for name, given, known in (("init", self.init, get_args(Init)), ("biases", self.biases, get_args(Biases))):
            if given not in known:
                raise InputError(f"{name} is {given!r}{nearest(str(given), known)}; have {', '.join(known)}")
        if self.dora and self.lora_bias:
            raise InputError("dora scales rows of a weight and has no bias of its own; leave lora_bias out")

    def scale(self, rank: int, alpha: float) -> float:
        """s of a layer with this rank and alpha.

        >>> LoraConfig(rslora=True).scale(16, 8)
        2.0
        """
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def settings(config: LoraConfig | None, fields: Mapping[str, Any]) -> LoraConfig:
    """A config, or the default one, with some fields changed; lists may stand for tuples. InputError for others."""
    known = LoraConfig.__dataclass_fields__
    for name in fields:
        if name not in known:
            raise InputError(f"{name} is no setting of an adapter{nearest(name, known)}; have {', '.join(known)}")
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return replace(config or LoraConfig(), **plain)
