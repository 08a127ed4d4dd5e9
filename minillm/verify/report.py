"""What a verification found, as data: `minillm verify` prints it, draws it and writes it as JSON.

equal    every operation on both sides is the formula, up to rounding                exit status 0
fault    some operation is not; `first` names it, the side, and the cause if found    exit status 1
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minillm.verify.compare import ULPS, Between, Errors, Result


@dataclass(frozen=True)
class Fault:
    """One operation of one side that is not its formula.

    side: "ours", or "theirs" for what we compare with. error, allowed: relative, see `minillm.verify.compare`. cause: a
    key, with `text` completing "it equals the formula ..."; empty where no candidate reproduced the numbers. where:
    which tokens, heads or columns, if not all. layers: all in which the same operation of that side is out of bound.
    known: identifier of the entry in `minillm.verify.known_faults`, if this is one of those. backward: what is wrong is
    the gradient of what the operation gives.
    """

    operation: str
    side: Literal["ours", "theirs"]
    error: float
    allowed: float
    cause: str = ""
    text: str = ""
    where: str = ""
    layers: tuple[int, ...] = ()
    known: str = ""
    backward: bool = False

    @property
    def what(self) -> str:
        """`blocks.0.mlp.inner`, or `gradient of blocks.0.mlp.inner`."""
        return f"gradient of {self.operation}" if self.backward else self.operation


@dataclass(frozen=True)
class Report:
    """The whole of one comparison. `results` are in execution order; `gradients` in that of the backward pass."""

    ours: str
    theirs: str
    about: Mapping[str, str]  # what ran: dtype, tokens, versions, shape, for people and JSON alike
    results: tuple[Result, ...]
    faults: tuple[Fault, ...] = ()  # the first one of each (side, operation without its layer), in execution order
    remarks: tuple[str, ...] = ()
    gradients: tuple[Result, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def first(self) -> Fault | None:
        return self.faults[0] if self.faults else None

    @property
    def verdict(self) -> Literal["equal", "fault"]:
        return "fault" if self.faults else "equal"

    @property
    def logits(self) -> Result | None:
        return next((result for result in self.results if result.operation.name == "logits"), None)

    def as_json(self) -> dict[str, Any]:
        """Plain values, as `schema.json` beside this file describes them."""
        return {
            "format": "minillm verify 1",
            "verdict": self.verdict,
            "ours": self.ours,
            "theirs": self.theirs,
            "about": dict(self.about),
            "faults": [_fault(fault) for fault in self.faults],
            "remarks": list(self.remarks),
            "operations": [_result(result) for result in self.results],
            "gradients": [_result(result) for result in self.gradients],
            "ulp_edges": list(ULPS),
            "seconds": dict(self.seconds),
        }


def _fault(fault: Fault) -> dict[str, Any]:
    return {name: _number(value) if isinstance(value, float | tuple) else value for name, value in vars(fault).items()}


def _result(result: Result) -> dict[str, Any]:
    return {
        "name": result.operation.name,
        "layer": result.operation.layer,
        "shape": list(result.shape),
        "verdict": result.verdict,
        "ours": _plain(result.ours),
        "theirs": _plain(result.theirs),
        "between": _plain(result.between),
    }


def _plain(errors: Errors | Between | None) -> dict[str, Any] | None:
    """Infinity and NaN have no JSON: they become strings."""
    return None if errors is None else {name: _number(value) for name, value in vars(errors).items()}


def _number(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if math.isfinite(value) else str(value)
