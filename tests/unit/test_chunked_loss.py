"""The loss in chunks against torch's on all logits: numbers, gradients, formats, and that it never holds the logits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minillm.errors import InputError
from minillm.losses import chunked_cross_entropy, chunked_next_token_loss, count_targets, next_token_loss
from minillm.losses.chunked import chunked_cross_entropy_ref, rows_in_chunk
from tests.error import assert_near, assert_rule_of_two

M, D, V = 23, 12, 37
EVERY_SPLIT = pytest.mark.parametrize("rows", [1, 5, 8, M, 99])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Batch:
    """Hidden states, head and targets; about a third of the rows does not count."""

    def __init__(self, dtype: torch.dtype = torch.float64, *, frozen: bool = False) -> None:
        self.hidden = (2 * drawn(M, D)).to(dtype).requires_grad_()
        self.weight = drawn(V, D, seed=1).to(dtype).requires_grad_(not frozen)
        self.targets = torch.randint(V, (M,), generator=torch.Generator().manual_seed(2))
        self.targets[3:6] = 7  # a token that comes several times
        self.keep = drawn(M, seed=3) > -0.5

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.targets, self.keep

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [x for x in (self.hidden, self.weight) if x.requires_grad])


@EVERY_SPLIT
@pytest.mark.parametrize("total", [None, 1, 100, torch.tensor(7)])
def test_equals_the_definition(rows: int, total: Tensor | int | None) -> None:
    batch = Batch()
    found = chunked_cross_entropy(*batch.all, total=total, rows=rows)
    expected = chunked_cross_entropy_ref(*batch.all, total=total)
    assert_near(found, expected, 1e-14, "loss")  # float64 rounds at 1e-16
    for ours, theirs in zip(batch.gradients(3 * found), batch.gradients(3 * expected), strict=True):
        assert_near(ours, theirs, 1e-14, "gradient")


def test_the_definition_is_the_formula() -> None:
    hidden, weight, targets, keep = Batch().all
    logits = hidden @ weight.T
    terms = [logits[m].exp().sum().log() - logits[m, targets[m]] for m in range(M) if keep[m]]
    assert_near(chunked_cross_entropy_ref(hidden, weight, targets, keep), torch.stack(terms).mean(), 1e-14)


@EVERY_SPLIT
def test_gradients_are_derivatives(rows: int) -> None:
    batch = Batch()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, weight, batch.targets, batch.keep, rows=rows)

    assert torch.autograd.gradcheck(loss, (batch.hidden, batch.weight))


@pytest.mark.parametrize("rows", [4, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_torch_on_all_logits(dtype: torch.dtype, rows: int) -> None:
    ours, plain, exact = Batch(dtype), Batch(dtype), Batch()
    exact.hidden, exact.weight = (x.detach().double().requires_grad_() for x in (plain.hidden, plain.weight))
    losses = [
        chunked_cross_entropy(*ours.all, rows=rows),
        chunked_cross_entropy_ref(*plain.all),
        chunked_cross_entropy_ref(*exact.all),
    ]
    assert losses[0].dtype == torch.float32, "also of 16-bit weights"
    assert_rule_of_two(*losses, "loss")
    found = [batch.gradients(loss) for batch, loss in zip((ours, plain, exact), losses, strict=True)]
    for name, gradients in zip(("hidden", "weight"), zip(*found, strict=True), strict=True):
        assert gradients[0].dtype == dtype
        assert_rule_of_two(*gradients, name)


def test_a_certain_prediction_still_has_a_gradient_in_16_bits() -> None:
    """p = 0.9995 rounds to 1 in bf16; the gradient p - 1 must not become 0."""
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[7.5], [0.0]], dtype=torch.bfloat16)
    chunked_cross_entropy(hidden, weight, torch.tensor([0])).backward()  # type: ignore[no-untyped-call]
    expected = 7.5 * (torch.tensor(7.5).sigmoid() - 1)
    assert hidden.grad is not None
    assert_near(hidden.grad, expected.view(1, 1), 2**-7, "gradient")  # bf16 has 8 bits, rounded twice


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_do_not_overflow(sign: int) -> None:
    """exp(1000) is beyond fp64, exp(-1000) below it."""
    batch = Batch()
    with torch.no_grad():
        batch.hidden[:, 0], batch.weight[:, 0] = sign * 1000, 1
    losses = [way(*batch.all) for way in (chunked_cross_entropy, chunked_cross_entropy_ref)]
    assert_near(losses[0], losses[1], 1e-11, "loss")  # logits of 1000 are rounded at 1e-13
    for ours, theirs in zip(*map(batch.gradients, losses), strict=True):
        assert_near(ours, theirs, 1e-11, "gradient")


def test_rare_tokens_learn_in_fp16() -> None:
    """Softmax over 30,000 tokens divided by many rows is below fp16's least number; the sum over rows is not."""
    hidden, weight = torch.ones(300, 4).half().requires_grad_(), torch.zeros(30_000, 4).half().requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, torch.zeros(300, dtype=torch.long), rows=50)
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    # every other token: 1/V; fp16 has 5 to 6 of its 11 digits left at 3e-5
    assert_near(weight.grad[1:], torch.full((29_999, 4), 1 / 30_000), 1e-2, "gradient")


def test_large_gradients_fit_fp16() -> None:
    """The sum over rows before it is divided by their number is 300 * 400 = 120,000; fp16 ends at 65,504."""
    hidden, weight = torch.full((300, 1), 400.0).half().requires_grad_(), torch.zeros(2, 1).half().requires_grad_()
    chunked_cross_entropy(hidden, weight, torch.zeros(300, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and weight.grad.flatten().tolist() == [-200.0, 200.0]


def test_rows_that_do_not_count_get_no_gradient_and_may_hold_anything() -> None:
    batch = Batch()
    with torch.no_grad():
        batch.hidden[~batch.keep] = float("nan")
        batch.targets[~batch.keep] = -100
    loss = chunked_cross_entropy(*batch.all, rows=4)
    gradient = batch.gradients(loss)[0]
    assert bool((gradient[~batch.keep] == 0).all()) and bool((gradient[batch.keep] != 0).any(dim=1).all())
    assert torch.isfinite(loss)


@pytest.mark.parametrize("empty", [True, False])
def test_nothing_that_counts_is_no_loss(empty: bool) -> None:
    batch = Batch(torch.float32)
    hidden, targets = (batch.hidden[:0], batch.targets[:0]) if empty else (batch.hidden, batch.targets)
    loss = chunked_cross_entropy(hidden, batch.weight, targets, torch.zeros_like(targets, dtype=torch.bool))
    assert loss == 0 and all(bool((gradient == 0).all()) for gradient in batch.gradients(loss))


def saved(loss: Tensor) -> list[Tensor]:
    node: Any = loss.grad_fn
    return [x for x in node.saved_tensors if x is not None]


def test_a_frozen_head_has_no_gradient_and_a_frozen_model_neither() -> None:
    batch, reference = Batch(frozen=True), Batch()
    loss = chunked_cross_entropy(*batch.all, rows=4)
    assert [tuple(x.shape) for x in saved(loss)] == [(int(batch.keep.sum()),), (int(batch.keep.sum()), D)]
    expected = reference.gradients(chunked_cross_entropy(*reference.all, rows=4))
    assert torch.equal(batch.gradients(loss)[0], expected[0])
    hidden = reference.hidden.detach()
    loss = chunked_cross_entropy(hidden, reference.weight, *reference.all[2:], rows=4)
    assert torch.equal(torch.autograd.grad(loss, reference.weight)[0], expected[1])
    assert not chunked_cross_entropy(hidden, reference.weight.detach(), *reference.all[2:]).requires_grad


def test_without_gradients_the_same_loss() -> None:
    batch = Batch(torch.float32)
    with torch.no_grad():
        loss = chunked_cross_entropy(*batch.all, rows=4)
    assert not loss.requires_grad and torch.equal(loss, chunked_cross_entropy(*batch.all, rows=4).detach())


def test_backward_twice_adds_up() -> None:
    """What is kept for the second time must not be what the first handed out."""
    batch = Batch(torch.float32)
    loss = chunked_cross_entropy(*batch.all)
    once = [gradient.clone() for gradient in batch.gradients(chunked_cross_entropy(*batch.all))]
    for _ in range(2):
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    for x, gradient in zip((batch.hidden, batch.weight), once, strict=True):
        assert x.grad is not None and torch.equal(x.grad, 2 * gradient)


def test_second_derivatives_are_refused() -> None:
    batch = Batch()
    gradient = torch.autograd.grad(chunked_cross_entropy(*batch.all) ** 2, batch.hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_multiplies_in_16_bits(dtype: torch.dtype) -> None:
    ours, plain, exact = Batch(torch.float32), Batch(torch.float32), Batch()
    exact.hidden, exact.weight = (x.detach().double().requires_grad_() for x in (plain.hidden, plain.weight))
    with torch.autocast("cpu", dtype=dtype):
        losses = [chunked_cross_entropy(*ours.all, rows=4), chunked_cross_entropy_ref(*plain.all)]
        assert torch.is_autocast_enabled("cpu")
    losses.append(chunked_cross_entropy_ref(*exact.all))
    assert losses[0].dtype == torch.float32
    assert_near(losses[0], losses[1], 1e-6, "the same products, rounded to the same 16 bits")
    found = [batch.gradients(loss) for batch, loss in zip((ours, plain, exact), losses, strict=True)]
    for gradients in zip(*found, strict=True):
        assert gradients[0].dtype == torch.float32
        assert_rule_of_two(*gradients, str(dtype))


def test_within_checkpointing_the_same_bits() -> None:
    batch = Batch(torch.float32)
    plain = batch.gradients(chunked_cross_entropy(*batch.all, rows=4))
    loss = checkpoint(lambda *x: chunked_cross_entropy(x[0] * 1, *x[1:], rows=4), *batch.all, use_reentrant=False)
    for ours, theirs in zip(batch.gradients(loss), plain, strict=True):
        assert torch.equal(ours, theirs)


def tokens_and_hidden(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(V, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(5))
    keep = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return drawn(*tokens.shape, D).float().requires_grad_(), tokens, keep


@pytest.mark.parametrize("total", [None, 1])
@pytest.mark.parametrize("masked", [True, False])
def test_next_token_loss_without_logits(masked: bool, total: int | None) -> None:
    hidden, tokens, keep = tokens_and_hidden([7, 2, 4])
    weight, mask = Batch(torch.float32).weight, keep if masked else None
    found = chunked_next_token_loss(hidden, weight, tokens, mask, total=total)
    expected = next_token_loss(F.linear(hidden, weight), tokens, mask, total=total)
    assert_near(found, expected, 1e-6, "loss")  # the same numbers, added in another order
    for ours, theirs in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected)), strict=True):
        assert_near(ours, theirs, 1e-6, "gradient")


def test_micro_batches_of_unequal_length_add_up_to_the_whole() -> None:
    lengths = [7, 2, 4]
    hidden, tokens, keep = tokens_and_hidden(lengths)
    weight, total = Batch(torch.float32).weight, count_targets(tokens, keep)
    whole = chunked_next_token_loss(hidden, weight, tokens, keep)
    parts = [
        chunked_next_token_loss(hidden[row : row + 1, :n], weight, tokens[row : row + 1, :n], total=total)
        for row, n in enumerate(lengths)
    ]
    assert_near(torch.stack(parts).sum(), whole, 1e-6, "loss")
    split, joint = (torch.autograd.grad(loss, (hidden, weight)) for loss in (torch.stack(parts).sum(), whole))
    for ours, theirs in zip(split, joint, strict=True):
        assert_near(ours, theirs, 1e-6, "gradient")


@pytest.mark.parametrize("target", [-1, V, -100])
def test_a_target_outside_the_vocabulary_is_named(target: int) -> None:
    batch = Batch()
    batch.targets[int(batch.keep.nonzero()[0])] = target
    with pytest.raises(InputError, match=f"target {target} is outside the head's vocabulary of {V}; check the"):
        chunked_cross_entropy(*batch.all)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"hidden": torch.zeros(M, D + 1)}, ValueError, r"hidden \(23, 13\) and weight \(37, 12\) must be"),
        ({"hidden": torch.zeros(1, M, D)}, ValueError, r"hidden \(1, 23, 12\) and weight"),
        ({"targets": torch.zeros(M - 1).long()}, ValueError, r"targets have shape \(22,\); one for each of 23 rows"),
        ({"keep": torch.ones(M)}, ValueError, r"keep is torch.float32 \(23,\); it must be bool \(23,\)"),
        ({"hidden": torch.zeros(M, D).half()}, TypeError, "hidden is torch.float16 and weight torch.float64; convert"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    names = ("hidden", "weight", "targets", "keep")
    with pytest.raises(kind, match=message):
        chunked_cross_entropy(**{**dict(zip(names, Batch().all, strict=True)), **change})


def test_a_chunk_fits_its_memory() -> None:
    for vocabulary in (100, 32_000, 65_000):
        for dtype, size in ((torch.float32, 4), (torch.bfloat16, 6), (torch.float64, 8)):
            rows = rows_in_chunk(vocabulary, dtype)
            assert rows * vocabulary * size <= 2**26 < (rows + 1) * vocabulary * size or rows == 256


MEASURE = """
import re, sys
import torch
from minillm.losses.chunked import chunked_cross_entropy, chunked_cross_entropy_ref

def status(field):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(field + r":\\s+(\\d+) kB", file.read())[1])

def step(rows, vocabulary):
    hidden = torch.randn(rows, 256, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 256, dtype=dtype, requires_grad=trained)
    bare = status("VmRSS")
    way(hidden, weight, torch.randint(vocabulary, (rows,))).backward()
    return status("VmHWM") - bare

torch.set_num_threads(2)
way, dtype = {"plain": chunked_cross_entropy_ref, "chunked": chunked_cross_entropy}[sys.argv[1]], eval(sys.argv[2])
trained = sys.argv[3] == "trained"
step(64, 64)  # what the first products map
print(step(2048, 32_000))
"""


def peak(way: str, dtype: torch.dtype, head: str) -> int:
    command = [sys.executable, "-c", MEASURE, way, str(dtype), head]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "head"),
    [(torch.float32, "trained"), (torch.bfloat16, "frozen")],
    ids=["float32-trained", "bfloat16-frozen"],
)
def test_peak_memory_of_2048_rows_over_32000_tokens(dtype: torch.dtype, head: str) -> None:
    """A chunk and twice (V, D): dW, and the product added to it or what the products make of W for themselves."""
    found, plain = peak("chunked", dtype, head), peak("plain", dtype, head)
    print(f"{dtype} {head}: peak {found / 2**20:.0f} MiB, plain {plain / 2**20:.0f} MiB")
    assert found < 2**26 + 2 * 4 * 32_000 * 256 + 2**24 and found < plain / 5
