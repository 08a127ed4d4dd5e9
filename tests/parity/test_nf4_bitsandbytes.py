"""NF4 and FP4 against bitsandbytes 0.50's CPU backend: bytes, absmax and nested state to the last bit; saved layers.

Dequantised numbers are compared where a row is whole blocks: elsewhere its AVX-512 code takes the absmax of other
blocks (`test_their_rows_of_broken_blocks_are_wrong` will notice when it is mended).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minillm.errors import CheckpointError
from minillm.ops import nf4
from minillm.quant.nf4_bitsandbytes import from_bitsandbytes, to_bitsandbytes
from minillm.quant.nf4_linear import LinearNF4
from tests.error import assert_rule_of_two

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes")
theirs = bitsandbytes.functional
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

SIZES = ((5, 64, 64), (33, 200, 64), (40, 1024, 64), (9, 4544, 64), (3, 33, 32), (2, 100, 4096), (7, 512, 256))
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
kinds = pytest.mark.parametrize("kind", list(nf4.CODES))
formats = pytest.mark.parametrize("dtype", FORMATS, ids=str)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(outputs: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of many sizes, among them zeros and subnormals."""
    w = numbers(outputs, width) * torch.logspace(-3, 2, outputs)[:, None]
    w[0] = 0
    w[-1, :32] = 1e-40
    return w.to(dtype)


@kinds
@formats
def test_bytes_absmax_and_nested_state(kind: str, dtype: torch.dtype) -> None:
    for outputs, width, block in SIZES:
        w = weights(outputs, width, dtype)
        for quantise in (nf4.quantise, nf4.quantise_ref):
            packed, absmax = quantise(w, kind, block)
            expected, state = theirs.quantize_4bit(w, blocksize=block, quant_type=kind)
            assert torch.equal(packed, expected) and torch.equal(absmax, state.absmax), (outputs, width, block)
        _, state = theirs.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=True)
        codes, nested = nf4.quantise_absmax(absmax)
        assert torch.equal(codes, state.absmax)
        assert torch.equal(nested.absmax, state.state2.absmax)
        assert torch.equal(nested.map, state.state2.code) and torch.equal(nested.offset, state.offset)


@kinds
def test_numbers_next_to_ties(kind: str) -> None:
    """Whole blocks are multiplied by 1 / absmax, short ones divided by absmax: visible here only."""
    codes = nf4.CODES[kind].sort().values
    for absmax in torch.linspace(0.3, 3, 50):
        middles = (codes[1:] + codes[:-1]) / 2 * absmax
        near = [middles, middles.nextafter(torch.tensor(9.0)), middles.nextafter(torch.tensor(-9.0))]
        w = torch.cat([absmax[None], *near, torch.zeros(18)])
        for block in (64, 4096):
            expected, _ = theirs.quantize_4bit(w, blocksize=block, quant_type=kind)
            assert torch.equal(nf4.quantise(w, kind, block)[0], expected)
            assert torch.equal(nf4.quantise_ref(w, kind, block)[0], expected)


@kinds
def test_codes_and_map(kind: str) -> None:
    assert torch.equal(nf4.CODES[kind], theirs.get_4bit_type(kind, "cpu"))
    assert torch.equal(nf4.dynamic_map(), theirs.create_dynamic_map())


def test_nested_state_of_many_blocks() -> None:
    """200,000 numbers: their rounding to 65,536 steps differs from the nearest code for one in a thousand."""
    absmax = numbers(200_000, seed=2).abs() + 0.5
    codes, nested = nf4.quantise_absmax(absmax)
    expected, state = theirs.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(codes, expected) and torch.equal(nested.absmax, state.absmax)


@kinds
@formats
@pytest.mark.parametrize("double", [False, True])
def test_dequantised(kind: str, dtype: torch.dtype, double: bool) -> None:
    for outputs, width, block in SIZES:
        if width % block:
            continue
        w = numbers(outputs, width).to(dtype)
        packed, state = theirs.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=double)
        nested = nf4.Nested(state.state2.absmax, state.state2.code, state.offset) if double else None
        weight = nf4.Weight(packed, state.absmax, (outputs, width), kind, block, nested)
        assert torch.equal(nf4.dequantise(weight, dtype), theirs.dequantize_4bit(packed, state)), (
            outputs,
            width,
            block,
        )


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the fault of their AVX-512 code")
def test_their_rows_of_broken_blocks_are_wrong() -> None:
    w = numbers(5, 192) * torch.logspace(-2, 2, 5)[:, None]
    packed, state = theirs.quantize_4bit(w, blocksize=128, quant_type="nf4")
    ours = nf4.dequantise(nf4.Weight(packed, state.absmax, (5, 192), "nf4", 128), torch.float32)
    away = [float((found - w).abs().max()) for found in (ours, theirs.dequantize_4bit(packed, state))]
    assert away[0] < 0.2 * float(w.abs().max()) and away[1] > 2 * away[0], "mended? then compare these sizes too"


# -- layers ------------------------------------------------------------------------------------------------------------


def their_layer(kind: str, dtype: torch.dtype, *, double: bool, bias: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 96, bias=bias).to(dtype)
    layer = bitsandbytes.nn.Linear4bit(
        256, 96, bias=bias, quant_type=kind, compress_statistics=double, compute_dtype=dtype
    )
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu").requires_grad_(False)  # the move quantises


@kinds
@formats
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_their_saved_layer_loads_here_and_ours_there(kind: str, dtype: torch.dtype, double: bool, bias: bool) -> None:
    layer = their_layer(kind, dtype, double=double, bias=bias)
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    ours = from_bitsandbytes(saved)
    assert torch.equal(ours.dequantised(), theirs.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    back = to_bitsandbytes(ours)
    assert back.keys() == saved.keys()
    key = f"weight.quant_state.bitsandbytes__{kind}"
    assert [name for name in saved if name != key and not torch.equal(back[name], saved[name])] == []
    assert json.loads(bytes(back[key].tolist())) == json.loads(bytes(saved[key].tolist()))
    read = bitsandbytes.nn.Params4bit.from_prequantized(
        back["weight"], {name: tensor for name, tensor in back.items() if name.startswith("weight.")}, device="cpu"
    )
    assert torch.equal(theirs.dequantize_4bit(read.data, read.quant_state), ours.dequantised())
    for rows in (1, 20):
        x = numbers(rows, 256, seed=rows).to(dtype)
        exact = x.double() @ ours.dequantised(torch.float32).double().T + (ours.bias.double() if bias else 0)
        assert_rule_of_two(ours(x), layer.train()(x), exact, f"{rows} rows")


def test_a_layer_made_here_is_theirs_bit_for_bit() -> None:
    plain = torch.nn.Linear(256, 96)
    ours = to_bitsandbytes(LinearNF4.from_float(plain))
    layer = bitsandbytes.nn.Linear4bit(256, 96, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    for name, tensor in layer.to("cpu").state_dict().items():
        if "quant_state" not in name:
            assert torch.equal(ours[name], tensor), name


def test_bytes_kept_in_another_dtype_are_read() -> None:
    saved = to_bitsandbytes(LinearNF4.from_float(torch.nn.Linear(256, 96)))
    wide = {**saved, "weight": saved["weight"].view(-1).view(torch.bfloat16).view(-1, 1)}
    assert torch.equal(from_bitsandbytes(wide).weight, saved["weight"])


STATE = "weight.quant_state.bitsandbytes__nf4"


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda saved: saved.pop(name)


def instead(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda saved: saved.update({name: tensor})


def about(**fields: object) -> Callable[[dict[str, Tensor]], object]:
    def change(saved: dict[str, Tensor]) -> None:
        text = json.dumps(json.loads(bytes(saved[STATE].tolist())) | fields)
        saved[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("weight"), "lacks weight;"),
        (without("weight.absmax"), "lacks weight.absmax"),
        (without("weight.nested_absmax"), "lacks weight.nested_absmax"),
        (without("weight.nested_quant_map"), "lacks weight.nested_quant_map"),
        (without("weight.quant_map"), "lacks weight.quant_map"),
        (without(STATE), "has 0 keys"),
        (instead("weight.SCB", torch.zeros(1)), "has weight.SCB"),
        (instead("weight.quant_state.bitsandbytes__fp4", torch.zeros(1)), "has 2 keys"),
        (instead(STATE, torch.zeros(4, dtype=torch.uint8)), "not JSON"),
        (instead(STATE, torch.tensor(list(b"[1]"), dtype=torch.uint8)), "quant_type"),
        (instead("weight", torch.zeros(96, 256)), "weight is torch.uint8"),
        (instead("weight.absmax", torch.zeros(384)), "weight.absmax is torch.float32"),
        (instead("weight.absmax", torch.zeros(383, dtype=torch.uint8)), r"\(383,\)"),
        (instead("weight.quant_map", torch.zeros(16)), "other codes"),
        (instead("bias", torch.zeros(95)), r"bias is torch.float32 \(95,\)"),
        (about(quant_type="fp4"), "says quant_type 'fp4'"),
        (about(quant_type="int4"), "quant_type 'int4'"),
        (about(blocksize=63), "blocksize 63"),
        (about(blocksize=128), "weight.absmax is"),
        (about(dtype="int8"), "dtype 'int8'"),
        (about(shape=[96, 255]), "weight is"),
        (about(shape=[96]), r"shape \[96\]"),
        (about(nested_blocksize=64), "nested_blocksize 64"),
        (about(nested_offset=None), "lacks nested_offset"),
        (about(nested_offset="1"), "nested_offset '1'"),
    ],
)
def test_a_spoilt_layer_is_refused_in_one_line(spoil: Callable[[dict[str, Tensor]], object], message: str) -> None:
    saved = to_bitsandbytes(LinearNF4.from_float(torch.nn.Linear(256, 96)))
    spoil(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        from_bitsandbytes(saved, where="blocks.0.q_proj")
    assert str(caught.value).startswith("blocks.0.q_proj: ") and "\n" not in str(caught.value)
