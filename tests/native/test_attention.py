"""Every attention variant against the formula in float64, by the rule of two; masks, strides, threads and misuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from minillm.model.alibi import alibi_bias
from minillm.model.attention import attention_ref, visible_keys
from minillm.ops import attention, native
from tests.error import assert_rule_of_two

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
ISAS = [isa for isa, runs in native.isas().items() if runs and isa != "avx2"]  # avx2 runs ref
HEADS = ((8, 8), (8, 2), (71, 1), (32, 4))
compiled = pytest.mark.skipif(not native.available(), reason=f"minillm._cpu: {native.why_not()}")


class Size(NamedTuple):
    H: int
    G: int
    T: int
    S: int
    E: int


#: Of two rows each: one token and several, new and behind cached ones; lanes shared by 16, 8, 4, 2 heads and by one;
#: tiles of one to four vectors; one block of keys, its end, and two; heads shorter than a vector and the longest.
SIZES = [
    *(Size(*heads, 1, keys, size) for heads in HEADS for keys, size in ((1, 64), (97, 64), (130, 24))),
    *(Size(*heads, 2, 7, 24) for heads in HEADS),
    *(Size(*heads, 7, 96, 8) for heads in HEADS),
    *(Size(*heads, 8, 130, 64) for heads in HEADS[:3]),
    *(Size(*heads, 33, 33, 24) for heads in HEADS),
    *(Size(*heads, 64, 130, 64) for heads in HEADS[:2]),
    *(Size(*heads, 33, 97, 128) for heads in HEADS[:2]),
    Size(32, 4, 1, 64, 256),
    Size(8, 2, 64, 64, 256),
    Size(8, 8, 7, 20, 256),
    Size(6, 3, 5, 17, 5),
    Size(3, 1, 1, 9, 1),
    Size(32, 4, 33, 130, 17),
    Size(8, 4, 1, 100, 64),  # two heads a group, eight lanes each
    Size(8, 2, 2, 100, 64),
]
KINDS = ("plain", "padded", "alibi", "both")


class Case(NamedTuple):
    """q, k, v in views of larger tensors, as projections and caches have them; keep and bias as `attend` takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor | None
    bias: Tensor | None

    def mask(self, dtype: torch.dtype) -> Tensor:
        """The same as `attention_ref` takes it."""
        visible = visible_keys(self.keep, self.q.shape[2], self.k.shape[2], self.q.device)
        bias = torch.zeros((), dtype=dtype) if self.bias is None else self.bias.to(dtype)
        return bias.masked_fill(~visible, -torch.inf)

    def found(self, isa: str | None = None) -> Tensor:
        return attention.attend(self.q, self.k, self.v, keep=self.keep, bias=self.bias, isa=isa)

    def exact(self) -> Tensor:
        return attention_ref(self.q.double(), self.k.double(), self.v.double(), self.mask(torch.float64))

    def plain(self) -> Tensor:
        """The formula with every step in the format of q."""
        k, v = (x.repeat_interleave(self.q.shape[1] // x.shape[1], dim=1) for x in (self.k, self.v))
        scores = self.q @ k.mT / self.q.shape[-1] ** 0.5 + self.mask(self.q.dtype)
        return scores.softmax(-1) @ v


def case_of(size: Size, kind: str, dtype: torch.dtype, batch: int = 2) -> Case:
    """Row r of the batch has 5 r pads on the left, where there is padding; what lies beyond S is NaN."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = drawn(batch, size.T, size.H, size.E).transpose(1, 2)
    k, v = (torch.full((batch, size.G, size.S + 3, size.E), torch.nan, dtype=dtype)[:, :, : size.S] for _ in range(2))
    k.copy_(drawn(*k.shape))
    v.copy_(drawn(*v.shape))
    pads = (5 * torch.arange(batch)).clamp(max=size.S - 1)
    keep = torch.arange(size.S) >= pads[:, None] if kind in ("padded", "both") else None
    positions = torch.arange(size.S)[None] if keep is None else (keep.long().cumsum(1) - 1) * keep
    return Case(q, k, v, keep, alibi_bias(positions, size.H, size.E, dtype) if kind in ("alibi", "both") else None)


def check(case: Case, found: Tensor, what: str) -> None:
    assert_rule_of_two(found, case.plain(), case.exact(), what)


@compiled
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "_".join(map(str, size)))
def test_every_variant_is_the_formula_up_to_rounding(size: Size, dtype: torch.dtype) -> None:
    for kind in KINDS:
        case = case_of(size, kind, dtype)
        plain, exact = case.plain(), case.exact()
        for isa in ISAS:
            found = case.found(isa)
            assert found.dtype == dtype and found.transpose(1, 2).is_contiguous()
            assert_rule_of_two(found, plain, exact, f"{isa} {kind}")


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("dtype", FORMATS[:2], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_the_number_of_threads_changes_nothing(
    heads: tuple[int, int], dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    for queries, keys in ((1, 130), (1, 1000), (8, 130), (64, 130)):
        case = case_of(Size(*heads, queries, keys, 64), "both", dtype, batch=1)
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(case.found())
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_alone_is_the_last_of_many(isa: str) -> None:
    """A chunk sees what its tokens see one by one, up to the rounding of sums in another order."""
    case = case_of(Size(8, 2, 9, 40, 24), "padded", torch.float32)
    together = case.found(isa)
    for i in range(9):
        end = 32 + i
        keep = case.keep[:, :end].contiguous() if case.keep is not None else None
        alone = attention.attend(case.q[:, :, i : i + 1], case.k[:, :, :end], case.v[:, :, :end], keep=keep, isa=isa)
        assert torch.allclose(alone, together[:, :, i : i + 1], rtol=0, atol=4e-6)  # some 40 roundings of 2^-24


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_hard_scores(isa: str, dtype: torch.dtype) -> None:
    """Scores far apart, all equal, and whole rows of padding over more than a block: finite, and each row right."""
    size = Size(8, 2, 130, 130, 24)
    case = case_of(size, "padded", dtype)
    keep = torch.zeros(2, 130, dtype=torch.bool)
    keep[1, 120:] = True
    alone = case._replace(keep=keep).found(isa)
    itself = case.v[0].repeat_interleave(4, dim=0)  # all that a pad sees; p v, 1 / sum and y are rounded
    assert torch.allclose(alone[0], itself, rtol=3 * torch.finfo(dtype).eps, atol=0)
    check(case._replace(keep=keep), alone, "only pads before")
    check(case._replace(q=case.q * 30), case._replace(q=case.q * 30).found(isa), "far apart")
    even = case._replace(q=case.q * 0).found(isa)
    check(case._replace(q=case.q * 0), even, "equal")


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_bias_may_be_the_least_number(isa: str, dtype: torch.dtype) -> None:
    """As in masks of floats: it hides keys, and where it meets all that a row sees, the row is finite and right."""
    case = case_of(Size(8, 2, 9, 9, 24), "both", dtype)
    assert case.keep is not None and case.bias is not None
    hidden = case.bias.masked_fill(~case.keep[:, None, None], torch.finfo(dtype).min)
    found = case._replace(bias=hidden).found(isa)
    assert torch.equal(found[0], case.found(isa)[0]) and torch.equal(found[1, :, 5:], case.found(isa)[1, :, 5:])
    check(case, found, "pads see themselves")


@compiled
def test_strides_of_projections() -> None:
    """k, v as views of (B, T, G, E), and q contiguous as (B, H, T, E): any strides but the last."""
    case = case_of(Size(8, 2, 9, 9, 24), "plain", torch.bfloat16)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.k, case.v))
    assert torch.equal(attention.attend(case.q.contiguous(), k, v), case.found())


# -- misuse, and the tests themselves ----------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q is a NoneType"),
        ({"q": torch.zeros(2, 8, 3)}, ValueError, "q has shape"),
        ({"q": torch.zeros(2, 8, 3, 24, dtype=torch.float64)}, TypeError, "float64"),
        ({"q": torch.zeros(2, 7, 3, 24)}, ValueError, "multiple of G"),
        ({"q": torch.zeros(2, 8, 10, 24)}, ValueError, "T at most S"),
        ({"q": torch.zeros(2, 8, 3, 24, device="meta")}, ValueError, "q is on meta; it must be"),
        ({"q": torch.zeros(2, 8, 24, 3).mT}, ValueError, "q has stride 3"),
        ({"q": torch.zeros(2, 8, 3, 24, requires_grad=True)}, ValueError, "q wants a gradient"),
        ({"q": torch.zeros(2, 8, 3, 257)}, ValueError, "256"),
        ({"k": torch.zeros(2, 2, 9, 23)}, ValueError, "k has shape"),
        ({"k": torch.zeros(2, 2, 9, 24, dtype=torch.bfloat16)}, TypeError, "k is torch.bfloat16"),
        ({"v": torch.zeros(2, 2, 8, 24)}, ValueError, "v has shape"),
        ({"v": torch.zeros(1, 2, 9, 24)}, ValueError, "v has shape"),
        ({"keep": torch.ones(2, 8, dtype=torch.bool)}, ValueError, "keep has shape"),
        ({"keep": torch.ones(2, 9)}, TypeError, "keep is torch.float32"),
        ({"keep": torch.ones(9, 2, dtype=torch.bool).T}, ValueError, "keep is not contiguous"),
        ({"bias": torch.zeros(2, 8, 9)}, ValueError, "bias has shape"),
        ({"bias": torch.zeros(1, 8, 1, 9, dtype=torch.float16)}, TypeError, "bias is torch.float16"),
        ({"isa": "neon"}, ValueError, "neon"),
    ],
)
def test_misuse_names_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {"q": torch.zeros(2, 8, 3, 24), "k": torch.zeros(2, 2, 9, 24), "v": torch.zeros(2, 2, 9, 24)}
    attention.attend(**right)
    with pytest.raises(error, match=message):
        attention.attend(**{**right, **change})


@compiled
def test_nothing_in_nothing_out() -> None:
    assert attention.attend(torch.zeros(0, 4, 3, 8), *[torch.zeros(0, 2, 5, 8)] * 2).shape == (0, 4, 3, 8)
    assert attention.attend(torch.zeros(2, 4, 0, 8), *[torch.zeros(2, 2, 5, 8)] * 2).shape == (2, 4, 0, 8)


def test_serves() -> None:
    x = torch.zeros(1, 1, 1, 8)
    fast = bool(native.isas().get("avx512vnni"))
    assert attention.serves(x) == attention.serves(x, x, x) == fast
    assert not attention.serves(x.double()) and not attention.serves(torch.zeros(1, 1, 1, 257))
    assert not attention.serves(x.to("meta")) and not attention.serves(x, x.clone().requires_grad_())
    with torch.no_grad():
        assert attention.serves(x, x.clone().requires_grad_()) == fast


FAULTS: dict[str, Callable[[Case], Case]] = {
    # one percent; of bf16, which rounds by 0.4%, four units in the last place
    "a small error": lambda case: case._replace(v=case.v * (1 + max(0.01, 4 * torch.finfo(case.v.dtype).eps))),
    "a head for another": lambda case: case._replace(q=case.q.flip(1)),
    "a group for another": lambda case: case._replace(k=case.k.flip(1)),
    "a position off by one": lambda case: case._replace(q=case.q[:, :, 1:]),
    "a key's value for another's": lambda case: case._replace(v=case.v.roll(1, dims=2)),
    "padding forgotten": lambda case: case._replace(keep=None),
    "bias forgotten": lambda case: case._replace(bias=None),
    "bias of another head": lambda case: case._replace(bias=None if case.bias is None else case.bias.roll(1, dims=1)),
    "scale": lambda case: case._replace(q=case.q * 1.05),
}


@compiled
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_faults_are_seen(fault: str, dtype: torch.dtype) -> None:
    case = case_of(Size(8, 2, 8, 33, 64), "both", dtype)
    check(case, case.found(), "right")
    found = FAULTS[fault](case).found()
    if found.shape[2] < 8:
        found = torch.cat((found, case.found()[:, :, -1:]), dim=2)
    with pytest.raises(AssertionError, match="wrong"):
        check(case, found, "wrong")
