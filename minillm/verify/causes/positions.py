"""Faults of rotary positions: which position, which frequencies, which numbers of a head form a pair."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minillm.verify.ranges import ranges
from minillm.verify.reference import Formula
from minillm.verify.scene import Candidate, Scene


def tables(positions: Tensor, frequencies: Tensor, stretch: float) -> tuple[Tensor, Tensor]:
    """cos, sin (.., d) in float64 of positions (..) under frequencies (d/2,)."""
    half = positions[..., None].double() * frequencies.double()
    angle = torch.cat((half, half), dim=-1)
    return angle.cos() * stretch, angle.sin() * stretch


def table(scene: Scene) -> Iterator[Candidate]:
    """cos or sin of other positions, or of other frequencies."""
    formula, kind = scene.formula, scene.case.operation.kind
    assert formula.frequencies is not None
    choose = 0 if kind == "cosine" else 1

    def under(frequencies: Tensor, stretch: float = formula.stretch) -> Tensor:
        return tables(formula.positions, frequencies, stretch)[choose]

    half = scene.case.exact.shape[-1] // 2
    yield Candidate("interleaved", "with each number of the table twice in a row", _twice(scene.case.exact[..., :half]))
    yield Candidate(
        "swapped",
        "with cos and sin exchanged",
        tables(formula.positions, formula.frequencies, formula.stretch)[1 - choose],
    )
    yield Candidate("reversed", "with the sign turned: rotation backwards", -scene.case.exact)
    for dtype in (torch.bfloat16, torch.float16):
        text = f"with frequencies rounded to {str(dtype)[6:]}"
        yield Candidate("frequencies_rounded", text, under(formula.frequencies.to(dtype)))
    yield from _other_frequencies(scene, choose)
    yield from _other_positions(scene, choose)


def _twice(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)


def _other_positions(scene: Scene, choose: int) -> Iterator[Candidate]:
    """For every token the position whose row of the table it has."""
    formula, found = scene.formula, scene.case.found.double()
    assert formula.frequencies is not None
    length = formula.tokens.shape[1]
    # negative ones last: cos cannot tell -1 from 1, and the first of equals is taken
    every = torch.tensor([*range(2 * length + 2), -1, -2], device=found.device)
    rows = tables(every, formula.frequencies, formula.stretch)[choose]  # (P, d)
    nearest = every[torch.cdist(found, rows.expand(len(found), -1, -1)).argmin(dim=-1)]  # (B, T)
    output = tables(nearest, formula.frequencies, formula.stretch)[choose]
    yield Candidate("positions", describe_positions(nearest, formula), output)


def describe_positions(found: Tensor, formula: Formula) -> str:
    """What positions (B, T) have in the place of the right ones, of real tokens only."""
    right, keep = formula.positions, formula.keep
    counted = torch.arange(right.shape[1], device=right.device).expand_as(right)
    offsets = (found - right)[keep].unique().tolist()
    if offsets == [0]:
        return "with the positions of padding as if it were text"
    if torch.equal(found[keep], counted[keep]):
        return "with padding counted: positions of slots, not of real tokens"
    if len(offsets) == 1:
        return f"with every position {offsets[0]:+d}"
    row = int((found != right).logical_and(keep).any(dim=1).nonzero()[0])
    return f"with positions {ranges(found[row][keep[row]].tolist())} for {ranges(right[row][keep[row]].tolist())}"


def _other_frequencies(scene: Scene, choose: int) -> Iterator[Candidate]:
    """Frequencies and stretch read off the recorded table itself, at position 1, and what they amount to."""
    formula, config = scene.formula, scene.formula.config
    fitted = _fit(scene)
    if fitted is None or formula.frequencies is None:
        return
    frequencies, stretch = fitted
    right, size = formula.frequencies.double(), 2 * len(frequencies)

    def candidate(key: str, text: str, values: Tensor, s: float = stretch) -> Candidate:
        return Candidate(key, text, tables(formula.positions, values.float(), s)[choose])

    exponent = torch.arange(0, size, 2, dtype=torch.float64, device=right.device) / size
    plain = config.rope_theta**-exponent
    nearly = abs(stretch - formula.stretch) <= 1e-3 * formula.stretch
    if not nearly:
        text = f"with cos and sin times {stretch:.6g} in place of {formula.stretch:.6g}"
        yield candidate("stretch", text, right)
    # with the stretch as it should be where it nearly is: one read off a bfloat16 table is not exact
    stretch = formula.stretch if nearly else stretch
    yield candidate("scaling", f"with theta {config.rope_theta:g} alone: rope scaling was dropped", plain, stretch)
    for factor in sorted({round(float((right / frequencies).median()), 2), 2.0, 4.0, 8.0}):
        yield candidate("scaling", f"with every frequency divided by {factor:g}", right / factor, stretch)
        yield candidate(
            "scaling", f"with theta {config.rope_theta:g} and linear factor {factor:g}", plain / factor, stretch
        )
    theta = float(torch.exp(-(frequencies[1:].log() / exponent[1:]).median())) if len(frequencies) > 1 else 0.0
    known = (1e4, 1e5, 1e6, 5e5, 25e3, 5e6)
    for value in dict.fromkeys((float(f"{theta:.3g}"), theta, *known)):
        if value > 1 and value != config.rope_theta:
            text = f"with theta {value:g} in place of {config.rope_theta:g}"
            yield candidate("theta", text, value**-exponent, stretch)
    yield candidate(
        "frequencies", "with other frequencies: another rope scaling, or other numbers in it", frequencies, stretch
    )


def _fit(scene: Scene) -> tuple[Tensor, float] | None:
    """Frequencies (d/2,) float64 and stretch of the recorded tables at the first token of position 1."""
    cos, sin = scene.recorded("rotary.cos"), scene.recorded("rotary.sin")
    ones = (scene.formula.positions == 1).logical_and(scene.formula.keep).nonzero()
    if cos is None or sin is None or not len(ones):
        return None
    row, column = ones[0].tolist()
    half = cos.shape[-1] // 2
    c, s = (x[min(row, len(x) - 1), column, :half] for x in (cos, sin))
    return torch.atan2(s, c).abs().clamp(min=1e-12), float((c**2 + s**2).sqrt().median())


def rotation(scene: Scene) -> Iterator[Candidate]:
    """q or k turned in another way."""
    formula = scene.formula
    x, cos, sin = scene.inputs()
    heads = formula.split(x)
    yield Candidate("not_rotated", "left out: not rotated at all", heads)
    yield Candidate(
        "interleaved", "with pairs (2i, 2i + 1) rotated, Meta's way, on half-split rows", _pairs(heads, cos, sin)
    )
    halves = torch.stack((-heads[..., 1::2], heads[..., ::2]), dim=-1).flatten(-2)
    if halves.shape[-1] == cos.shape[-1]:
        text = "with pairs (2i, 2i + 1) exchanged, but cos and sin of half-split pairs"
        yield Candidate("interleaved", text, heads * cos[:, None] + halves * sin[:, None])
    yield Candidate("reversed", "rotated backwards", scene.compute([x, cos, -sin]))
    yield Candidate("rotated_twice", "rotated twice", scene.compute([scene.compute(), cos, sin]))
    yield Candidate("swapped", "with cos and sin exchanged", scene.compute([x, sin, cos]))
    if formula.stretch != 1.0:
        plain = scene.compute([x, cos / formula.stretch, sin / formula.stretch])
        yield Candidate("stretch", f"without the factor {formula.stretch:.6g} of cos and sin", plain)
    for part in (2, 4):
        size = cos.shape[-1] // part
        if size >= 2:
            yield Candidate("partial", f"with only {size} numbers of each head rotated", _partly(scene, size))
    assert formula.frequencies is not None
    counted = torch.arange(formula.tokens.shape[1], device=x.device).expand_as(formula.positions)
    for text, positions in [
        ("with padding counted: positions of slots, not of real tokens", counted),
        *((f"with every position {step:+d}", formula.positions + step) for step in (1, -1, 2, -2)),
    ]:
        yield Candidate("positions", text, scene.compute([x, *tables(positions, formula.frequencies, formula.stretch)]))
    other = (
        scene.name.replace("q_rotated", "k_proj")
        if "q_rotated" in scene.name
        else scene.name.replace("k_rotated", "q_proj")
    )
    swapped = scene.recorded(other)
    if swapped is not None and swapped.shape == x.shape:
        yield Candidate("wrong_input", f"of {other}", scene.compute([swapped, cos, sin]))


def _pairs(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    c, s = (table[:, None, :, : size // 2] for table in (cos, sin))
    even, odd = heads[..., :size:2], heads[..., 1:size:2]
    turned = torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)
    return torch.cat((turned, heads[..., size:]), dim=-1)


def _partly(scene: Scene, size: int) -> Tensor:
    """Only the first numbers of each head turn, with the first frequencies."""
    x, cos, sin = scene.inputs()
    half = cos.shape[-1] // 2
    index = torch.cat((torch.arange(size // 2), half + torch.arange(size // 2)))
    return scene.compute([x, cos[..., index], sin[..., index]])
