"""What a cause is tried on: the accused output of one operation, and everything needed to compute it anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.verify.compare import Case
from minillm.verify.reference import Formula
from minillm.verify.trace import Trace


class Cause(NamedTuple):
    """Why: `key` for programs, `text` completes "it equals the formula ..."."""

    key: str
    text: str


class Candidate(NamedTuple):
    """A cause and the output (float64, shaped as recorded) that it would give."""

    key: str
    text: str
    output: Tensor


@dataclass(frozen=True)
class Scene:
    """What a generator may look at and compute with."""

    case: Case
    formula: Formula
    trace: Trace

    @property
    def name(self) -> str:
        return self.case.operation.name

    @property
    def block(self) -> str:
        """`blocks.3` of an operation in layer 3, else an empty string."""
        layer = self.case.operation.layer
        return "" if layer is None else f"blocks.{layer}"

    def inputs(self) -> list[Tensor]:
        """What the operation read, in float64."""
        return [x.double() for x in self.case.inputs]

    def compute(self, inputs: list[Tensor] | None = None, **changes: Any) -> Tensor:
        """The operation again in float64: other inputs, or other fields of the formula (config, keep, ..)."""
        formula = replace(self.formula, **changes)
        return formula(self.case.operation, self.inputs() if inputs is None else inputs, torch.float64)

    def with_config(self, **fields: Any) -> Tensor:
        """The operation under another config."""
        return self.compute(config=replace(self.formula.config, **fields))

    def with_parameter(self, changed: Callable[[str, Tensor], Tensor]) -> Tensor:
        """The operation with its parameters (name, value) replaced."""
        return self.compute(parameter=lambda name: changed(name, self.formula.parameter(name)))

    def bias(self) -> Tensor | None:
        """The bias of a linear operation in float64, or None."""
        config = self.formula.config
        has = config.attention_bias if ".attention." in self.name else config.mlp_bias
        return self.formula.parameter(f"{self.name}.bias").double() if has else None

    def recorded(self, name: str) -> Tensor | None:
        """What this side recorded under a name, in float64."""
        return self.trace[name].double() if name in self.trace else None


Generator = Callable[[Scene], Iterator[Candidate]]


def only(leaf: str, change: Callable[[Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    """For `Scene.with_parameter`: change parameters whose name ends with `leaf`, weight or bias."""
    return lambda name, value: change(value) if name.endswith(leaf) else value
