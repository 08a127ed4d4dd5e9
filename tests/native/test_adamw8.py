"""Every variant of the 8-bit AdamW step against its definition, bit for bit; what the definition promises; misuse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minillm.ops import adamw8, native
from minillm.ops.adamw8 import BLOCK, STEPS, Moments, Rates

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = {torch.float32: 2.0**63, torch.bfloat16: 2.0**63, torch.float16: 2.0**14}
ISAS = [isa for isa in ("ref", "avx512vnni") if native.isas().get(isa)]
compiled = pytest.mark.skipif(not native.available(), reason=f"minillm._cpu: {native.why_not()}")
isas = pytest.mark.parametrize("isa", ISAS)
#: Whether torch fuses a product with the sum it enters: 2^-24, not 0, is left of (1 + 2^-12)^2 - (1 + 2^-11).
FUSES = torch.tensor([-1 - 2**-11]).add_(torch.tensor([1 + 2**-12]), alpha=1 + 2**-12).item() > 0
fused = pytest.mark.skipif(not FUSES, reason="torch fuses no products here, the kernels do")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(*shape: int) -> Moments:
    codes = torch.zeros(shape, dtype=torch.uint8)
    absmax = torch.zeros(-(-codes.numel() // BLOCK))
    return Moments(codes, absmax, codes.clone(), absmax.clone())


def rates(t: int, weight_decay: float = 0.1) -> Rates:
    return adamw8.rates(t, learning_rate=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)


def gradient(count: int, seed: int) -> Tensor:
    """Blocks that are all zeros, hold some zeros, are tiny (squares vanish), minute (subnormal), or huge."""
    g = numbers(count, seed=seed)
    g[::3] *= 1e-3
    for block, scale in enumerate((1, 0, 1e-20, 1e-40, 1e15, 1e-10)):
        g[block * BLOCK : (block + 1) * BLOCK] *= scale
    g[6 * BLOCK : 7 * BLOCK : 2] = 0
    return g


def equal(ours: Moments, theirs: Moments) -> list[str]:
    return [name for name in Moments._fields if not torch.equal(getattr(ours, name), getattr(theirs, name))]


@compiled
@fused
@isas
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 255, 256, 257, 4999, 70_001])
def test_steps_have_the_bits_of_the_definition(isa: str, dtype: torch.dtype, count: int, threads: int) -> None:
    p = numbers(count, seed=9).to(dtype)
    plain, moments, defined = p.clone(), fresh(count), fresh(count)
    for t in range(1, 6):
        g = (
            gradient(count, seed=t).clamp(-1e4, 1e4).to(dtype)
            if dtype == torch.float16
            else gradient(count, t).to(dtype)
        )
        adamw8.step(p, g, moments, rates(t), isa=isa)
        adamw8.step_ref(plain, g, defined, rates(t))
        assert equal(moments, defined) == [], f"step {t}"
        assert torch.equal(p, plain), f"step {t}"


@compiled
@fused
@isas
def test_every_step_of_the_scale_and_what_lies_between(isa: str) -> None:
    """m = g / 10 at the first step: all 65,536 steps, and the numbers next to where two of them meet, as units of 1."""
    places = -1 + 2 * torch.arange(STEPS) / (STEPS - 1)
    middles = (places[1:] + places[:-1]) / 2
    beside = [middles, middles.nextafter(torch.tensor(9.0)), middles.nextafter(torch.tensor(-9.0))]
    units = torch.cat([places, *beside])
    units = torch.nn.functional.pad(units, (0, -len(units) % (BLOCK - 1))).view(-1, BLOCK - 1)
    for scale in (1.0, 0.7, 3e-5):
        g = torch.nn.functional.pad(units, (1, 0), value=1.0).reshape(-1) * scale
        moments, defined, p = fresh(len(g)), fresh(len(g)), torch.zeros(len(g))
        adamw8.step(p, g, moments, rates(1), isa=isa)
        adamw8.step_ref(p, g, defined, rates(1))
        assert equal(moments, defined) == []
    assert len(moments.m.unique()) == len(adamw8.maps()[0].codes.unique()) > 245


def test_the_definition_is_adamw_where_codes_are_exact() -> None:
    """Blocks of one magnitude are exact in 8 bits: then it is AdamW, written out in float64."""
    sign = torch.where(torch.arange(512) % 5 > 0, 1.0, 0.0)
    p, exact = numbers(512), numbers(512).double()
    m = v = torch.zeros(512, dtype=torch.float64)
    moments = fresh(512)
    for t in range(1, 9):
        g = sign * (0.5 + t / 8)
        adamw8.step_ref(p, g, moments, rates(t))
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        exact = exact - 1e-2 * 0.1 * exact - 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    kept = sign > 0
    # 8 steps round p and a change of at most lr: 8 * (eps |p| + 4 eps lr); a constant of the wrong kind moves 1e-3
    torch.testing.assert_close(p[kept].double(), exact[kept], rtol=8 * 2**-23, atol=8 * 4 * 2**-23 * 1e-2)


def test_codes_are_the_nearest_but_for_the_steps() -> None:
    """A code is off by half the distance to its neighbours, and by half a step, 1 / 65535."""
    x = numbers(4, BLOCK)
    for to, values in zip(adamw8.maps(), (x, x.square()), strict=True):
        codes, absmax = adamw8.quantise_ref(values, to)
        assert torch.equal(absmax, values.abs().amax(dim=1))
        units = (values / absmax[:, None]).double()
        away = (to.map[codes.int()].double() - units).abs()
        nearest = (to.map.double() - units[..., None]).abs().amin(dim=-1)
        assert bool((away <= nearest + 2 / 65535).all())


def test_moments_of_zeros_stay_zeros() -> None:
    p, moments = torch.ones(300), fresh(300)
    adamw8.step_ref(p, torch.zeros(300), moments, rates(1, weight_decay=0.0))
    assert torch.equal(p, torch.ones(300)) and equal(moments, fresh(300)) == []


def test_without_the_kernels_the_definition_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu", lambda: None)
    p, plain, moments, defined = numbers(300), numbers(300), fresh(300), fresh(300)
    adamw8.step(p, numbers(300, seed=1), moments, rates(1))
    adamw8.step_ref(plain, numbers(300, seed=1), defined, rates(1))
    assert torch.equal(p, plain) and equal(moments, defined) == []


@compiled
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("g", torch.zeros(20, 30, dtype=torch.bfloat16), TypeError, "g is torch.bfloat16; it must be torch.float32"),
        ("g", torch.zeros(30, 20), ValueError, r"g has shape \(30, 20\); it must be \(20, 30\)"),
        ("g", torch.zeros(30, 20).T, ValueError, "g is not contiguous"),
        ("p", torch.zeros(30, 20).T, ValueError, "p is not contiguous"),
        ("m", torch.zeros(20, 30), TypeError, "moments.m is torch.float32"),
        ("v", torch.zeros(600, dtype=torch.uint8), ValueError, r"moments.v has shape \(600,\)"),
        ("m_absmax", torch.zeros(2), ValueError, r"moments.m_absmax has shape \(2,\); it must be \(3,\)"),
        ("v_absmax", torch.zeros(3).double(), TypeError, "moments.v_absmax is torch.float64"),
    ],
)
def test_misuse(argument: str, value: Tensor, error: type[Exception], message: str) -> None:
    tensors = {"p": torch.zeros(20, 30), "g": torch.zeros(20, 30), **fresh(20, 30)._asdict(), argument: value}
    with pytest.raises(error, match=message):
        adamw8.step(tensors.pop("p"), tensors.pop("g"), Moments(**tensors), rates(1))
