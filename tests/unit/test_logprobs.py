"""Log-probabilities, entropies, means and KL estimators: formulas in float64, gradients, limits, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm import losses
from minillm.errors import InputError
from tests.error import assert_rule_of_two

LN2 = math.log(2)
B, T, V = 3, 6, 11


def numbers(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """logits (B, T, V), tokens (B, T), keep (B, T): an answer after a prompt, padding on the right."""
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    places, starts, ends = torch.arange(T), torch.tensor([[2], [1], [4]]), torch.tensor([[6], [4], [5]])
    return numbers(B, T, V, dtype=dtype), tokens, (places >= starts) & (places < ends)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_measures_equal_their_formulas(temperature: float) -> None:
    logits, tokens, keep = batch()
    other = numbers(B, T, V, seed=3)
    logprobs = losses.token_logprobs(logits, tokens, keep, temperature=temperature)
    entropy = losses.token_entropy(logits, keep, temperature=temperature)
    kl = losses.full_kl(logits, other, keep, temperature=temperature)
    for b, t in product(range(B), range(T)):
        if not keep[b, t]:
            assert logprobs[b, t] == entropy[b, t] == kl[b, t] == 0
            continue
        p, q = ((x[b, t - 1] / temperature).softmax(dim=0) for x in (logits, other))
        assert abs(logprobs[b, t] - p[tokens[b, t]].log()) < 1e-14  # a dozen roundings of 1e-16
        assert abs(entropy[b, t] + (p * p.log()).sum()) < 1e-14
        assert abs(kl[b, t] - (p * (p / q).log()).sum()) < 1e-13


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, tokens, keep = batch()
    whole = losses.token_logprobs(logits, tokens, keep)
    monkeypatch.setattr("minillm.losses.logprobs._CHUNK", 2 * V)
    assert torch.equal(losses.token_logprobs(logits, tokens, keep), whole)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [2, 1000])
def test_token_measures_gradcheck(temperature: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.losses.logprobs._CHUNK", rows * V)
    logits, tokens, keep = batch()
    other = numbers(B, T, V, seed=3)
    measures: list[Callable[[Tensor], Tensor]] = [
        lambda z: losses.token_logprobs(z, tokens, keep, temperature=temperature),
        lambda z: losses.token_entropy(z, keep, temperature=temperature),
        lambda z: losses.full_kl(z, other, keep, temperature=temperature),
    ]
    for measure in measures:
        assert torch.autograd.gradcheck(measure, logits.clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_measures_are_as_exact_as_the_plain_formulas(dtype: torch.dtype) -> None:
    logits, tokens, _ = batch(dtype)
    ours = losses.token_logprobs(logits, tokens)
    assert ours.dtype == torch.float32
    plain, exact = (
        F.pad(logits.to(wide)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1), (1, 0))
        for wide in (torch.float32, torch.float64)
    )
    assert_rule_of_two(ours, plain, exact, "log-probabilities")


def test_minus_the_sum_of_logprobs_is_the_next_token_loss() -> None:
    logits, tokens, keep = batch()
    ours = losses.kept_mean(losses.token_logprobs(logits, tokens, keep), keep)
    assert abs(ours + losses.next_token_loss(logits, tokens, keep)) < 1e-14


def test_tokens_of_probability_zero() -> None:
    logits = numbers(1, 2, 5)
    logits[..., 3] = -math.inf
    logits.requires_grad_()
    other = logits.detach() + 0.5 * torch.arange(5)
    total = losses.token_entropy(logits).sum() + losses.full_kl(logits, other).sum()
    gradient = torch.autograd.grad(total, logits)[0]
    assert bool(total.isfinite()) and bool(gradient.isfinite().all()) and bool((gradient[..., 3] == 0).all())


def test_rows_left_out_get_no_gradient_and_may_be_nan() -> None:
    logits, tokens, keep = batch()
    logits[2, 4:] = math.nan  # predicts only padding
    logits.requires_grad_()
    total = losses.sequence_sums(losses.token_logprobs(logits, tokens, keep), keep).sum()
    gradient = torch.autograd.grad(total, logits)[0]
    assert bool(total.isfinite())
    assert torch.equal((gradient != 0).any(-1)[:, :-1], keep[:, 1:]) and bool((gradient[:, -1] == 0).all())


def test_sums_and_means_ignore_what_padding_holds() -> None:
    values = torch.tensor([[math.nan, -1.0, -3.0], [-math.inf, -5.0, math.nan], [math.nan] * 3])
    keep = torch.tensor([[False, True, True], [False, True, False], [False] * 3])
    assert losses.sequence_sums(values, keep).tolist() == [-4.0, -5.0, 0.0]
    assert losses.sequence_means(values, keep).tolist() == [-2.0, -5.0, 0.0]
    assert losses.kept_mean(values, keep).item() == -3.0


def test_kl_estimators_at_worked_values() -> None:
    # policy 1/2, reference 1/4: log r = -ln 2
    found = {
        kind: losses.estimated_kl(torch.tensor(-LN2), torch.tensor(-2 * LN2), kind) for kind in losses.KL_ESTIMATORS
    }
    expected = {"k1": LN2, "k2": LN2**2 / 2, "k3": 0.5 - 1 + LN2, "abs": LN2}
    assert {kind: pytest.approx(x.item(), rel=1e-6) for kind, x in found.items()} == expected


def test_kl_estimators_weighted_by_the_policy_give_kl_and_its_gradient() -> None:
    """E[k1] = E[k3] = KL exactly; as losses, k1's expected gradient is 0, k2's KL's, k3's the reverse KL's."""
    z, q = numbers(V).requires_grad_(), numbers(V, seed=4).log_softmax(0)
    logp = z.log_softmax(0)
    p = logp.detach().exp()
    forward, backward = (logp.exp() * (logp - q)).sum(), (q.exp() * (q - logp)).sum()
    expected = {"k1": torch.zeros(V), "k2": forward, "k3": backward}
    for kind, target in expected.items():
        estimate = (p * losses.estimated_kl(logp, q, kind)).sum()
        if kind != "k2":
            assert abs(estimate - forward) < 1e-13
        gradient = torch.autograd.grad(estimate, z, retain_graph=True)[0]
        want = torch.autograd.grad(target, z, retain_graph=True)[0] if target.requires_grad else target
        assert (gradient - want).abs().max() < 1e-13


def test_k3_keeps_its_digits_close_to_the_reference() -> None:
    near = losses.estimated_kl(torch.tensor(-1.0), torch.tensor(-1.0 - 2.0**-12), "k3").item()
    assert near == pytest.approx(2.0**-25, rel=1e-3)  # delta^2 / 2; exp(-delta) - 1 + delta in fp32 is off by half


def test_the_gradients_of_identical_logits_under_kl_are_zero() -> None:
    logits = numbers(B, T, V).requires_grad_()
    kl = losses.full_kl(logits, logits)
    assert bool((kl == 0).all()) and torch.autograd.grad(kl.sum(), logits)[0].abs().max() < 1e-15


def test_wpo_weights_equal_their_formula() -> None:
    logits, tokens, keep = batch()
    found = losses.wpo_weights(logits.requires_grad_(), tokens, keep)
    assert not found.requires_grad
    for b in range(B):
        p = [logits[b, t - 1].softmax(0) for t in range(T) if keep[b, t]]
        terms = [x[tokens[b, t]].log() - x.square().sum().log() for x, t in zip(p, keep[b].nonzero(), strict=True)]
        assert found[b].item() == pytest.approx(torch.stack(terms).mean().exp().item(), rel=1e-13)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_token_off_by_one_is_seen(shift: int) -> None:
    logits, tokens, keep = batch()
    wrong = losses.token_logprobs(logits, tokens.roll(shift, dims=1), keep)
    assert abs(losses.kept_mean(wrong, keep) + losses.next_token_loss(logits, tokens, keep)) > 0.01


X = torch.tensor([-1.0, -2.0])
L3 = torch.zeros(1, 3, 4)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "kl kind": (lambda: losses.estimated_kl(X, X, "k4"), "KL estimator 'k4' is unknown"),
    "kl shapes": (lambda: losses.estimated_kl(X, X[:1]), "reference"),
    "full kl shapes": (lambda: losses.full_kl(L3, L3[..., :3]), "reference"),
    "temperature": (lambda: losses.token_entropy(L3, temperature=0), "temperature is 0"),
    "vocabulary": (lambda: losses.token_logprobs(L3, torch.tensor([[0, 1, 4]])), "token 4 is outside"),
    "tokens": (lambda: losses.token_logprobs(L3, torch.tensor([0, 1, 2])), "must be"),
    "keep": (lambda: losses.token_logprobs(L3, torch.tensor([[0, 1, 2]]), torch.ones(1, 3)), "keep is torch.float32"),
    "keep of sums": (lambda: losses.sequence_sums(L3[0], L3[0]), "keep is torch.float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_says_what_and_where(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(InputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
