"""Every int8 variant against the definition: integers exactly, floats by the rule of two; and against misuse."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minillm.ops import int8, native
from minillm.ops.int8 import Weight
from tests.error import assert_rule_of_two

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 200, 1024, 4544)
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 7, 8, 9, 33)
ISAS = [isa for isa, runs in native.isas().items() if runs]
compiled = pytest.mark.skipif(not native.available(), reason=f"minillm._cpu: {native.why_not()}")


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def integers(kind: str, rows: int, length: int, seed: int = 0) -> Tensor:
    """int8 matrices that break kernels: random, all one extreme, signs that add up, zeros."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randint(-128, 128, (rows, length), generator=generator, dtype=torch.int8)
    value = {"127": 127, "-127": -127, "-128": -128, "zeros": 0}[kind]
    return torch.full((rows, length), value, dtype=torch.int8)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", LENGTHS)
def test_sums_are_exact(isa: str, length: int) -> None:
    for kind in ("random", "127", "-127", "-128", "zeros"):
        w = integers(kind, 67, length, seed=1)
        for rows in ROWS:
            for other in (kind, "random", "-128"):
                x = integers(other, rows, length, seed=2)
                found = int8.product(x, w, isa=isa)
                assert torch.equal(found, x.long().matmul(w.long().T).int()), (kind, other, rows)


def activations(rows: int, length: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers with a zero row, an outlier of exactly 6, one beyond, and 5.9 in an outlier column."""
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))
    if rows > 2:
        x[1] = 0
    if length > 60:
        x[0, 3], x[rows - 1, length - 1], x[rows // 2, 40] = 6.0, -23.0, 5.9
        x[0, 40] = 11.0
    return x.to(dtype)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_quantised_is_the_definition_exactly(isa: str, length: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        x = activations(rows, length, dtype)
        for threshold in (6.0, math.inf, 0.5):
            found, expected = int8.quantise(x, threshold, isa=isa), int8.quantise_ref(x, threshold)
            for name, ours, theirs in zip(found._fields, found, expected, strict=True):
                assert torch.equal(ours, theirs), (name, rows, threshold)


def weight_of(outputs: int, length: int, dtype: torch.dtype, *, bias: bool, seed: int = 3) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    q, scale, _ = int8.quantise_ref(torch.randn(outputs, length, generator=generator) / math.sqrt(length))
    return Weight(q, scale, torch.randn(outputs, generator=generator).to(dtype) if bias else None)


def exact_linear(x: Tensor, weight: Weight, threshold: float) -> Tensor:
    """The definition from the same integers, in float64."""
    q, scale, is_outlier = int8.quantise_ref(x, threshold)
    w, scales = weight.w.double(), weight.scale.double()
    y = q.double() @ w.T * scale.double()[:, None] * scales / 127**2
    y += (x.double() * is_outlier) @ w.T * scales / 127
    return y if weight.bias is None else y + weight.bias.double()


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("outputs", [15, 64, 131])  # of one alone the terms may cancel, not their rounding
def test_linear_is_the_definition_up_to_rounding(isa: str, dtype: torch.dtype, outputs: int) -> None:
    for rows in ROWS:
        for length, threshold in ((17, 1.0), (200, 6.0), (1024, 6.0), (1024, math.inf), (64, 1e-3)):
            x, weight = activations(rows, length, dtype), weight_of(outputs, length, dtype, bias=rows % 2 == 0)
            found = int8.linears(x, [weight], threshold, isa=isa)[0]
            assert found.dtype == dtype
            what = f"{rows} x {outputs} x {length}, threshold {threshold}"
            assert_rule_of_two(found, int8.linear_ref(x, weight, threshold), exact_linear(x, weight, threshold), what)


@compiled
def test_several_weights_of_one_input_are_each_alone() -> None:
    for rows in (1, 8, 40):
        x = activations(rows, 200, torch.bfloat16)
        weights = [weight_of(outputs, 200, torch.bfloat16, bias=True, seed=outputs) for outputs in (130, 16, 7)]
        together = int8.linears(x, weights)
        for y, weight in zip(together, weights, strict=True):
            assert torch.equal(y, int8.linears(x, [weight])[0])


@compiled
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    for rows in ROWS:
        x, weight = activations(rows, 200, torch.float32), weight_of(131, 200, torch.float32, bias=True)
        found = int8.linears(x, [weight])[0]
        quantised = int8.quantise(x, 6.0)
        before, _ = torch.get_num_threads(), torch.set_num_threads(1)
        assert torch.equal(found, int8.linears(x, [weight])[0])
        assert all(torch.equal(a, b) for a, b in zip(quantised, int8.quantise(x, 6.0), strict=True))
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_dequantised_is_the_definition(isa: str, dtype: torch.dtype) -> None:
    for length in LENGTHS:
        weight = weight_of(5, length, dtype, bias=False)
        found = int8.dequantise(weight.w, weight.scale, dtype, isa=isa)
        assert torch.equal(found, int8.dequantise_ref(weight.w, weight.scale, dtype))


@pytest.mark.parametrize("isa", [*ISAS, None])
def test_what_is_not_finite_stays_visible(isa: str | None) -> None:
    """A NaN makes its row NaN, an infinity is an outlier like any other; other rows do not notice."""
    for rows in (3, 20):
        x, weight = activations(rows, 200, torch.float32), weight_of(20, 200, torch.float32, bias=False)
        clean = x.clone()
        x[0, 7] = math.nan
        x[2, 5] = math.inf
        clean[2, 5] = 100.0
        for compute in (int8.linear_ref, lambda *args: int8.linears(args[0], [args[1]], args[2], isa=isa)[0]):
            found, expected = compute(x, weight, 6.0), compute(clean, weight, 6.0)
            assert bool(found[0].isnan().all())
            assert not bool(found[2].isfinite().any())
            assert torch.equal(found[1], expected[1])


def test_a_zero_row_gives_the_bias() -> None:
    for rows in (1, 9):
        weight = weight_of(20, 64, torch.float32, bias=True)
        assert torch.equal(int8.linear(torch.zeros(rows, 64), weight)[0], weight.bias)


@compiled
def test_empty_inputs() -> None:
    weight = weight_of(20, 64, torch.float32, bias=True)
    assert int8.linear(torch.zeros(0, 64), weight).shape == (0, 20)
    assert int8.linear(torch.zeros(2, 0, 64), weight).shape == (2, 0, 20)


def test_float64_takes_the_definition() -> None:
    x, weight = activations(3, 200, torch.float64), weight_of(20, 200, torch.float64, bias=True)
    assert torch.equal(int8.linear(x, weight), int8.linear_ref(x, weight))


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [2**24, 200 * 1024], ids=["whole", "three tiles"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_gradients_are_those_of_the_dequantised_weight(
    dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_TILE", tile)
    x, weight = activations(5, 200, dtype).requires_grad_(), weight_of(2100, 200, dtype, bias=True)
    assert weight.bias is not None
    weight.bias.requires_grad_()
    slope = torch.randn(5, 2100, generator=torch.Generator().manual_seed(5)).to(dtype)
    int8.linear(x, weight).backward(slope)
    exact = slope.double() @ (weight.w.double() * weight.scale.double()[:, None] / 127)
    plain = slope @ int8.dequantise_ref(weight.w, weight.scale, dtype)
    assert_rule_of_two(x.grad, plain, exact, "gradient of x")
    assert torch.equal(weight.bias.grad, slope.sum(0))


def test_the_registered_operators_are_sound() -> None:
    x, weight = activations(5, 200, torch.float32), weight_of(20, 200, torch.float32, bias=True)
    torch.library.opcheck(int8._linear, (x.clone().requires_grad_(), *weight, 6.0))
    torch.library.opcheck(int8.input_gradient, (torch.randn(5, 20), weight.w, weight.scale))


# -- misuse ------------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w": torch.zeros(20, 64)}, r"weight is torch.float32; it must be torch.int8"),
        ({"w": torch.zeros(20, 63, dtype=torch.int8)}, r"weight has shape \(20, 63\); it must be \(20, 64\)"),
        ({"w": torch.zeros(64, 20, dtype=torch.int8).T}, r"weight is not contiguous"),
        ({"w": torch.zeros(20, 64, dtype=torch.int8, device="meta")}, r"weight is on meta; it must be on the CPU"),
        ({"scale": torch.zeros(20, dtype=torch.float64)}, r"scale is torch.float64; it must be torch.float32"),
        ({"scale": torch.zeros(20, 1)}, r"scale has shape \(20, 1\); it must be \(20,\)"),
        ({"bias": torch.zeros(20, dtype=torch.bfloat16)}, r"bias is torch.bfloat16; it must be torch.float32"),
        ({"bias": torch.zeros(19)}, r"bias has shape \(19,\); it must be \(20,\)"),
    ],
)
def test_misuse_names_the_argument(changed: dict[str, Tensor], message: str) -> None:
    weight = weight_of(20, 64, torch.float32, bias=True)._replace(**changed)
    with pytest.raises((TypeError, ValueError), match=message):
        int8.linear(torch.zeros(2, 64), weight)


@compiled
def test_sums_that_could_leave_int32_are_refused() -> None:
    longest = native.LONGEST_SUM
    x = torch.full((1, longest), 127, dtype=torch.int8)
    assert int(int8.product(x, x)) == longest * 127**2 < 2**31
    longer = torch.zeros(1, longest + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="do not fit int32"):
        int8.product(longer, longer)


@compiled
def test_an_unknown_isa_is_named() -> None:
    with pytest.raises(ValueError, match="isa 'sse9' does not run here; this machine has ref"):
        int8.quantise(torch.zeros(1, 4), isa="sse9")
