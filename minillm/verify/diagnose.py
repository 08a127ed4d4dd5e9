"""Why an operation is wrong: candidate causes, each tried by computing that one operation with the cause in it.

A cause is a *faulty version of the formula*. It is found when the faulty version gives what the accused side recorded,
within the bound that the right formula has elsewhere, from the inputs that side recorded. Nothing is guessed from the
size or look of an error, so a cause that is named has been reproduced. The same candidates serve for our side and for
the oracle's.

    scene      the accused output, its recorded inputs, the formula, the whole trace of that side
    candidate  (key, text, output): the text completes "it equals the formula ..."
    generator  scene -> candidates, registered for the kinds of operation that it can explain

Candidates are tried from the particular to the general: the first that fits is the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.verify.compare import Case, bound, distance, tokens_of
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
        """The operation again in float64: other inputs, or other fields of the formula (config, parameter, keep, ..)."""
        formula = replace(self.formula, **changes)
        return formula(self.case.operation, self.inputs() if inputs is None else inputs, torch.float64)

    def with_config(self, **fields: Any) -> Tensor:
        """The operation under another config."""
        return self.compute(config=replace(self.formula.config, **fields))

    def with_parameter(self, changed: Callable[[str, Tensor], Tensor]) -> Tensor:
        """The operation with its parameters (name, value) replaced."""
        return self.compute(parameter=lambda name: changed(name, self.formula.parameter(name)))

    def recorded(self, name: str) -> Tensor | None:
        """What this side recorded under a name, in float64."""
        return self.trace[name].double() if name in self.trace else None


Generator = Callable[[Scene], Iterator[Candidate]]


def diagnose(case: Case, formula: Formula, trace: Trace) -> Cause | None:
    """The first candidate that reproduces what was recorded, or None: then `locate` at least says where."""
    from minillm.verify.causes import GENERATORS

    scene, keep = Scene(case, formula, trace), formula.keep
    exact, found = tokens_of(case.exact, keep), tokens_of(case.found, keep)
    if case.found.shape != case.exact.shape:
        return Cause("shape", f"nowhere: its shape is {tuple(case.found.shape)}, not {tuple(case.exact.shape)}")
    allowed = 2 * bound(tokens_of(case.plain, keep), exact, case.dtype)  # its own plain formula is not computed
    wrong = distance(found, exact)
    for kinds, generate in GENERATORS:
        if kinds and case.operation.kind not in kinds:
            continue
        for candidate in generate(scene):
            away = distance(found, tokens_of(candidate.output, keep))
            if away <= allowed and away < wrong / 4:
                return Cause(candidate.key, candidate.text)
    return None


def locate(case: Case, formula: Formula) -> str:
    """Where the wrong numbers are, if they are not everywhere: tokens, heads or columns; empty if everywhere."""
    apart = (case.found.double() - case.exact).nan_to_num(torch.inf, torch.inf, torch.inf).abs()
    scale = case.exact.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt()
    allowed = 8 * bound(tokens_of(case.plain, formula.keep), tokens_of(case.exact, formula.keep), case.dtype)
    wrong = apart > allowed * scale
    if wrong.ndim == 3:
        keep = formula.keep[:, :, None]
        return _some(wrong & keep, {"token": 1, "column": 2})
    if wrong.ndim == 4:
        return _some(wrong & formula.keep[:, None, :, None], {"head": 1, "token": 2})
    return ""


def _some(wrong: Tensor, axes: dict[str, int]) -> str:
    parts = []
    for label, axis in axes.items():
        others = [d for d in range(wrong.ndim) if d != axis]
        hit = wrong.any(dim=others).nonzero().flatten().tolist()
        if 0 < len(hit) <= wrong.shape[axis] // 2:
            parts.append(f"{label}{'s' if len(hit) > 1 else ''} {ranges(hit)}")
    return "only " + ", ".join(parts) if parts else ""


def ranges(numbers: list[int], most: int = 6) -> str:
    """Whole numbers as people write them.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    written = [f"{a}-{b}" if b > a else str(a) for a, b in runs]
    return ", ".join(written[:most]) + (f" and {len(written) - most} more" if len(written) > most else "")
