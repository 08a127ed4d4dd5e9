"""fp32 products by every variant against float64, by the rule of two; strides, edges, gradients, when they serve."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minillm.model.linear import times
from minillm.ops import matmul, native
from tests.error import assert_rule_of_two

ISAS = [isa for isa, runs in native.isas().items() if runs]
compiled = pytest.mark.skipif(not native.available(), reason=f"minillm._cpu: {native.why_not()}")

#: One number; panels and blocks of k full, cut, and one number over; long and short in each direction.
SIZES = [
    (1, 1, 1),
    (14, 256, 32),
    (15, 257, 33),
    (13, 255, 31),
    (100, 300, 130),
    (3, 5, 7),
    (129, 511, 257),
    (70, 768, 96),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.T.contiguous().T,
    "gaps": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "rows with gaps": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@compiled
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_variant_is_the_product(isa: str, size: tuple[int, int, int]) -> None:
    rows, depth, columns = size
    a, b, c = drawn(rows, depth), drawn(depth, columns, seed=1), drawn(rows, columns, seed=2)
    plain, exact = a @ b, a.double() @ b.double()
    for of_a in LAYOUTS.values():
        for of_b in LAYOUTS.values():
            x, y = of_a(a), of_b(b)
            assert torch.equal(x, a) and torch.equal(y, b)
            assert_rule_of_two(matmul.product(x, y, isa=isa), plain, exact, isa)
            total = c.clone()
            assert matmul.product(x, y, out=total, add=True, isa=isa) is total
            assert_rule_of_two(total, c + plain, c.double() + exact, f"{isa}, added")
            assert torch.equal(matmul.product(x, y, out=total, isa=isa), matmul.product(x, y, isa=isa))


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_a_sum_of_nothing_is_zero(isa: str) -> None:
    a, b, c = torch.empty(3, 0), torch.empty(0, 5), drawn(3, 5)
    assert torch.equal(matmul.product(a, b, out=torch.full((3, 5), torch.nan), isa=isa), torch.zeros(3, 5))
    assert torch.equal(matmul.product(a, b, out=c.clone(), add=True, isa=isa), c)
    assert torch.equal(matmul.product(c[:, :1], b[:1, :0].new_ones(1, 2), add=True, isa=isa), c[:, :1].expand(3, 2))


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_places_beyond_int32(isa: str) -> None:
    """Sixteen rows 170 million numbers apart, in memory of which almost nothing is ever touched."""
    apart, no_reserve = 170_000_000, 0x4000  # Linux's MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, (15 * apart + 8) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except (OSError, AttributeError) as error:
        pytest.skip(f"no 10 GB of addresses here: {error}")
    a, b = torch.frombuffer(memory, dtype=torch.float32).as_strided((16, 3), (apart, 2)), drawn(3, 40)
    a.copy_(drawn(16, 3))
    assert_rule_of_two(matmul.product(a, b, isa=isa), a @ b, a.double() @ b.double(), isa)


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_factors_that_are_one_number(isa: str) -> None:
    """As the gradient of a plain sum is."""
    a, one = drawn(40, 30), torch.ones(()).expand(20, 40)
    torch.testing.assert_close(matmul.product(one, a, isa=isa), a.sum(0).expand(20, 30))
    torch.testing.assert_close(matmul.product(a.T, one.T, isa=isa), a.sum(0)[:, None].expand(30, 20))


@compiled
def test_threads_change_nothing() -> None:
    a, b = drawn(100, 300), drawn(300, 500, seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(matmul.product(a, b, isa=ISAS[-1]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_linear_and_its_gradients() -> None:
    x, w, b, g = (
        drawn(2, 70, 96).requires_grad_(),
        drawn(130, 96, seed=1),
        drawn(130, seed=2),
        drawn(2, 70, 130, seed=3),
    )
    leaves = [x, w.requires_grad_(), b.requires_grad_()]
    found = [*torch.autograd.grad(matmul.linear(*leaves), leaves, g), matmul.linear(*leaves)]
    plain = [*torch.autograd.grad(F.linear(*leaves), leaves, g), F.linear(*leaves)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = [*torch.autograd.grad(F.linear(*wide), wide, g.double()), F.linear(*wide)]
    for name, *three in zip("dx dw db y".split(), found, plain, exact, strict=True):
        assert_rule_of_two(*three, name)
    only = torch.autograd.grad(matmul.linear(x, w.detach()), x, g)
    assert torch.equal(only[0], found[0])


@compiled
@pytest.mark.skipif(not native.isas().get("avx512vnni"), reason="the kernel serves from AVX-512 on")
def test_when_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_is_faster", lambda: True)
    x, w = drawn(2, 40, 96), drawn(130, 96)
    assert matmul.serves(x, w)
    assert not matmul.serves(x[:, :20], w) and not matmul.serves(x, w[:63]) and not matmul.serves(x[..., :8], w[:, :8])
    assert not matmul.serves(x.double(), w.double()) and not matmul.serves(x.bfloat16(), w.bfloat16())
    assert not matmul.serves(x, w.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not matmul.serves(x, w)
    monkeypatch.setattr(matmul, "_is_faster", lambda: False)
    assert not matmul.serves(x, w)
    assert torch.equal(matmul.product(x[0], w.T), x[0] @ w.T)


def test_a_result_may_be_changed_in_place() -> None:
    """As that of torch's own linear may."""
    x, w = drawn(2, 70, 96).requires_grad_(), drawn(130, 96)
    y = matmul.linear(x, w)
    y /= 2
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], w.sum(0).expand(x.shape) / 2)


@compiled
def test_tensors_without_numbers_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel would read from address 0."""
    monkeypatch.setattr(matmul, "_is_faster", lambda: True)
    with FakeTensorMode():
        x, w = torch.empty(100, 96, requires_grad=True), torch.empty(130, 96)
        y = times(x, w)
        assert y.shape == (100, 130) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_transforms_of_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_is_faster", native.available)
    x, w = drawn(70, 96), drawn(130, 96)
    found = torch.func.grad(lambda x: times(x, w).sum())(x)
    torch.testing.assert_close(found, w.sum(0).expand(70, 96))
    with torch.no_grad():
        assert torch.vmap(lambda row: times(row, w))(x[:2]).shape == (2, 130)


@compiled
def test_misuse_names_the_argument() -> None:
    a, b = drawn(3, 4), drawn(4, 5)
    with pytest.raises(ValueError, match="b has shape"):
        matmul.product(a, b[:3], isa="ref")
    with pytest.raises(TypeError, match="a is torch"):
        matmul.product(a.double(), b, isa="ref")
    with pytest.raises(ValueError, match="out has shape"):
        matmul.product(a, b, out=drawn(3, 4), isa="ref")
    with pytest.raises(ValueError, match="out is not contiguous"):
        matmul.product(a, b, out=drawn(5, 3).T, isa="ref")
    assert matmul.product(a[:0], b, isa="ref").shape == (0, 5)


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_a_fault_is_seen(isa: str) -> None:
    a, b = drawn(20, 300), drawn(300, 40, seed=1)
    with pytest.raises(AssertionError, match="wrong"):
        assert_rule_of_two(matmul.product(a * (1 + 1e-5), b, isa=isa), a @ b, a.double() @ b.double(), "wrong")
