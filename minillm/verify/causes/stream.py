"""Faults of what has no weights: the activation, and what is added to the stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minillm.verify.compare import tokens_of
from minillm.verify.reference import ACTIVATIONS
from minillm.verify.scene import Candidate, Scene

_OTHERS = {
    **ACTIVATIONS,
    "quick gelu, x sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
    "squared relu": lambda x: x.clamp(min=0) ** 2,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "no activation": lambda x: x,
}


def activation(scene: Scene) -> Iterator[Candidate]:
    """act(gate) * up, or act(up), with another function or the two exchanged."""
    right = scene.formula.config.activation
    gate, *rest = scene.inputs()
    for name, function in _OTHERS.items():
        if name != right:
            output = function(gate) * rest[0] if rest else function(gate)
            yield Candidate("activation", f"with {name} in place of {right}", output)
    act = ACTIVATIONS[right]
    if rest:
        yield Candidate("gate_up_swapped", "with gate and up exchanged", act(rest[0]) * gate)
        yield Candidate("gate_up_swapped", "of the gate alone, not multiplied with up", act(gate))
        yield Candidate("gate_up_swapped", "with the activation after the product", act(gate * rest[0]))


def sum_of_terms(scene: Scene) -> Iterator[Candidate]:
    """The recorded sum as a sum of known terms: which ones, and how many times. One foreign term at most."""
    operation = scene.case.operation
    terms = dict(zip(operation.inputs, scene.inputs(), strict=True))
    shape = scene.case.exact.shape
    yield from _fitted(scene, terms)
    for name in scene.trace:
        other = scene.recorded(name)
        near = name.startswith(f"{scene.block}.") and name not in terms
        if near and other is not None and other.shape == shape:
            yield from _fitted(scene, {**terms, name: other})


def _fitted(scene: Scene, terms: dict[str, Tensor]) -> Iterator[Candidate]:
    keep = scene.formula.keep
    matrix = torch.stack([tokens_of(x, keep).flatten() for x in terms.values()], dim=1)
    found = tokens_of(scene.case.found, keep).flatten()
    if not bool(found.isfinite().all()):
        return
    factors = torch.linalg.lstsq(matrix.T @ matrix, matrix.T @ found).solution
    whole = factors.round()
    for chosen in (whole, factors):
        output = sum(float(c) * x for c, x in zip(chosen, terms.values(), strict=True))
        assert isinstance(output, Tensor)
        yield Candidate(
            "residual",
            f"of {_formula(list(terms), chosen.tolist())}, not {_formula(list(scene.case.operation.inputs))}",
            output,
        )


def _formula(names: list[str], factors: list[float] | None = None) -> str:
    """`x + 0.5 y` over the short names of terms."""
    written = []
    for name, factor in zip(names, factors or [1.0] * len(names), strict=True):
        if abs(factor) > 1e-4:
            times = "" if abs(factor - 1) < 1e-4 else f"{factor:.4g} "
            written.append(f"{times}{name}")
    return " + ".join(written) or "nothing"
