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

import torch
from torch import Tensor

from minillm.verify.causes import GENERATORS
from minillm.verify.compare import Case, bound, distance, tokens_of
from minillm.verify.gradients import is_parameter
from minillm.verify.ranges import ranges
from minillm.verify.reference import Formula
from minillm.verify.scene import Cause, Scene
from minillm.verify.trace import Trace


def diagnose(case: Case, formula: Formula, trace: Trace) -> Cause | None:
    """The first candidate that reproduces what was recorded, or None: then `locate` at least says where."""
    scene, keep = Scene(case, formula, trace), formula.keep
    if case.found.shape != case.exact.shape:
        return Cause("shape", f"in nothing: its shape is {tuple(case.found.shape)}, not {tuple(case.exact.shape)}")
    exact, found = tokens_of(case.exact, keep), tokens_of(case.found, keep)
    # a candidate's own plain formula is not computed
    allowed = 2 * bound(tokens_of(case.plain, keep), exact, case.dtype, case.floor)
    wrong = distance(found, exact, case.floor)
    for kinds, generate in GENERATORS:
        if case.operation.kind not in kinds and (kinds or case.operation.kind == "gradient"):
            continue
        for candidate in generate(scene):
            away = distance(found, tokens_of(candidate.output, keep), case.floor)
            if away <= allowed and away < wrong / 4:
                return Cause(candidate.key, candidate.text)
    return None


def locate(case: Case, formula: Formula) -> str:
    """Where the wrong numbers are, if they are not everywhere: tokens, heads or columns; empty if everywhere."""
    if case.found.shape != case.exact.shape or is_parameter(case.operation.name):
        return ""
    apart = (case.found.double() - case.exact).nan_to_num(torch.inf, torch.inf, torch.inf).abs()
    scale = case.exact.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt()
    plain, exact = (tokens_of(x, formula.keep) for x in (case.plain, case.exact))
    allowed = 8 * bound(plain, exact, case.dtype, case.floor)
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
