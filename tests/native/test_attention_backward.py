"""The gradients of attention against the formula in float64, by the rule of two: variants, shapes, strides, threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minillm.model.attention import attend, attention_ref
from minillm.ops import attention, attention_training, native
from tests.decoders import SHAPES, decoder
from tests.error import assert_near, assert_rule_of_two

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
ISAS = [isa for isa, runs in native.isas().items() if runs and isa != "avx2"]  # avx2 runs ref
compiled = pytest.mark.skipif(not native.available(), reason=f"minillm._cpu: {native.why_not()}")
fast = pytest.mark.skipif(not native.isas().get("avx512vnni"), reason="the kernels serve from AVX-512 on")


class Size(NamedTuple):
    B: int
    H: int
    G: int
    T: int
    E: int


#: One block and several, full and cut; heads of one vector, several, none whole; all ways to share keys and values.
SIZES = [
    Size(2, 4, 4, 64, 64), Size(1, 4, 2, 130, 24), Size(2, 6, 2, 33, 5), Size(1, 71, 1, 70, 64),
    Size(1, 8, 2, 200, 128), Size(1, 2, 1, 65, 256), Size(1, 3, 3, 2, 8), Size(3, 2, 2, 63, 17),
    Size(1, 20, 1, 129, 16), Size(1, 1, 1, 300, 32),
]  # fmt: skip


class Case(NamedTuple):
    """q, k, v and dy as projections leave them: (B, T, heads, E), seen as (B, heads, T, E)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dy: Tensor

    def found(self, isa: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        statistics = torch.full((*self.q.shape[:3], 2), torch.nan)
        y = attention.attend(self.q, self.k, self.v, statistics=statistics, isa=isa)
        return attention_training.gradients((self.q, self.k, self.v, y), statistics, self.dy, isa=isa)

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(x.to(dtype) for x in self))

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        return attention_training.gradients_ref(*self.to(torch.float64))


def case_of(size: Size, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(0)
    heads = (size.H, size.G, size.G, size.H)
    return Case(*(torch.randn(size.B, size.T, n, size.E, generator=generator).to(dtype).transpose(1, 2) for n in heads))


def check(found: tuple[Tensor, ...], case: Case, what: str) -> None:
    plain, exact = attention_training.gradients_ref(*case), case.exact()
    for name, ours, theirs, right in zip(("dq", "dk", "dv"), found, plain, exact, strict=True):
        assert_rule_of_two(ours, theirs, right, f"{what} {name}")


def test_the_definition_is_the_derivative() -> None:
    case = case_of(Size(2, 6, 2, 9, 5), torch.float64)
    inputs = [x.clone().requires_grad_() for x in case[:3]]
    attention_ref(*inputs, None).backward(case.dy)
    for x, right in zip(inputs, attention_training.gradients_ref(*case), strict=True):
        torch.testing.assert_close(x.grad, right, rtol=1e-12, atol=1e-12)


@compiled
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "_".join(map(str, size)))
def test_every_variant_is_the_formula_up_to_rounding(size: Size, dtype: torch.dtype) -> None:
    case = case_of(size, dtype)
    for isa in ISAS:
        found = case.found(isa)
        assert all(x.dtype == dtype and x.transpose(1, 2).is_contiguous() for x in found)
        check(found, case, isa)


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_the_sums_of_the_forward_pass(isa: str) -> None:
    """Scores far apart and equal; also of queries behind others."""
    for factor, queries in ((1, 130), (30, 130), (0, 130), (1, 1), (1, 9)):
        case = case_of(Size(2, 8, 2, 130, 24), torch.float32)
        q = case.q[:, :, -queries:] * factor
        statistics = torch.empty(*q.shape[:3], 2)
        attention.attend(q, case.k, case.v, statistics=statistics, isa=isa)
        hidden = torch.ones(130, 130, dtype=torch.bool).triu(1)[-queries:]
        products = (q.double() @ case.k.double().repeat_interleave(4, dim=1).mT).masked_fill(hidden, -torch.inf)
        largest = products.amax(-1)
        sums = ((products - largest[..., None]) / 24**0.5).exp().sum(-1)
        right = torch.stack((largest, sums), dim=-1)
        near = 4e-7 * max(factor, 1)  # a few roundings of 2^-24, of products of about 5 times the factor
        torch.testing.assert_close(statistics.double(), right, rtol=2 * near, atol=10 * near)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FORMATS[:2], ids=str)
def test_hard_scores(isa: str, dtype: torch.dtype) -> None:
    for factor in (0, 10):
        case = case_of(Size(1, 4, 2, 130, 24), dtype)
        case = case._replace(q=case.q * factor)
        check(case.found(isa), case, f"times {factor}")


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("size", [Size(2, 4, 4, 130, 24), Size(1, 71, 1, 70, 16)])
def test_the_number_of_threads_changes_nothing(size: Size, set_threads: Callable[[int], None]) -> None:
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(case_of(size, torch.float32).found())
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@compiled
def test_any_strides_but_the_last() -> None:
    case = case_of(Size(2, 4, 2, 70, 24), torch.bfloat16)
    moved = Case(*(x.contiguous() for x in case))
    assert all(torch.equal(x, y) for x, y in zip(case.found(), moved.found(), strict=True))
    inputs = [x.clone().requires_grad_() for x in case[:3]]
    attention_training.attend(*inputs).backward(case.dy.transpose(2, 3).contiguous().transpose(2, 3))
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs, case.found(), strict=True) if x.grad is not None)


@compiled
def test_misuse_names_the_argument() -> None:
    case = case_of(Size(1, 2, 2, 3, 4), torch.float32)
    sums = torch.zeros(1, 2, 3, 2)
    inputs = (case.q, case.k, case.v, case.q)
    with pytest.raises(ValueError, match="dy has shape"):
        attention_training.gradients(inputs, sums, case.dy[:, :1])
    with pytest.raises(TypeError, match=r"^dy is "):
        attention_training.gradients(inputs, sums, case.dy.bfloat16())
    with pytest.raises(ValueError, match="statistics has shape"):
        attention_training.gradients(inputs, sums[:, :1], case.dy)
    three = torch.zeros(1, 3, 3, 4)
    with pytest.raises(ValueError, match="multiple of G"):
        attention_training.gradients((three, case.k, case.v, three), torch.zeros(1, 3, 3, 2), three)
    with pytest.raises(ValueError, match="statistics has shape"):
        attention.attend(case.q, case.k, case.v, statistics=sums[:, :1])
    empty = torch.zeros(0, 2, 3, 4)
    assert attention_training.gradients((empty,) * 4, torch.zeros(0, 2, 3, 2), empty)[0].shape == empty.shape


@fast
def test_when_it_serves() -> None:
    q, k, v, _ = case_of(Size(1, 2, 2, 3, 4), torch.float32)
    assert not attention_training.serves(q, k, v)  # no gradient wanted
    v.requires_grad_()
    assert attention_training.serves(q, k, v)
    assert not attention_training.serves(q[:, :, 1:], k, v)  # behind cached ones
    assert not attention_training.serves(q.double(), k.double(), v.double())
    scattered = v.detach().mT.contiguous().mT  # as a hook may leave it; torch's kernel takes it
    assert not attention_training.serves(q, k.requires_grad_(), scattered)
    assert attend(q, k, scattered, None).shape == q.shape
    with torch.no_grad():
        assert not attention_training.serves(q, k, v)
    with native.aside():
        assert not attention_training.serves(q, k, v)


def test_tensors_without_numbers_and_transforms_are_torchs() -> None:
    """A kernel would read from address 0; torch.func knows the derivatives of torch's own functions alone."""
    with FakeTensorMode():
        q = torch.empty(1, 2, 3, 4, requires_grad=True)
        assert torch.autograd.grad(attend(q, q, q, None).sum(), q)[0].shape == q.shape
    model, tokens = decoder(), torch.tensor([[1, 2, 3]])
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    found = torch.func.grad(lambda own: torch.func.functional_call(model, own, (tokens,)).sum())(parameters)
    model(tokens).sum().backward()
    for name, x in model.named_parameters():
        assert x.grad is not None
        assert_near(found[name], x.grad, 1e-5, name)


@fast
@pytest.mark.parametrize("kind", SHAPES)
def test_a_model_trains_through_it(kind: str) -> None:
    """The gradients of every parameter are those of torch's attention; with ALiBi torch's own serves."""
    tokens = torch.randint(0, 131, (2, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for plainly in (False, True):
        model = decoder(**SHAPES[kind])
        context = native.aside() if plainly else torch.enable_grad()
        with context:
            model(tokens).log_softmax(-1)[..., 5].mean().backward()
        found.append(torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None]))
    assert_near(found[0], found[1], 1e-5)  # two layers deep in fp32
    assert torch.equal(found[0], found[1]) == (SHAPES[kind].get("position") == "alibi")


FAULTS: dict[str, Callable[[Case], Case]] = {
    "one percent": lambda case: case._replace(dy=case.dy * 1.02),
    "a head for another": lambda case: case._replace(q=case.q.flip(1)),
    "a group for another": lambda case: case._replace(v=case.v.flip(1)),
    "one token late": lambda case: case._replace(k=case.k.roll(1, dims=2)),
    "scale": lambda case: case._replace(q=case.q * 1.05),
}


@compiled
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_faults_are_seen(fault: str, dtype: torch.dtype) -> None:
    case = case_of(Size(1, 4, 2, 70, 24), dtype)
    check(case.found(), case, "right")
    with pytest.raises(AssertionError, match="wrong"):
        check(FAULTS[fault](case).found(), case, "wrong")


def test_attend_takes_it_for_plain_causal_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(attention_training, "serves", lambda *_: True)
    monkeypatch.setattr(attention_training, "attend", lambda q, k, v: calls.append(1) or q)
    q, k, v, _ = case_of(Size(1, 2, 2, 3, 4), torch.float32)
    attend(q, k, v, None)
    attend(q, k, v, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    assert len(calls) == 1
