"""Faults that any operation may have: zeros, a factor, a shift by a token, a smaller format in between."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from minillm.verify.compare import distance, tokens_of
from minillm.verify.gradients import is_parameter
from minillm.verify.scene import Candidate, Scene

_SMALLER = (torch.bfloat16, torch.float16)


def _coarser(scene: Scene) -> list[torch.dtype]:
    return [dtype for dtype in _SMALLER if torch.finfo(dtype).eps > torch.finfo(scene.case.dtype).eps]


def rounded_input(scene: Scene) -> Iterator[Candidate]:
    """What was read went through a smaller format."""
    for dtype in _coarser(scene):
        for index, name in enumerate(scene.case.operation.inputs):
            inputs = scene.inputs()
            inputs[index] = inputs[index].to(dtype).double()
            yield Candidate("input_rounded", f"with {name} rounded to {str(dtype)[6:]}", scene.compute(inputs))


def rounded_output(scene: Scene) -> Iterator[Candidate]:
    """Every recorded number is one of a smaller format, and as near the right one as that format allows."""
    found, keep = scene.case.found, scene.formula.keep
    for dtype in _coarser(scene):
        if not tokens_of(found.to(dtype).to(found.dtype), keep).equal(tokens_of(found, keep)):
            continue
        coarse = scene.compute([x.to(dtype).double() for x in scene.inputs()])
        for text, output in (("rounded", scene.case.exact), ("with all it reads rounded", coarse)):
            exact = tokens_of(output, keep)
            if distance(tokens_of(found, keep), exact) <= 2 * distance(exact.to(dtype).double(), exact):
                yield Candidate("output_rounded", f"{text} to {str(dtype)[6:]}", found.double())


def zeros(scene: Scene) -> Iterator[Candidate]:
    """All of it, or whole columns or heads."""
    found = scene.case.found
    yield Candidate("zero", "times zero", torch.zeros_like(scene.case.exact))
    if found.ndim == 3:
        blank = ((found == 0) & (scene.case.exact != 0).any(dim=(0, 1))).all(dim=(0, 1))  # not those that should be
        if bool(blank.any()):
            what = "numbers" if is_parameter(scene.name) else "columns"
            yield Candidate("zero", f"with {int(blank.sum())} of {len(blank)} {what} zero", scene.case.exact * ~blank)


def shifted(scene: Scene) -> Iterator[Candidate]:
    """Right numbers at the wrong token or row."""
    if scene.formula.keep.shape[1] == 1:  # a parameter, or a single token: each is at its row's edge
        return
    axis = 2 if scene.case.exact.ndim == 4 else 1
    for step, text in ((1, "one token late"), (-1, "one token early")):
        yield Candidate("shifted", text, _moved(scene, step, axis))
    if len(scene.case.exact) > 1:
        yield Candidate("shifted", "with rows of the batch exchanged", scene.case.exact.roll(1, dims=0))


def _moved(scene: Scene, step: int, axis: int) -> torch.Tensor:
    """The right output at the next token; the first of a row, for which there is none, as recorded."""
    moved = scene.case.exact.roll(step, dims=axis)
    numbers = scene.formula.keep.long().cumsum(dim=1)
    edge = (numbers == 1) if step > 0 else (numbers == numbers.amax(dim=1, keepdim=True))  # (B, T)
    shape = [edge.shape[0], *[1] * (moved.ndim - 1)]
    shape[axis] = edge.shape[1]
    return torch.where(edge.view(shape), scene.case.found.double(), moved)


def scaled(scene: Scene) -> Iterator[Candidate]:
    """The one factor that fits best."""
    keep = scene.formula.keep
    exact, found = (tokens_of(x, keep) for x in (scene.case.exact, scene.case.found))
    used = exact.isfinite() & found.isfinite()
    x, y = exact[used], found[used]
    factor = float(x @ y / (x @ x).clamp(min=1e-300))
    if abs(factor - 1) > 1e-6:
        yield Candidate("scaled", f"times {factor:.6g}", scene.case.exact * factor)
