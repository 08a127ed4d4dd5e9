"""Float linears of a model swapped for quantised ones.

    int8   LLM.int8(): one byte a weight                        minillm.quant.int8_linear
    nf4    QLoRA's 4-bit NormalFloat                            minillm.quant.nf4_linear
    fp4    4 bits of floating point, for checkpoints that have it

The head stays float, as in the papers and in transformers: its outputs are what is compared, and its share is small.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minillm.errors import InputError, nearest
from minillm.ops import int8
from minillm.quant.int8_linear import LinearInt8
from minillm.quant.nf4_linear import LinearNF4

HEAD = ("lm_head",)


@dataclass(frozen=True)
class Quantisation:
    """How linears are quantised.

    threshold: for int8, from where on a number of x makes its column an outlier; 0: never. double_quant: for 4 bits,
    the blocks' scales in 8 bits too. skip: leaf names, or ends of full names, of those that stay float.
    """

    kind: str
    threshold: float = int8.THRESHOLD
    double_quant: bool = True
    skip: tuple[str, ...] = HEAD

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"quantisation {self.kind!r} is unknown{nearest(self.kind, KINDS)}; have {', '.join(KINDS)}"
            )


KINDS: Mapping[str, Callable[[nn.Linear, Quantisation], nn.Module]] = {
    "int8": lambda linear, how: LinearInt8.from_float(linear, threshold=how.threshold),
    "nf4": lambda linear, how: LinearNF4.from_float(linear, kind="nf4", double_quant=how.double_quant),
    "fp4": lambda linear, how: LinearNF4.from_float(linear, kind="fp4", double_quant=how.double_quant),
}


#: The classes of quantised layers.
QUANTISED = (LinearInt8, LinearNF4)


def as_quantisation(how: Quantisation | str | None) -> Quantisation | None:
    """`"int8"` -> that kind with its defaults; None stays None."""
    return Quantisation(how) if isinstance(how, str) else how


def quantize_linears(model: nn.Module, how: Quantisation | str) -> list[str]:
    """Swap the float linears of `model`, in place, one at a time; returns their names.

    Works on the meta device too: the layers are then filled as the checkpoint is read. Raises InputError where a name
    in `skip` fits nothing: a layer would be quantised that was meant to stay. Beneath adapters the base is quantised,
    named `....q_proj.base`, as if they had come later; InputError where an adapter retrains the weight itself.
    """
    how = Quantisation(how) if isinstance(how, str) else how
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    _check_skip(how.skip, [name for name, _ in model.named_modules()])
    chosen = [name for name in linears if not skipped(name, how.skip)]
    for name in chosen:
        owner = name.rpartition(".")[0]
        if getattr(model.get_submodule(owner), "stays_float", False):
            raise InputError(f"{owner} is retrained by an adapter; name it in skip, or take the adapter off first")
    swap(model, chosen, how)
    return chosen


def swap(model: nn.Module, names: Iterable[str], how: Quantisation) -> None:
    """Put a quantised layer in the place of each of these float linears."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), leaf, KINDS[how.kind](linear, how))


def float_shapes(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that a float checkpoint fills, on the meta device: a quantised weight as (N, K), no scales."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QUANTISED)}
    shapes = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner not in layers or leaf == "bias":
            shapes[name] = parameter.to("meta")
        elif leaf == "weight":
            shapes[name] = torch.empty(layers[owner].shape, device="meta")
    return shapes


def skipped(name: str, skip: Collection[str]) -> bool:
    """Whether a module's full name is, ends with, or lies within one of `skip`.

    >>> [skipped(name, ["up_proj", "lm_head"]) for name in ("blocks.0.mlp.up_proj", "lm_head.score", "up_proj2")]
    [True, True, False]
    """
    return any(f".{entry}." in f".{name}." for entry in skip)


def _check_skip(skip: Collection[str], names: Collection[str]) -> None:
    for entry in skip:
        if entry not in HEAD and not any(skipped(name, [entry]) for name in names):  # a tied head is no layer
            leaves = {name.rpartition(".")[2] for name in names}
            raise InputError(f"skip names {entry!r}, and no layer is called so{nearest(entry, leaves)}; correct it")
