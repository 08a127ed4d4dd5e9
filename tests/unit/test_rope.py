"""Rotary embedding: fp32 whatever the model's dtype (T1), a turn by differences only, and where stretchings switch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.config import DynamicRope, LinearRope, Llama3Rope, LongRope, RopeScaling, YarnRope
from minillm.model.rope import Rotary, attention_factor, frequencies, rotate
from tests import tiny
from tests.decoders import config, decoder
from tests.error import assert_near

U = torch.finfo(torch.float32).eps / 2  # the largest relative error of one fp32 rounding
FAR = 100_000
LONG = LongRope(4.0, 16, short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(2.1, 3.3, 5.7, 8.9))
SCALINGS: dict[str, RopeScaling | None] = {
    "none": None,
    "linear": LinearRope(4.0),
    "dynamic": DynamicRope(2.0),
    "llama3": Llama3Rope(8.0, 1.0, 4.0, 32),
    "yarn": YarnRope(4.0, 32),
    "longrope": LONG,
}
EVERY_SCALING = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=list(SCALINGS))
LOWER = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])


def positions(*numbers: int) -> Tensor:
    return torch.tensor([numbers])


# -- T1: fp32, always --------------------------------------------------------------------------------------------------


@EVERY_SCALING
@LOWER
def test_the_models_dtype_does_not_reach_the_frequencies(scaling: RopeScaling | None, dtype: torch.dtype) -> None:
    model = decoder(rope_scaling=scaling)
    assert model.rotary is not None
    expected = model.rotary(positions(0, 7, FAR), torch.float32)
    model.to(dtype)
    for wanted in (torch.float32, dtype):
        for found, exact in zip(model.rotary(positions(0, 7, FAR), wanted), expected, strict=True):
            assert torch.equal(found, exact.to(wanted))  # rounded last: once, from fp32


@pytest.mark.parametrize(("theta", "size"), [(1e4, 64), (5e5, 128), (1e6, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_position_100_000_is_right_to_fp32_rounding(theta: float, size: int, dtype: torch.dtype) -> None:
    """Against float64.

        angle = p * theta^(-e)    e = 2i/d, one rounding, moves the angle by e ln(theta) U of itself
                                  the power (2 U), its reciprocal (U) and the product (U): 4 U more

    so |error of cos, sin| <= angle * (4 + e ln theta) U, and at most 2 U for the function itself.
    """
    rotary = decoder(rope_theta=theta, head_size=size).to(dtype).rotary
    assert rotary is not None
    e = torch.arange(0, size, 2, dtype=torch.float64) / size
    angle = (FAR * theta**-e).repeat(2)
    bound = angle * (4 + e * math.log(theta)).repeat(2) * U + 2 * U
    for found, exact in zip(rotary(positions(FAR), torch.float32), (angle.cos(), angle.sin()), strict=True):
        assert found.shape == (1, 1, 1, size)
        assert ((found[0, 0, 0].double() - exact).abs() <= bound).all()


def test_a_bfloat16_frequency_would_be_wrong_by_whole_turns() -> None:
    f = frequencies(config(head_size=64), 1)
    assert ((f - f.bfloat16().float()).abs().max() * FAR / (2 * math.pi)) > 1


@EVERY_SCALING
def test_autocast_does_not_reach_the_angles(scaling: RopeScaling | None) -> None:
    rotary = Rotary(config(rope_scaling=scaling))
    expected = rotary(positions(5, FAR), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = rotary(positions(5, FAR), torch.float32)
    assert all(map(torch.equal, found, expected))


@EVERY_SCALING
def test_the_default_dtype_does_not_reach_the_frequencies(scaling: RopeScaling | None) -> None:
    shape = config(rope_scaling=scaling)
    expected = frequencies(shape, 100)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = frequencies(shape, 100)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("name", ["none", "linear", "llama3", "yarn"])  # the others depend on numbers that meta lacks
def test_the_frequencies_survive_the_meta_device(name: str) -> None:
    model, tokens = decoder(rope_scaling=SCALINGS[name]), tiny.tokens(1, 5)
    expected = model(tokens)
    copy_of = copy.deepcopy(model).to("meta")
    assert copy_of(tokens.to("meta")).shape == expected.shape
    copy_of.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(copy_of(tokens), expected)


def test_rotary_has_nothing_to_save_or_train() -> None:
    rotary = Rotary(config())
    assert not list(rotary.parameters()) and not list(rotary.buffers()) and not rotary.state_dict()


# -- what it does ------------------------------------------------------------------------------------------------------


def test_pairs_are_half_a_head_apart() -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    cos, sin = Rotary(config(head_size=4))(positions(3), torch.float32)
    assert rotate(x, cos, sin).flatten().tolist() == pytest.approx([math.cos(3), 0, math.sin(3), 0])


@EVERY_SCALING
def test_only_differences_of_positions_count(scaling: RopeScaling | None) -> None:
    """q_5 . k_3 is q_22 . k_20, and not q_22 . k_21; angles up to 22 are right to 22 * 8 roundings."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=generator)
    rotary = Rotary(config(rope_scaling=scaling))
    cos, sin = (x.double()[0, 0] for x in rotary(torch.arange(23)[None], torch.float32))

    def score(i: int, j: int) -> float:
        return float((rotate(q, cos[i], sin[i]) * rotate(k, cos[j], sin[j])).sum())

    bound = 22 * 8 * U * float(q.norm() * k.norm()) * attention_factor(rotary.config) ** 2
    assert abs(score(5, 3) - score(22, 20)) < bound
    assert abs(score(5, 3) - score(22, 21)) > 100 * bound


def test_position_0_is_the_identity_and_lengths_stay() -> None:
    x = torch.randn(2, 3, 4, 8)
    turned = rotate(x, *Rotary(config())(positions(0, 1, 20, 300), torch.float32))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert not torch.equal(turned[:, :, 1], x[:, :, 1])
    assert_near(turned.norm(dim=-1), x.norm(dim=-1), 4 * U)  # two products, a sum, and cos, sin themselves


def test_partial_rotary_leaves_the_rest_untouched() -> None:
    x = torch.randn(2, 3, 5, 8)
    rotation = Rotary(config(rotary_size=4))(torch.arange(5)[None], torch.float32)
    assert rotation[0].shape == (1, 1, 5, 4)
    turned = rotate(x, *rotation)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], rotate(x[..., :4], *rotation))


def test_rows_have_positions_of_their_own() -> None:
    rotary = Rotary(config())
    both = torch.tensor([[0, 1, 2], [5, 6, 7]])
    cos, _ = rotary(both, torch.float32)
    assert cos.shape == (2, 1, 3, 8)
    assert all(torch.equal(cos[r], rotary(both[r : r + 1], torch.float32)[0][0]) for r in range(2))


# -- stretchings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "divisor"), [(14, 1.1), (15, 1.1), (16, 3.3)])
def test_longrope_switches_after_the_original_context(last: int, divisor: float) -> None:
    """16 tokens, the last at position 15, are still short; the longest row of the batch decides for all."""
    rotary = Rotary(config(rope_scaling=LONG))
    cos, _ = rotary(torch.tensor([[1], [last]]), torch.float32)
    factor = math.sqrt(1 + math.log(4) / math.log(16))
    assert float(cos[0, 0, 0, 1]) == pytest.approx(factor * math.cos(1e4**-0.25 / divisor))


@pytest.mark.parametrize("last", [0, 30, 63])
def test_dynamic_is_plain_up_to_the_context(last: int) -> None:
    stretched, plain = Rotary(config(rope_scaling=DynamicRope(2.0))), Rotary(config())
    assert torch.equal(stretched(positions(last), torch.float32)[0], plain(positions(last), torch.float32)[0])
    assert not torch.equal(stretched(positions(64), torch.float32)[0], plain(positions(64), torch.float32)[0])


def test_dynamic_theta_by_hand() -> None:
    # L = 128, M = 64, factor 2: theta * (2 * 128 / 64 - 1)^(8/6)
    theta = 1e4 * 3 ** (8 / 6)
    found = frequencies(config(rope_scaling=DynamicRope(2.0)), 128)
    assert found.tolist() == pytest.approx([theta**-0.0, theta**-0.25, theta**-0.5, theta**-0.75], rel=8 * U)


FACTORS: list[tuple[dict[str, Any], float]] = [
    ({"rope_scaling": None}, 1.0),
    ({"rope_scaling": LinearRope(4.0)}, 1.0),
    ({"rope_scaling": YarnRope(4.0, 32)}, 0.1 * math.log(4) + 1),
    ({"rope_scaling": YarnRope(1.0, 32)}, 1.0),
    ({"rope_scaling": YarnRope(4.0, 32, attention_factor=0.8, mscale=2.0, mscale_all_dim=3.0)}, 0.8),
    ({"rope_scaling": YarnRope(4.0, 32, mscale=1.0, mscale_all_dim=1.0)}, 1.0),
    ({"rope_scaling": YarnRope(4.0, 32, mscale=2.0)}, 0.1 * math.log(4) + 1),  # one of the two alone is not read
    ({"rope_scaling": LONG}, math.sqrt(1.5)),  # 1 + ln 4 / ln 16
]


@pytest.mark.parametrize(("fields", "factor"), FACTORS)
def test_how_much_longer_q_and_k_become(fields: dict[str, Any], factor: float) -> None:
    shape = config(**fields)
    assert attention_factor(shape) == pytest.approx(factor, rel=1e-15)
    assert float(Rotary(shape)(positions(0), torch.float32)[0][0, 0, 0, 0]) == pytest.approx(factor, rel=2 * U)
