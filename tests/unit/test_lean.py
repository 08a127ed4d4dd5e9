"""RMSNorm and SwiGLU with backward passes by hand: bits, derivatives, what is kept, and where the modules use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minillm.model.mlp import GatedMLP
from minillm.model.norms import RMSNorm
from minillm.ops import lean
from tests.decoders import config
from tests.error import assert_near, assert_rule_of_two

EPS, ROWS, WIDTH = 1e-2, (3, 5), 24
Function = Callable[[Tensor, Tensor], Tensor]


class Op(NamedTuple):
    """Ours, and the definition that the model's module has, both of two tensors."""

    ours: Function
    plain: Function
    second: tuple[int, ...]  # shape of the second


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """`RMSNorm.in_torch` with this weight."""
    module = RMSNorm(WIDTH, EPS)
    del module.weight
    module.weight = weight  # type: ignore[assignment]
    return module.in_torch(x)


NORM = Op(lambda x, weight: lean.rms_norm(x, weight, EPS), norm, (WIDTH,))
GATED = Op(lean.swiglu, lambda gate, up: F.silu(gate) * up, (*ROWS, WIDTH))
EVERY_OP = pytest.mark.parametrize("op", [NORM, GATED], ids=["rms_norm", "swiglu"])
FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(op: Op, *dtypes: torch.dtype) -> list[Tensor]:
    """One dtype for both, or one each."""
    tensors = drawn(*ROWS, WIDTH), drawn(*op.second, seed=1)
    return [x.to(dtype).requires_grad_() for x, dtype in zip(tensors, dtypes * (2 // len(dtypes)), strict=True)]


def kept(function: Function, *tensors: Tensor) -> set[tuple[int, ...]]:
    """Shapes that autograd keeps, those of tensors kept twice once; each with the bytes of a number."""
    found: dict[int, tuple[int, ...]] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.data_ptr()] = (*x.shape, x.itemsize)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function(*tensors)
    assert y.requires_grad
    return {*found.values()}


@EVERY_OP
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_forward_has_the_bits_of_the_definition(op: Op, dtype: torch.dtype) -> None:
    tensors = inputs(op, dtype)
    ours, plain = op.ours(*tensors), op.plain(*tensors)
    assert ours.dtype == dtype and torch.equal(ours, plain)


@EVERY_OP
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_gradients_are_derivatives(op: Op, frozen: int | None) -> None:
    tensors = inputs(op, torch.float64)
    if frozen is not None:
        tensors[frozen].requires_grad_(False)
    assert torch.autograd.gradcheck(op.ours, tensors)


@pytest.mark.parametrize(
    ("op", "dtypes"),
    [
        *((op, (dtype,)) for op in (NORM, GATED) for dtype in FORMATS[1:]),
        (NORM, (torch.bfloat16, torch.float32)),
        (NORM, (torch.float32, torch.bfloat16)),
    ],
    ids=["norm", "norm", "norm", "gated", "gated", "gated", "norm", "norm"],
)
def test_gradients_as_exact_as_autograds(op: Op, dtypes: tuple[torch.dtype, ...]) -> None:
    """A norm's weight may be fp32 beside 16-bit x, or the reverse."""
    ours, plain = inputs(op, *dtypes), inputs(op, *dtypes)
    exact = [x.detach().double().requires_grad_() for x in ours]
    slope = drawn(*ROWS, WIDTH, seed=2)
    found = []
    for function, tensors in ((op.ours, ours), (op.plain, plain), (op.plain, exact)):
        y = function(*tensors)
        found.append(torch.autograd.grad(y, tensors, slope.to(y.dtype)))
    for x, gradients in zip(ours, zip(*found, strict=True), strict=True):
        assert gradients[0].dtype == x.dtype and gradients[0].shape == x.shape
        assert_rule_of_two(*gradients, str(dtypes))


def test_a_row_of_zeros_and_a_single_row() -> None:
    for x in (torch.zeros(2, WIDTH), drawn(WIDTH)):
        tensors = x.double().requires_grad_(), drawn(WIDTH, seed=1).requires_grad_()
        ours, plain = (torch.autograd.grad(op(*tensors).square().sum(), tensors) for op in (NORM.ours, NORM.plain))
        for a, b in zip(ours, plain, strict=True):
            assert_near(a, b, 1e-14, "gradient")


def test_squares_do_not_overflow_float16() -> None:
    x = torch.linspace(-3e4, 3e4, WIDTH).half().requires_grad_()
    y = lean.rms_norm(x, torch.ones(WIDTH).half(), EPS)
    (gradient,) = torch.autograd.grad(y, x, 1000 * torch.ones(WIDTH).half())
    assert bool(torch.isfinite(y).all() & torch.isfinite(gradient).all()) and bool((gradient != 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept(dtype: torch.dtype) -> None:
    size, whole = dtype.itemsize, (*ROWS, WIDTH)
    assert kept(NORM.ours, *inputs(NORM, dtype)) == {(*whole, size), (WIDTH, size), (*ROWS, 1, 4)}
    assert kept(GATED.ours, *inputs(GATED, dtype)) == {(*whole, size)}
    gate, up = inputs(GATED, dtype)
    assert len(kept(GATED.ours, gate, up.detach())) == 1


def test_up_is_kept_for_the_gate_alone() -> None:
    gate, up = inputs(GATED, torch.float32)
    node = lean.swiglu(gate.detach(), up).grad_fn
    assert [x is None for x in node.saved_tensors] == [False, True]  # type: ignore[union-attr]


@EVERY_OP
def test_second_derivatives_are_refused(op: Op) -> None:
    tensors = inputs(op, torch.float64)
    gradient = torch.autograd.grad(op.ours(*tensors).square().sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


@EVERY_OP
def test_within_checkpointing_the_same_bits(op: Op) -> None:
    tensors = inputs(op, torch.float32)
    plain = torch.autograd.grad(op.ours(*tensors).sum(), tensors)
    again = torch.autograd.grad(checkpoint(op.ours, *tensors, use_reentrant=False).sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def uses_ours(y: Tensor) -> bool:
    return "Backward" in type(y.grad_fn).__name__ and type(y.grad_fn).__module__ == "torch.autograd.function"


def test_wanted_for_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(2), torch.ones(2, requires_grad=True)
    assert lean.wanted(x, weight) and not lean.wanted(x)
    with torch.no_grad():
        assert not lean.wanted(x, weight), "inference has kernels of its own"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not lean.wanted(x, weight)


def test_where_the_modules_use_them() -> None:
    module, x = RMSNorm(WIDTH, EPS), drawn(9, WIDTH).float()
    assert uses_ours(module(x))
    assert not uses_ours(module.requires_grad_(False)(x)) and uses_ours(module(x.requires_grad_()))
    with torch.no_grad():
        assert torch.equal(module(x), module.in_torch(x))
    for activation in ("gelu", "silu"):
        mlp = GatedMLP(config(activation=activation))
        assert uses_ours(mlp.gated(*inputs(GATED, torch.float32))) is (activation == "silu")
    y = mlp.gated(*inputs(GATED, torch.bfloat16, torch.float32))  # formats that promote are autograd's
    assert y.dtype == torch.float32 and not uses_ours(y)
