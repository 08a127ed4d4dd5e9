"""Fixtures shared by the tests: models that transformers made, loaded by us; made once a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from minillm.checkpoint.load import load_model
from minillm.model import Decoder
from tests import tiny

# Threads cost more than they bring on models this small.
torch.set_num_threads(1)


class Pair(NamedTuple):
    """The same weights twice: transformers' model, and ours as loaded from the folder it saved."""

    variant: tiny.Variant
    theirs: Any
    ours: Decoder


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """pair("falcon_7b") -> both models, cached for the session; tests must not change them."""
    pytest.importorskip("transformers", reason="the oracle; pip install -e .[test]")
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            theirs = tiny.build(tiny.VARIANTS[name])
            folder = tiny.save(theirs, tmp_path_factory.mktemp(name))
            made[name] = Pair(tiny.VARIANTS[name], theirs, load_model(folder))
        return made[name]

    return make
