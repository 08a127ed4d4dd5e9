"""The checkers themselves: each small fault of a model that we know of must fail them, and a sound model pass."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from minillm.model import Decoder, decoder
from tests import tiny
from tests.decoders import SHAPES
from tests.decoders import decoder as make
from tests.error import assert_near, assert_rule_of_two, distance

EVERY = pytest.mark.parametrize("shape", SHAPES)
TOKENS = tiny.tokens(2, 24)


@torch.inference_mode()
def logits(model: Decoder) -> Tensor:
    return model(TOKENS)


def assert_caught(faulty: Tensor, sound: Decoder) -> None:
    """Both checkers pass the sound model and fail the faulty logits."""
    plain, exact = logits(sound), logits(copy.deepcopy(sound).double())
    assert_near(plain, exact.float())
    assert_rule_of_two(plain, plain, exact, "sound")
    with pytest.raises(AssertionError, match="of the largest value away"):
        assert_near(faulty, plain)
    with pytest.raises(AssertionError, match="the plain formula's"):
        assert_rule_of_two(faulty, plain, exact, "faulty")


@EVERY
def test_one_percent_of_the_logits(shape: str) -> None:
    model = make(**SHAPES[shape])
    assert_caught(logits(model) * 1.01, model)


@EVERY
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "mlp.down_proj", "norm"])
def test_one_percent_of_one_weight(shape: str, name: str) -> None:
    model = make(**SHAPES[shape])
    faulty = copy.deepcopy(model)
    with torch.no_grad():
        next(p for key, p in faulty.named_parameters() if f"{name}.weight" in key).mul_(1.01)
    assert_caught(logits(faulty), model)


@EVERY
def test_two_heads_transposed(shape: str) -> None:
    model = make(**SHAPES[shape])
    faulty = copy.deepcopy(model)
    attention, size = faulty.blocks[0].attention, model.config.head_size
    with torch.no_grad():
        for parameter in attention.q_proj.parameters():
            parameter[: 2 * size] = parameter[: 2 * size].roll(size, dims=0)
    assert_caught(logits(faulty), model)


@EVERY
def test_a_position_off_by_one(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last token's: rotary and ALiBi do not notice if all positions shift together."""
    right = decoder._positions

    def shifted(*args: object) -> Tensor:
        positions = right(*args)  # type: ignore[arg-type]
        return torch.cat((positions[:, :-1], positions[:, -1:] + 1), dim=1)

    model = make(**SHAPES[shape])
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "_positions", shifted)
        faulty = logits(model)
    assert_caught(faulty, model)


def test_another_epsilon() -> None:
    assert_caught(logits(make(norm_eps=1e-6)), make(norm_eps=1e-5))


def with_one(value: float) -> Tensor:
    numbers = torch.ones(2, 3)
    numbers[1, 2] = value
    return numbers


NOT_FINITE = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])


@NOT_FINITE
@pytest.mark.parametrize("sides", ["found", "reference", "both"])
def test_near_nothing_that_is_not_finite(value: float, sides: str) -> None:
    found, reference = (with_one(value if sides in (side, "both") else 1.0) for side in ("found", "reference"))
    with pytest.raises(AssertionError):
        assert_near(found, reference, bound=1e9)


@NOT_FINITE
@pytest.mark.parametrize("sides", ["found", "reference"])
def test_no_rule_for_what_is_not_finite(value: float, sides: str) -> None:
    found, reference = (with_one(value if sides == side else 1.0) for side in ("found", "reference"))
    with pytest.raises(AssertionError):
        assert_rule_of_two(found, found, reference.double(), "not finite")


@NOT_FINITE
def test_a_broken_plain_formula_excuses_nothing(value: float) -> None:
    with pytest.raises(AssertionError):
        assert_rule_of_two(torch.zeros(2, 3), with_one(value), torch.ones(2, 3).double(), "plain")


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 1), (3, 2), ()])
def test_shapes_that_would_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        assert_near(torch.ones(shape), torch.ones(2, 3), bound=1e9)
    with pytest.raises(AssertionError):
        assert_rule_of_two(torch.ones(shape), torch.ones(shape), torch.ones(2, 3).double(), "shape")


def test_an_exact_value_in_low_precision_is_no_reference() -> None:
    with pytest.raises(AssertionError):
        assert_rule_of_two(torch.ones(3), torch.ones(3), torch.ones(3), "float32")


def test_distance_by_hand() -> None:
    assert distance(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0])) == 0.25
    assert distance(torch.zeros(2), torch.zeros(2)) == 0
    assert distance(torch.tensor([1e-30, 0.0]), torch.zeros(2)) > 1


@pytest.mark.parametrize(("ours", "passes"), [(2.0, True), (2.2, False)])
def test_twice_the_plain_error_and_no_more(ours: float, passes: bool) -> None:
    # plain is off by 1/8, so we may be off by 1/4 and one rounding of 8, which is 2^-7 / 8 in bfloat16
    exact, plain = torch.full((4,), 8.0).double(), torch.full((4,), 8.125)
    found = (exact + 0.125 * ours).float()
    with nullcontext() if passes else pytest.raises(AssertionError):
        assert_rule_of_two(found, plain, exact, "ratio")
