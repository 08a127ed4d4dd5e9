"""AdamW8 against bitsandbytes 0.50's AdamW8bit on the CPU, 50 steps: codes and absmax to the last bit.

Parameters within the errors of their square root. torch's fp32 root is MKL's where torch is built with it, and every
sixth number of it is one bit off. Ours is exact. A change then is off by one bit of itself, and p by half a bit of its
own where the two sums round apart: 50 (2^-23 |change| + 2^-24 |p|) at most. Numbers and changes are of size 4 and 0.02
here; decay after the update would move p by lr^2 wd = 1e-5 a step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minillm.ops import adamw8
from minillm.training.adamw8 import AdamW8

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes")
#: Whether torch fuses a product with the sum it enters: 2^-24, not 0, is left of (1 + 2^-12)^2 - (1 + 2^-11).
FUSES = torch.tensor([-1 - 2**-11]).add_(torch.tensor([1 + 2**-12]), alpha=1 + 2**-12).item() > 0
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not FUSES, reason="torch, and so bitsandbytes, fuses no products here, the kernels do"),
]

THEIR_NAMES = {
    "exp_avg_codes": "state1",
    "exp_avg_absmax": "absmax1",
    "exp_avg_sq_codes": "state2",
    "exp_avg_sq_absmax": "absmax2",
}
STEPS = 50


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(shape: tuple[int, ...], t: int, scale: float) -> Tensor:
    """Rows of all sizes; a third of the numbers are 0 at times, and the first block until step 20."""
    g = numbers(*shape, seed=t).reshape(-1) * torch.logspace(-3, 1, torch.Size(shape).numel()) * scale
    g[t % 3 :: 3] *= t % 2
    g[:256] *= t > 20
    return g.view(shape)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pair(p: Tensor, **settings: object) -> list[tuple[Tensor, torch.optim.Optimizer]]:
    found = []
    for make in (AdamW8, bitsandbytes.optim.AdamW8bit):
        parameter = torch.nn.Parameter(p.clone())
        found.append((parameter, make([parameter], **settings)))
    return found


def assert_same_state(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    for name, their_name in THEIR_NAMES.items():
        differ = int((ours[name] != theirs[their_name]).sum())
        assert differ == 0, f"{what}: {differ} of {ours[name].numel()} {name} differ"
    assert int(ours["step"]) == theirs["step"]


def assert_near_parameters(ours: Tensor, theirs: Tensor, largest_rate: float) -> None:
    change = 10 * largest_rate  # |m| / sqrt(v) <= (1 - b1) / sqrt(1 - b2) times what correction leaves
    bound = STEPS * (2**-23 * change + 2**-24 * theirs.detach().abs())
    assert bool(((ours - theirs).abs() <= bound).all())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(4096,), (64, 200), (3, 1367), (17, 33, 73), (300, 256)], ids=str)
def test_fifty_steps(shape: tuple[int, ...], weight_decay: float, threads: int) -> None:
    (p, ours), (q, theirs) = pair(numbers(*shape), lr=1e-2, weight_decay=weight_decay)
    for t in range(1, STEPS + 1):
        p.grad, q.grad = gradient(shape, t, 1.0), gradient(shape, t, 1.0)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - t / 100)
            optimizer.step()
        assert_same_state(ours.state[p], theirs.state[q], f"step {t}")
    assert_near_parameters(p, q, 1e-2)


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e-18, 1e-8, 1e8, 1e16])
def test_gradients_of_any_size(scale: float) -> None:
    """0, subnormal, with squares that vanish or are subnormal, and with squares near the largest number."""
    (p, ours), (q, theirs) = pair(numbers(5000), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.01)
    for t in range(1, STEPS + 1):
        p.grad, q.grad = gradient((5000,), t, scale), gradient((5000,), t, scale)
        ours.step()
        theirs.step()
        assert_same_state(ours.state[p], theirs.state[q], f"step {t}")
    assert_near_parameters(p, q, 1e-2)


def test_bf16_parameters() -> None:
    """Moments do not know p. p rounds to bf16, apart where two fp32 sums lie on both sides of a middle."""
    (p, ours), (q, theirs) = pair(numbers(6001).bfloat16(), lr=1e-2, weight_decay=0.1)
    for t in range(1, STEPS + 1):
        p.grad, q.grad = (gradient((6001,), t, 1.0).bfloat16() for _ in range(2))
        ours.step()
        theirs.step()
        assert_same_state(ours.state[p], theirs.state[q], f"step {t}")
    differ = (p != q).float().mean()
    # one sum in 2^16 or so lies that near to a middle, and 50 of them follow each other
    assert float(differ) < 50 / 2**12, "parameters"


def test_small_parameters_keep_fp32_moments() -> None:
    (p, ours), (q, theirs) = pair(numbers(4095), lr=1e-2, weight_decay=0.1)
    for t in range(1, STEPS + 1):
        p.grad, q.grad = gradient((4095,), t, 1.0), gradient((4095,), t, 1.0)
        ours.step()
        theirs.step()
    assert torch.equal(ours.state[p]["exp_avg"], theirs.state[q]["state1"])
    assert torch.equal(ours.state[p]["exp_avg_sq"], theirs.state[q]["state2"])
    # their bias correction multiplies elsewhere: two more roundings of a change
    assert_near_parameters(p, q, 3e-2)


def test_maps() -> None:
    for ours, signed in zip(adamw8.maps(), (True, False), strict=True):
        assert torch.equal(ours.map, bitsandbytes.functional.create_dynamic_map(signed=signed))


def test_numbers_next_to_where_steps_meet() -> None:
    """Their quantiser alone, on every step of the scale, its middles and their neighbours."""
    places = -1 + 2 * torch.arange(adamw8.STEPS) / (adamw8.STEPS - 1)
    middles = (places[1:] + places[:-1]) / 2
    beside = [middles, middles.nextafter(torch.tensor(9.0)), middles.nextafter(torch.tensor(-9.0))]
    units = torch.cat([places, *beside])
    units = torch.nn.functional.pad(units, (0, -len(units) % 255)).view(-1, 255)
    x = torch.nn.functional.pad(units, (1, 0), value=1.0)  # (blocks, 256)
    for to, values in zip(adamw8.maps(), (x, x.abs()), strict=True):
        for scale in (1.0, 0.7, 3e-5, 1e-39):
            codes, absmax = adamw8.quantise_ref(values * scale, to)
            theirs, state = bitsandbytes.functional.quantize_blockwise(values * scale, to.map, blocksize=256)
            assert torch.equal(codes, theirs) and torch.equal(absmax, state.absmax)
