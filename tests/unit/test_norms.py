"""RMSNorm and LayerNorm against their formulas in float64, and in which dtype each step is done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minillm.model.norms import LayerNorm, RMSNorm, make_norm
from tests.decoders import config
from tests.error import assert_near, assert_rule_of_two

EPS = 1e-2  # large, so that a misplaced one shows


def drawn(kind: type[RMSNorm] | type[LayerNorm], size: int = 24) -> RMSNorm | LayerNorm:
    norm = kind(size, EPS).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    return norm


def rms(x: Tensor, norm: nn.Module) -> Tensor:
    return norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def layer(x: Tensor, norm: nn.Module) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return norm.weight * centred / (centred.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt() + norm.bias


Formula = Callable[[Tensor, nn.Module], Tensor]
FORMULAS = pytest.mark.parametrize(("kind", "formula"), [(RMSNorm, rms), (LayerNorm, layer)])


@FORMULAS
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 5, 24)])
def test_formula(kind: type, formula: Formula, shape: tuple[int, ...]) -> None:
    norm = drawn(kind).double()
    x = torch.randn(shape, dtype=torch.float64) * 0.1 + 0.05  # mean(x^2) near eps
    assert_near(norm(x), formula(x, norm), 1e-14)  # float64 rounds at 1e-16


@FORMULAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(kind: type, formula: Formula, dtype: torch.dtype) -> None:
    norm, x = drawn(kind).to(dtype), torch.randn(64, 24).to(dtype)
    exact = formula(x.double(), drawn(kind).to(dtype).double())
    assert norm(x).dtype == dtype
    assert_rule_of_two(norm(x), formula(x, norm), exact, str(dtype))


@FORMULAS
def test_squares_do_not_overflow_float16(kind: type, formula: Formula) -> None:
    norm, x = drawn(kind).half(), torch.linspace(-3e4, 3e4, 24).half()  # 300^2 is already beyond float16
    # one rounding of the normalised x and one of the product
    assert_near(norm(x), formula(x.double(), norm), 2 * torch.finfo(torch.float16).eps)


def test_rms_rounds_before_the_weight() -> None:
    norm = drawn(RMSNorm).to(torch.bfloat16)
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    assert torch.equal(norm(x), norm.weight * unit.bfloat16())
    assert not torch.equal(norm(x), (norm.weight.float() * unit).bfloat16())  # the other order has other bits


def test_the_config_chooses() -> None:
    kinds = {"rms": RMSNorm, "layer": LayerNorm}
    for name, kind in kinds.items():
        norm = make_norm(config(norm=name, norm_eps=3e-4))
        assert type(norm) is kind and norm.eps == 3e-4 and norm.weight.shape == (32,)
    assert [p.shape for p in make_norm(config()).parameters()] == [(32,)]  # RMSNorm has no bias
