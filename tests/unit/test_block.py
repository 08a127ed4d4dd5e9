"""The feed-forward layers, the linear with two roundings, and the two topologies, each against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minillm.model.block import ParallelBlock, SequentialBlock, make_block
from minillm.model.linear import SeparateBiasLinear, make_linear
from minillm.model.mlp import ACTIVATIONS, GatedMLP, PlainMLP, make_mlp
from tests.decoders import config, decoder
from tests.error import assert_near

X = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def erf_gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def tanh_gelu(x: float) -> float:
    return x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("gelu", erf_gelu),
        ("gelu_tanh", tanh_gelu),
        ("relu", lambda x: max(x, 0.0)),
    ],
)
def test_activations(name: str, formula: Any) -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    assert ACTIVATIONS[name](x).tolist() == pytest.approx([formula(float(value)) for value in x], rel=1e-12, abs=1e-15)


def times(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("separate", [True, False])
@torch.inference_mode()
def test_feed_forward_layers(bias: bool, separate: bool) -> None:
    shape = {"mlp_bias": bias, "separate_bias": separate, "activation": "silu"}
    gated, plain = (make_mlp(config(mlp=kind, **shape)).double() for kind in ("gated", "plain"))
    assert isinstance(gated, GatedMLP) and isinstance(plain, PlainMLP)
    silu = ACTIVATIONS["silu"]
    expected = times(gated.down_proj, silu(times(gated.gate_proj, X)) * times(gated.up_proj, X))
    assert_near(gated(X), expected, 1e-14)
    assert_near(plain(X), times(plain.down_proj, silu(times(plain.up_proj, X))), 1e-14)
    for layer in (gated.gate_proj, gated.up_proj, gated.down_proj, plain.up_proj, plain.down_proj):
        assert (layer.bias is not None) is bias and isinstance(layer, SeparateBiasLinear) is separate


@torch.inference_mode()
def test_a_separate_bias_is_rounded_twice() -> None:
    shape = config(separate_bias=True)
    twice = make_linear(shape, 32, 64, bias=True).to(torch.bfloat16)
    x = X.bfloat16()
    product = x @ twice.weight.T
    assert torch.equal(twice(x), product + twice.bias)
    assert not torch.equal(twice(x), nn.functional.linear(x, twice.weight, twice.bias))


def blocks(**fields: Any) -> Any:
    return decoder(**fields).double().blocks[0]


@torch.inference_mode()
def test_sequential() -> None:
    block = blocks()
    middle = X + block.attention(block.attention_norm(X), None, None, None)
    assert isinstance(block, SequentialBlock)
    assert_near(block(X, None, None, None), middle + block.mlp(block.mlp_norm(middle)), 1e-14)


@pytest.mark.parametrize("norms", [1, 2])
@torch.inference_mode()
def test_parallel(norms: int) -> None:
    block = blocks(block="parallel", parallel_norms=norms)
    assert isinstance(block, ParallelBlock) and (block.mlp_norm is None) is (norms == 1)
    for_mlp = block.attention_norm if norms == 1 else block.mlp_norm
    expected = X + block.attention(block.attention_norm(X), None, None, None) + block.mlp(for_mlp(X))
    assert_near(block(X, None, None, None), expected, 1e-14)


@torch.inference_mode()
def test_parallel_branches_meet_before_the_residual() -> None:
    block, x = blocks(block="parallel").bfloat16(), X.bfloat16()
    normed = block.attention_norm(x)
    attended, fed = block.attention(normed, None, None, None), block.mlp(normed)
    assert torch.equal(block(x, None, None, None), x + (fed + attended))
    assert not torch.equal(block(x, None, None, None), (x + fed) + attended)


def test_the_config_chooses() -> None:
    assert type(make_block(config(block="sequential"))) is SequentialBlock
    assert type(make_block(config(block="parallel"))) is ParallelBlock
    names = {name.split(".")[0] for name, _ in make_block(config(block="parallel")).named_parameters()}
    assert names == {"attention_norm", "attention", "mlp"}  # one norm: no second one that training would leave unused
