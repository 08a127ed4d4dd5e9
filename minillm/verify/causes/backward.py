"""How a gradient goes wrong: a part of its sum that is missing or counted twice."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.verify.scene import Candidate, Scene


def terms(scene: Scene) -> Iterator[Candidate]:
    """The gradient of what several operations read is the sum of their parts: one left out, or twice in it."""
    readers, parts = scene.case.operation.inputs, scene.inputs()
    if len(parts) < 2:
        return
    for reader, part in zip(readers, parts, strict=True):
        yield Candidate("term_missing", f"without the part that comes through {reader}", scene.case.exact - part)
        yield Candidate("term_twice", f"with the part through {reader} twice", scene.case.exact + part)
