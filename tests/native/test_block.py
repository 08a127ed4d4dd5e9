"""Norm, rotation, gated product and linears of few rows against the torch code that defines them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.model.norms import RMSNorm
from minillm.model.rope import rotate
from minillm.ops import block, native
from tests.decoders import SHAPES, decoder
from tests.error import assert_near, assert_rule_of_two

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
ISAS = [isa for isa in ("ref", "avx512vnni", "avx512bf16") if native.isas().get(isa)]
pytestmark = pytest.mark.skipif(not native.available(), reason=f"minillm._cpu: {native.why_not()}")
EVERY_ISA, EVERY_FORMAT = pytest.mark.parametrize("isa", ISAS), pytest.mark.parametrize("dtype", FORMATS, ids=str)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@EVERY_ISA
@EVERY_FORMAT
@pytest.mark.parametrize("width", [1, 15, 64, 200, 4544])
def test_rms_norm(isa: str, dtype: torch.dtype, width: int) -> None:
    for rows in (1, 3, 40):
        x, norm = numbers(rows, width, dtype=dtype) * 3, RMSNorm(width, 1e-5).to(dtype)
        norm.weight.data = numbers(width, dtype=dtype, seed=1)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
        assert_rule_of_two(block.rms_norm(x, norm.weight.detach(), 1e-5, isa=isa), norm(x), exact, f"{rows} x {width}")


@EVERY_ISA
@EVERY_FORMAT
@pytest.mark.parametrize(("heads", "size", "turning"), [(4, 64, 64), (3, 24, 24), (2, 80, 32), (71, 64, 64)])
def test_rotation_has_the_bits_of_torch(isa: str, dtype: torch.dtype, heads: int, size: int, turning: int) -> None:
    for batch, queries in ((1, 1), (3, 1), (1, 7), (2, 5)):
        x = numbers(batch, queries, heads * size, dtype=dtype).view(batch, queries, heads, size).transpose(1, 2)
        cos, sin = (numbers(batch, 1, queries, turning, dtype=dtype, seed=seed) for seed in (1, 2))
        for tables in (1, batch):
            expected = rotate(x.requires_grad_(), cos[:tables], sin[:tables])  # with a gradient: torch's own
            assert torch.equal(block.rotate(x.detach(), cos[:tables], sin[:tables], isa=isa), expected)
            assert torch.equal(block.rotate(x.detach().contiguous(), cos[:tables], sin[:tables], isa=isa), expected)
            wide = torch.cat((cos, sin), dim=-1)[:tables]  # slices of a larger table
            views = wide[..., :turning], wide[..., turning:]
            assert torch.equal(block.rotate(x.detach(), *views, isa=isa), expected)
            x = x.detach()


@EVERY_ISA
@EVERY_FORMAT
def test_swiglu(isa: str, dtype: torch.dtype) -> None:
    for count in (1, 16, 200, 40_000):
        gate, up = numbers(count, dtype=dtype) * 5, numbers(count, dtype=dtype, seed=1)
        wide = gate.double()
        exact = wide * torch.sigmoid(wide) * up.double()
        assert_rule_of_two(block.swiglu(gate, up, isa=isa), F.silu(gate) * up, exact, str(count))


@EVERY_ISA
def test_swiglu_far_out(isa: str) -> None:
    gate = torch.tensor([-math.inf, -1e30, -1000.0, -90.0, -0.0, 0.0, 90.0, 1000.0, 1e30, math.inf, math.nan])
    found = block.swiglu(gate, torch.ones(11), isa=isa)
    assert found[1:9].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, 0.0, 90.0, 1000.0, 1e30], rel=1e-6, abs=1e-30)
    assert found[9] == math.inf and bool(found[10].isnan())


@EVERY_ISA
@EVERY_FORMAT
@pytest.mark.parametrize("bias", [False, True])
def test_linear_of_few_rows(isa: str, dtype: torch.dtype, bias: bool) -> None:
    for rows in range(1, 9):
        for inputs, outputs in ((1, 17), (15, 33), (64, 16), (200, 33), (4544, 20)):
            x, weight = numbers(rows, inputs, dtype=dtype), numbers(outputs, inputs, dtype=dtype, seed=1)
            offset = numbers(outputs, dtype=dtype, seed=2) if bias else None
            exact = x.double() @ weight.double().T + (0 if offset is None else offset.double())
            plain = F.linear(x, weight, offset)
            assert_rule_of_two(block.linear(x, weight, offset, isa=isa), plain, exact, f"{rows} x {outputs} x {inputs}")


@EVERY_FORMAT
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    x, weight, gate = (numbers(*shape, dtype=dtype) for shape in ((8, 4544), (333, 4544), (90_001,)))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((block.linear(x, weight), block.swiglu(gate, gate), block.rms_norm(x, x[0].contiguous(), 1e-5)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_through_the_kernels_is_the_whole_text_without(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(131, (2, 12), generator=torch.Generator().manual_seed(1))
    model = decoder(**SHAPES[shape])
    with torch.inference_mode():
        cache = model.new_cache(2, 12)
        model(tokens[:, :8], cache=cache)
        found = torch.cat([model(tokens[:, place : place + 1], cache=cache) for place in range(8, 12)], dim=1)
        monkeypatch.setattr(block, "fast", lambda x: False)
        assert_near(found, model(tokens)[:, 8:])


def test_more_rows_than_the_kernel_takes() -> None:
    with pytest.raises(ValueError, match="x has 9 rows; this kernel takes at most 8"):
        block.linear(torch.zeros(9, 4), torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: block.linear(torch.zeros(2, 4), torch.zeros(3, 4).bfloat16()), "weight is torch.bfloat16"),
        (lambda: block.linear(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2)), r"bias has shape \(2,\)"),
        (lambda: block.linear(torch.zeros(2, 5), torch.zeros(3, 4)), r"x has shape \(2, 5\); it must be \(2, 4\)"),
        (lambda: block.rms_norm(torch.zeros(2, 4), torch.zeros(5), 1e-5), r"weight has shape \(5,\)"),
        (lambda: block.swiglu(torch.zeros(4), torch.zeros(5)), r"up has shape \(5,\)"),
        (lambda: block.swiglu(torch.zeros(4).double(), torch.zeros(4).double()), "gate is torch.float64"),
        (
            lambda: block.rotate(torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 2, 8)),
            r"sin has shape \(1, 1, 2, 8\); it must be \(1, 1, 3, 8\)",
        ),
    ],
)
def test_misuse_names_the_argument(call: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
