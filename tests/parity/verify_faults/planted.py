"""What a planted fault is, and the few ways in which one is planted.

A fault goes into a copy of our model, into a copy of transformers' model, or by monkeypatching into the code of either.
Where it shows first and why is written down beforehand, from what the fault is, not from what is found.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from minillm.checkpoint import falcon, llama
from minillm.checkpoint.load import load_model
from minillm.model import Decoder, attention
from minillm.verify.transformers_oracle import Oracle


@dataclass
class Bench:
    """Both sides, free to be spoilt: models are copies, patches last as long as the test. folder() has the weights."""

    folder: Callable[[], Path]
    dtype: torch.dtype
    ours: Decoder
    theirs: Oracle
    patch: pytest.MonkeyPatch

    def reload(self) -> None:
        """Our model once more, through a loader that was patched meanwhile."""
        self.ours = load_model(self.folder(), dtype=self.dtype)


Plant = Callable[[Bench], object]


@dataclass(frozen=True)
class Planted:
    """A fault, and what `minillm verify` must say of it.

    operation: the first one that is wrong. cause: its key, or several that say the same, joined by "|"; empty where
    there is no formula to name (a number changed, dropout), and then none may be named. length: tokens in a row.
    """

    variant: str
    plant: Plant
    operation: str
    cause: str = ""
    side: Literal["ours", "theirs"] = "ours"
    dtype: torch.dtype = torch.float32
    length: int = 60


def weights(spoil: Callable[[Decoder], object]) -> Plant:
    """Change our weights in place."""

    def plant(bench: Bench) -> None:
        with torch.no_grad():
            spoil(bench.ours)

    return plant


def every(ending: str, change: Callable[[Tensor, Decoder], Tensor]) -> Plant:
    """Replace each of our parameters whose name ends so."""

    def spoil(model: Decoder) -> None:
        chosen = [parameter for name, parameter in model.named_parameters() if name.endswith(ending)]
        assert chosen, ending
        for parameter in chosen:
            parameter.copy_(change(parameter.clone(), model))

    return weights(spoil)


def swapped(*pairs: tuple[str, str]) -> Plant:
    """Exchange parameters of our model."""

    def spoil(model: Decoder) -> None:
        for a, b in pairs:
            first, second = model.get_parameter(a), model.get_parameter(b)
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)

    return weights(spoil)


def both(*plants: Plant) -> Plant:
    """One after the other."""

    def plant(bench: Bench) -> None:
        for each in plants:
            each(bench)

    return plant


def misread(**fields: Any) -> Plant:
    """Our loader reads these fields of config.json wrongly; a function is given the right value."""

    def plant(bench: Bench) -> None:
        for family in (llama, falcon):
            right = family.config_from_hf

            def wrong(*args: Any, right: Any = right, **kwargs: Any) -> Any:
                config = right(*args, **kwargs)
                new = {name: x(getattr(config, name)) if callable(x) else x for name, x in fields.items()}
                assert any(getattr(config, name) != x for name, x in new.items()), "nothing is misread"
                return replace(config, **new)

            bench.patch.setattr(family, "config_from_hf", wrong)
        bench.reload()

    return plant


def forward(modules: Callable[[Bench], Any], wrong: Callable[..., Any]) -> Plant:
    """Give modules (one, or a list) another forward: wrong(module, right, *args) with `right` the one they had."""

    def plant(bench: Bench) -> None:
        chosen = modules(bench)
        for module in [chosen] if isinstance(chosen, nn.Module) else list(chosen):
            right = module.forward

            def replaced(self: nn.Module, *args: Any, right: Any = right, **kwargs: Any) -> Any:
                return wrong(self, right, *args, **kwargs)

            module.forward = types.MethodType(replaced, module)

    return plant


def output(modules: Callable[[Bench], Any], change: Callable[[Any], Any]) -> Plant:
    """Change what modules return."""
    return forward(modules, lambda _, right, *args, **kwargs: change(right(*args, **kwargs)))


def attend(wrong: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Plant:
    """Attend in another way: wrong(q, k, v, mask), shapes as in `minillm.model.attention.attend`."""
    return lambda bench: bench.patch.setattr(attention, "attend", wrong)


def part(path: str) -> Callable[[Bench], nn.Module]:
    """A module of ours by name."""
    return lambda bench: bench.ours.get_submodule(path)


def parts(ending: str) -> Callable[[Bench], list[nn.Module]]:
    """Our modules whose names end so."""
    return lambda bench: [module for name, module in bench.ours.named_modules() if name.endswith(ending)]


def through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rounded to another dtype and back."""
    return lambda x: x.to(dtype).to(x.dtype)


def one_late(x: Tensor, dim: int = 1) -> Tensor:
    """Moved one token along, the first one twice."""
    return torch.cat((x.narrow(dim, 0, 1), x.narrow(dim, 0, x.shape[dim] - 1)), dim)
