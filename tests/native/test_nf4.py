"""Every NF4 variant against the definition: codes, absmax and bytes exactly, products by the rule of two; misuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from minillm.errors import InputError
from minillm.ops import native, nf4
from minillm.ops.nf4 import Weight
from minillm.quant.nf4_linear import LinearNF4
from tests.error import assert_rule_of_two

#: (N, K, block): whole blocks a row, blocks across rows, odd sizes, long blocks, a short last block, no power of two.
SIZES = (
    *((5, 64, 64), (3, 128, 64), (7, 192, 64), (33, 200, 64), (20, 1024, 64), (3, 4544, 64), (5, 96, 32)),
    *((3, 1024, 256), (5, 33, 32), (1, 5, 4096), (4, 200, 200), (2, 1024, 4096)),
)
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17)
ISAS = [isa for isa, runs in native.isas().items() if runs]
compiled = pytest.mark.skipif(not native.available(), reason=f"minillm._cpu: {native.why_not()}")
kinds = pytest.mark.parametrize("kind", list(nf4.CODES))
isas = pytest.mark.parametrize("isa", ISAS)
formats = pytest.mark.parametrize("dtype", FORMATS, ids=str)


@pytest.fixture(params=[2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near_ties(kind: str, absmax: float) -> Tensor:
    """64 numbers: absmax, and the middles between codes times absmax with both neighbours."""
    codes = nf4.CODES[kind].sort().values
    middles = (codes[1:] + codes[:-1]) / 2 * absmax
    up, down = middles.nextafter(torch.tensor(9.0)), middles.nextafter(torch.tensor(-9.0))
    return torch.cat([torch.tensor([absmax, -0.0]), middles, up, down, torch.zeros(17)])


def hard_weights(kind: str, outputs: int, width: int) -> Tensor:
    """Normal numbers after a first block of ties."""
    w = numbers(outputs * width)
    w[:64] = near_ties(kind, 1.0)[: len(w)]
    return w.view(outputs, width)


@compiled
@isas
@kinds
@formats
def test_codes_absmax_and_bytes_are_the_definition_exactly(isa: str, kind: str, dtype: torch.dtype) -> None:
    for outputs, width, block in SIZES:
        for w in (hard_weights(kind, outputs, width).to(dtype), torch.zeros(outputs, width, dtype=dtype)):
            found, expected = nf4.quantise(w, kind, block, isa=isa), nf4.quantise_ref(w, kind, block)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (outputs, width, block)


@compiled
@isas
@kinds
def test_short_blocks_are_divided_and_whole_ones_multiplied(isa: str, kind: str) -> None:
    """As bitsandbytes has it; where a number is next to a tie, the two give different codes."""
    differ = 0
    for absmax in torch.linspace(0.3, 3, 50).tolist():
        w = near_ties(kind, absmax)
        whole, short = nf4.quantise(w, kind, 64, isa=isa), nf4.quantise(w, kind, 4096, isa=isa)
        assert torch.equal(whole[0], nf4.quantise_ref(w, kind, 64)[0])
        assert torch.equal(short[0], nf4.quantise_ref(w, kind, 4096)[0])
        differ += not torch.equal(whole[0], short[0])
    assert differ


def test_ties_go_down_and_a_hair_more_goes_up() -> None:
    """By hand, not by the definition: the middle of codes 14 and 15 is 14; the next number is 15."""
    middle = torch.tensor((1.0 + 0.7229568362236023) / 2)
    w = torch.cat([torch.tensor([1.0, 0.0]), middle[None], middle.nextafter(torch.tensor(2.0))[None], torch.zeros(60)])
    packed, absmax = nf4.quantise(w)
    assert (packed[:2].flatten().tolist(), absmax.tolist()) == ([0xF7, 0xEF], [1.0])


@pytest.mark.parametrize("isa", [*ISAS, None])
def test_what_is_not_finite_stays_visible(isa: str | None) -> None:
    """A NaN makes its block NaN, and no other."""
    w = numbers(2, 64)
    w[0, 9] = math.nan
    quantise = nf4.quantise_ref if isa is None else lambda w: nf4.quantise(w, isa=isa)
    dequantised = nf4.dequantise(Weight(*quantise(w), (2, 64)), torch.float32)
    assert bool(dequantised[0].isnan().all()) and bool(dequantised[1].isfinite().all())


def weight_of(
    sizes: tuple[int, int, int], kind: str = "nf4", *, double: bool, bias: torch.dtype | None = None
) -> Weight:
    outputs, width, block = sizes
    packed, absmax = nf4.quantise_ref(numbers(outputs, width, seed=3) / math.sqrt(width), kind, block)
    nested = None
    if double:
        absmax, nested = nf4.quantise_absmax(absmax)
    made = None if bias is None else numbers(outputs, seed=4).to(bias)
    return Weight(packed, absmax, (outputs, width), kind, block, nested, made)


def test_double_quantised_absmax_is_near_and_zeros_are_exact() -> None:
    """The widest step of the map is 0.0141 of the scale, around the mean."""
    absmax = numbers(700, seed=1).abs() + 1
    codes, nested = nf4.quantise_absmax(absmax)
    made = nf4.scales(Weight(codes, codes, (700, 64), nested=nested))
    assert float((made - absmax).abs().max()) <= float(nested.absmax.max()) * (0.0141 / 2 + 1 / 65535)
    codes, nested = nf4.quantise_absmax(torch.zeros(300))
    assert torch.equal(nf4.scales(Weight(codes, codes, (300, 64), nested=nested)), torch.zeros(300))


@compiled
@isas
@kinds
@formats
@pytest.mark.parametrize("double", [False, True])
def test_dequantised_is_the_definition_exactly(isa: str, kind: str, dtype: torch.dtype, double: bool) -> None:
    for sizes in SIZES:
        weight = weight_of(sizes, kind, double=double)
        assert torch.equal(nf4.dequantise(weight, dtype, isa=isa), nf4.dequantise_ref(weight, dtype)), sizes
        rows, columns = range(sizes[0] // 2, sizes[0]), range(sizes[1] // 3, sizes[1] - 1)
        tile = nf4.dequantise(weight, dtype, rows, columns, isa=isa)
        assert torch.equal(tile, nf4.dequantise_ref(weight, dtype)[rows.start :, columns.start : -1]), sizes


def exact_linear(x: Tensor, weight: Weight) -> Tensor:
    y = x.double() @ nf4.dequantise_ref(weight, torch.float32).double().T
    return y if weight.bias is None else y + weight.bias.double()


def plain_linear(x: Tensor, weight: Weight) -> Tensor:
    """Weights in the format of x, then torch's matmul: what bitsandbytes does. fp16 sums go through fp32."""
    return nn.functional.linear(x, nf4.dequantise_ref(weight, x.dtype), weight.bias)


@compiled
@isas
@formats
@pytest.mark.parametrize("double", [False, True])
def test_linear_is_the_definition_up_to_rounding(isa: str, dtype: torch.dtype, double: bool) -> None:
    for sizes in SIZES:
        if sizes[0] < 3:
            continue  # of one output alone the terms may cancel, not their rounding
        for rows in ROWS:
            x = numbers(rows, sizes[1], seed=rows).to(dtype)
            weight = weight_of(sizes, ("nf4", "fp4")[rows % 2], double=double, bias=dtype if rows % 3 else None)
            found = nf4.linear(x, weight, isa=isa)
            assert found.dtype == dtype
            assert_rule_of_two(found, plain_linear(x, weight), exact_linear(x, weight), f"{rows} rows, {sizes}")


@compiled
@isas
@formats
def test_rounded_codes_do_not_add_up(isa: str, dtype: torch.dtype) -> None:
    """All x of one sign, long rows: with codes rounded to bf16 as they are, the error would be several times larger."""
    weight = weight_of((64, 8192, 64), double=False)
    x = torch.ones(1, 8192, dtype=dtype)
    assert_rule_of_two(nf4.linear(x, weight, isa=isa), plain_linear(x, weight), exact_linear(x, weight), "ones")


def test_without_the_kernels_it_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    weight = weight_of((33, 200, 64), double=True, bias=torch.float32)
    x = numbers(3, 200)
    assert_rule_of_two(nf4.linear(x, weight), nf4.linear_ref(x, weight), exact_linear(x, weight), "no kernels")
    assert torch.equal(nf4.quantise(x)[0], nf4.quantise_ref(x)[0])


@compiled
@formats
def test_the_number_of_threads_changes_nothing(threads: int, dtype: torch.dtype) -> None:
    def everything() -> list[Tensor]:
        found = []
        for sizes in SIZES:
            weight = weight_of(sizes, double=True, bias=dtype)
            found += [*nf4.quantise(numbers(*sizes[:2]).to(dtype), block=sizes[2]), nf4.dequantise(weight, dtype)]
            found += [nf4.linear(numbers(rows, sizes[1]).to(dtype), weight) for rows in (1, 4, 9)]
        return found

    many, _ = everything(), torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(many, everything(), strict=True))


def test_shapes_empty_and_leading() -> None:
    weight = weight_of((20, 64, 64), double=True, bias=torch.float32)
    assert nf4.linear(torch.zeros(0, 64), weight).shape == (0, 20)
    assert nf4.linear(torch.zeros(2, 0, 64), weight).shape == (2, 0, 20)
    x = numbers(2, 3, 64)
    assert torch.equal(nf4.linear(x, weight).view(6, 20), nf4.linear(x.view(6, 64), weight))
    assert torch.equal(nf4.linear(torch.zeros(1, 64), weight)[0], weight.bias)


# -- gradients ---------------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("double", [False, True])
def test_gradients_are_those_of_the_dequantised_weight(dtype: torch.dtype, double: bool) -> None:
    weight = weight_of((70, 1100, 64), double=double, bias=dtype)  # 1100: two tiles, the second one shorter
    x = numbers(5, 1100).to(dtype).requires_grad_()
    assert weight.bias is not None
    weight.bias.requires_grad_()
    slope = numbers(5, 70, seed=5).to(dtype)
    nf4.linear(x, weight).backward(slope)
    exact = slope.double() @ nf4.dequantise_ref(weight, torch.float32).double()
    assert_rule_of_two(x.grad, slope @ nf4.dequantise_ref(weight, dtype), exact, "gradient of x")
    assert torch.equal(weight.bias.grad, slope.sum(0))


@pytest.mark.parametrize("double", [False, True])
def test_the_registered_operators_are_sound(double: bool) -> None:
    weight = weight_of((20, 200, 64), double=double, bias=torch.float32)
    state, layout = nf4.flat(weight)
    torch.library.opcheck(nf4._linear, (numbers(5, 200).requires_grad_(), weight.bias, state, layout, None))
    torch.library.opcheck(nf4.input_gradient, (numbers(5, 20), state, layout))


# -- misuse ------------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"packed": torch.zeros(639, 1, dtype=torch.uint8)}, "packed has shape"),
        ({"packed": torch.zeros(640, 1, dtype=torch.int8)}, "packed is torch.int8"),
        ({"packed": torch.zeros(640, 2, dtype=torch.uint8)[:, :1]}, "packed is not contiguous"),
        ({"absmax": torch.zeros(20)}, "absmax is torch.float32"),
        ({"nested": None}, "absmax is torch.uint8"),
        ({"bias": torch.zeros(20, dtype=torch.float16)}, "bias is torch.float16"),
        ({"bias": torch.zeros(19)}, "bias has shape"),
        ({"kind": "int4"}, "kind is 'int4'"),
        ({"block": 33}, "block is 33"),
        ({"shape": (20, 63)}, "x has shape"),
    ],
)
def test_misuse_names_the_argument(changed: dict[str, object], message: str) -> None:
    weight = weight_of((20, 64, 64), double=True)._replace(**changed)
    with pytest.raises((TypeError, ValueError), match=message):
        nf4.linear(torch.zeros(1, 64), weight)


@compiled
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w: nf4.quantise(torch.zeros(64), block=16), "block is 16"),
        (lambda w: nf4.quantise(torch.zeros(64), "nf5"), "kind is 'nf5'"),
        (lambda w: nf4.dequantise(w, torch.float32, range(20, 21)), "reach beyond"),
        (lambda w: nf4.dequantise(w, torch.float32, out=torch.zeros(20, 63)), "out has shape"),
        (lambda w: nf4.linear(torch.zeros(1, 64), w, isa="mmx"), "isa 'mmx'"),
    ],
)
def test_more_misuse(wrong: Callable[[Weight], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(weight_of((20, 64, 64), double=True))


# -- the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
def test_the_layer_is_the_operation_in_train_and_eval(double: bool) -> None:
    plain = nn.Linear(200, 33)
    layer = LinearNF4.from_float(plain, double_quant=double)
    x = numbers(4, 200)
    expected = x @ layer.dequantised().T + plain.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert layer(x.requires_grad_()).requires_grad and not any(
        p.requires_grad for p in layer.parameters() if p is not plain.bias
    )


def test_casting_moves_the_state_and_rounds_none_of_it() -> None:
    for double in (False, True):
        layer = LinearNF4.from_float(nn.Linear(128, 40), double_quant=double)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.to(torch.bfloat16).half()
        after = layer.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before if name != "bias")
        assert after["bias"].dtype == torch.float16
        assert all(
            (tensor.is_meta and tensor.dtype == before[name].dtype) or name == "bias"
            for name, tensor in layer.to("meta").state_dict().items()
        )


@pytest.mark.parametrize("forwards", [0, 1])
def test_saved_state_loads_into_a_fresh_layer(forwards: int) -> None:
    layer, fresh = LinearNF4.from_float(nn.Linear(200, 33)), LinearNF4(200, 33)
    x = numbers(3, 200)
    for _ in range(forwards):
        layer(x)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_a_layer_on_the_meta_device_is_filled_later() -> None:
    plain = nn.Linear(128, 40, bias=False)
    with torch.device("meta"):
        layer = LinearNF4.from_float(nn.Linear(128, 40, bias=False))
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.take_weight(plain.weight.detach())
    assert torch.equal(layer.dequantised(), LinearNF4.from_float(plain).dequantised())


def test_what_a_layer_refuses() -> None:
    with pytest.raises(InputError, match="block is 7"):
        LinearNF4(8, 8, block=7)
    plain = nn.Linear(64, 2)
    plain.weight.data[0, 0] = math.inf
    with pytest.raises(InputError, match="NaN or infinity"):
        LinearNF4.from_float(plain)
