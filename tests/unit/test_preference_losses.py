"""The losses of preference learning: worked values, gradients, limits, planted faults."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minillm import losses
from minillm.errors import InputError, NumericsError
from minillm.losses import DpoLoss
from minillm.losses.divergences import DIVERGENCES, divergence_score
from minillm.losses.pair_losses import DIVERGENT, PAIR_LOSSES, SMOOTHED

LN2 = math.log(2)
LENGTHS = (torch.tensor([4, 2, 5]), torch.tensor([3, 7, 1]))


def numbers(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def of(name: str) -> DpoLoss:
    return DpoLoss(name, label_smoothing=0.1 if name in ("exo_pair", "robust") else 0.0)


def quad(seed: int = 0) -> list[Tensor]:
    """Log-probabilities of 3 pairs under policy and reference."""
    return [x - 20 for x in numbers(4, 3, seed=seed)]


# --- reward ----------------------------------------------------------------------------------------------------------


def test_bradley_terry_at_worked_values() -> None:
    chosen, rejected = torch.tensor([1.0, 3.0]).double(), torch.tensor([0.0, 4.0]).double()
    first, second = math.log1p(math.exp(-1.0)), math.log1p(math.exp(1.0))
    assert losses.bradley_terry(chosen, rejected).item() == pytest.approx((first + second) / 2, rel=1e-15)
    margin = torch.tensor([1.0, 0.0]).double()
    assert losses.bradley_terry(chosen, rejected, margin=margin).item() == pytest.approx((LN2 + second) / 2, rel=1e-15)
    centred = losses.bradley_terry(chosen, rejected, centring=0.01).item()
    assert centred == pytest.approx((first + second) / 2 + 0.01 * (1**2 + 7**2) / 2, rel=1e-15)
    assert losses.preference_accuracy(chosen, rejected).item() == 0.5


def test_rewards_shifted_alike_have_the_same_loss_unless_centred() -> None:
    chosen, rejected = numbers(2, 5).unbind()
    plain = [losses.bradley_terry(chosen + s, rejected + s).item() for s in (0, 3)]
    centred = [losses.bradley_terry(chosen + s, rejected + s, centring=0.01).item() for s in (0, 3)]
    assert plain[0] == pytest.approx(plain[1], rel=1e-14) and abs(centred[0] - centred[1]) > 1e-3


# --- DPO -------------------------------------------------------------------------------------------------------------

#: h_c = 2, h_r = -1, beta 1/2, lengths 4 and 2: beta delta = 3/2, delta per token 1/2 + 1/2 = 1.
_S = 1 / (1 + math.exp(-1.5))
_S1, _SH = 1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(0.5))  # S(beta h_c), S(beta h_r)
WORKED = {
    "sigmoid": -math.log(_S),
    "sigmoid_norm": math.log1p(math.exp(-0.5)),
    "hinge": 0.0,
    "ipo": 0.0,
    "exo_pair": _S * math.log(_S / 0.9) + (1 - _S) * math.log((1 - _S) / 0.1),
    "nca_pair": -math.log(_S1) - 0.5 * math.log(1 - _S1) - 0.5 * math.log(1 - _SH),
    "robust": (-0.9 * math.log(_S) + 0.1 * math.log(1 - _S)) / 0.8,
    "bco_pair": -math.log(_S1) - math.log(1 - _SH),
    "sppo_hard": (2 - 1) ** 2 + (-1 + 1) ** 2,
    "aot": -math.log(_S),
    "aot_unpaired": -math.log(_S),
    "apo_zero": 1 - _S1 + _SH,
    "apo_down": _S1 + 1 - _S,
    "discopop": -math.log(_S) / (1 + math.exp(30)) + math.exp(-1.5) / (1 + math.exp(-30)),
    "sft": 10 / 4,
}


def test_every_loss_has_a_worked_value() -> None:
    assert set(WORKED) == set(PAIR_LOSSES) == set(DpoLoss.names())


@pytest.mark.parametrize("name", WORKED)
def test_dpo_losses_at_worked_values(name: str) -> None:
    pair = [torch.tensor([x]).double() for x in (-10.0, -9.0, -12.0, -8.0)]
    found = losses.dpo(*pair, beta=0.5, loss=of(name), lengths=(torch.tensor([4]), torch.tensor([2])))
    assert found.item() == pytest.approx(WORKED[name], rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dpo_gradcheck(name: str, divergence: str) -> None:
    if divergence != "reverse_kl" and name not in DIVERGENT:
        with pytest.raises(InputError, match="no other divergence"):
            DpoLoss(name, 0.1 if name in SMOOTHED else 0.0, divergence)
        return
    how = DpoLoss(name, 0.1 if name in SMOOTHED else 0.0, divergence, tau=0.5)
    chosen, rejected, *reference = quad()

    def loss(*policy: Tensor) -> Tensor:
        return losses.dpo_losses(*policy, *reference, beta=0.3, loss=how, lengths=LENGTHS)

    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_policy_equal_to_its_reference_has_loss_ln_2_and_no_rewards(
    divergence: str, beta: float, smoothing: float
) -> None:
    chosen, rejected, *_ = quad()
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-7)):
        pair = (chosen.to(dtype), rejected.to(dtype)) * 2
        loss = losses.dpo(*pair, beta=beta, loss=DpoLoss("sigmoid", smoothing, divergence))
        assert abs(loss.item() - LN2) <= bound
    rewards = losses.implicit_rewards(*pair, beta=beta)
    assert not rewards.chosen.any() and not rewards.margins.any() and rewards.accuracy == 0


def test_the_first_gradient_is_half_of_beta_up_and_down() -> None:
    chosen, rejected, *_ = quad()
    chosen.requires_grad_(), rejected.requires_grad_()
    loss = losses.dpo_losses(chosen, rejected, chosen, rejected, beta=0.1).sum()
    up, down = torch.autograd.grad(loss, (chosen, rejected))
    torch.testing.assert_close(up, torch.full_like(up, -0.05), rtol=1e-14, atol=0)
    torch.testing.assert_close(down, torch.full_like(up, 0.05), rtol=1e-14, atol=0)


def test_beta_towards_zero_is_ln_2_with_a_gradient_in_proportion() -> None:
    pair = quad()
    pair[0].requires_grad_()
    loss = losses.dpo(*pair, beta=1e-9)
    assert abs(loss.item() - LN2) < 1e-8
    gradient = torch.autograd.grad(loss, pair[0])[0]
    torch.testing.assert_close(gradient, torch.full_like(gradient, -1e-9 / 2 / 3), rtol=1e-6, atol=0)


def test_swapping_the_answers_swaps_the_labels() -> None:
    chosen, rejected, fixed_chosen, fixed_rejected = quad()
    swapped = (rejected, chosen, fixed_rejected, fixed_chosen)
    plain = losses.dpo_losses(chosen, rejected, fixed_chosen, fixed_rejected)
    mirrored = losses.dpo_losses(*swapped)
    # -log S(x) and -log S(-x) differ by x
    rewards = losses.implicit_rewards(chosen, rejected, fixed_chosen, fixed_rejected)
    torch.testing.assert_close(mirrored - plain, rewards.margins, rtol=1e-13, atol=1e-15)
    for e in (0.1, 0.4):
        smoothed = losses.dpo_losses(chosen, rejected, fixed_chosen, fixed_rejected, loss=DpoLoss(label_smoothing=e))
        torch.testing.assert_close(smoothed, (1 - e) * plain + e * mirrored)
        # robust DPO, averaged over the flips, is DPO with the true labels
        kind = DpoLoss("robust", label_smoothing=e)
        kept, flipped = (
            losses.dpo_losses(*x, loss=kind) for x in ((chosen, rejected, fixed_chosen, fixed_rejected), swapped)
        )
        torch.testing.assert_close((1 - e) * kept + e * flipped, plain)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_the_order_of_pairs_and_a_shift_of_both_models_change_nothing(name: str) -> None:
    pair, order = quad(), torch.tensor([2, 0, 1])
    plain = losses.dpo(*pair, loss=of(name), lengths=LENGTHS)
    shuffled = losses.dpo(*(x[order] for x in pair), loss=of(name), lengths=(LENGTHS[0][order], LENGTHS[1][order]))
    torch.testing.assert_close(shuffled, plain, rtol=1e-14, atol=0)
    if name != "sft":
        shift = numbers(3, seed=9)
        moved = losses.dpo(*(x + shift for x in pair), loss=of(name), lengths=LENGTHS)
        torch.testing.assert_close(moved, plain, rtol=1e-12, atol=1e-13)


def test_relations_between_losses() -> None:
    pair, ones = quad(), (torch.ones(3), torch.ones(3))
    plain = losses.dpo(*pair)
    for name in ("sigmoid_norm", "robust"):  # length 1, no smoothing
        assert torch.equal(losses.dpo(*pair, loss=name, lengths=ones), plain)
    one = [x[:1] for x in pair]  # nothing to sort
    for name in ("aot", "aot_unpaired"):
        torch.testing.assert_close(losses.dpo(*one, loss=name), losses.dpo(*one), rtol=1e-13, atol=0)
    even = [x.float() for x in quad()]
    assert losses.dpo(*even).dtype == losses.dpo(*(x.bfloat16() for x in even)).dtype == torch.float32


def test_divergences_start_at_zero_and_alpha_joins_them() -> None:
    h = numbers(50).requires_grad_()
    for name in DIVERGENCES:
        zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        score = divergence_score(zero, name)
        slope = torch.autograd.grad(score, zero)[0].item()
        assert score.item() == 0 and slope == (0.5 if name == "js_divergence" else 1.0)
    torch.testing.assert_close(divergence_score(h, "alpha_divergence", 0.0), divergence_score(h, "forward_kl"))
    torch.testing.assert_close(divergence_score(h, "alpha_divergence", 1 + 1e-9), h, rtol=1e-7, atol=0)
    assert torch.equal(divergence_score(h, "alpha_divergence", 1.0), h)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("far", [-2000.0, 2000.0])
def test_far_from_the_reference_losses_and_gradients_stay_finite(name: str, far: float) -> None:
    """discopop's exp(-x) leaves fp32 at x = -89, and a naive product is 0 · inf = NaN; ours stays 0 · exp(-x)."""
    policy = torch.tensor([-3000.0 + far], requires_grad=True)
    fixed = torch.tensor([-3000.0])
    loss = losses.dpo(policy, fixed, fixed, fixed, loss=of(name), lengths=(torch.tensor([9]), torch.tensor([9])))
    assert bool(loss.isfinite()) and bool(torch.autograd.grad(loss, policy)[0].isfinite().all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_from_the_reference_divergences_stay_finite(divergence: str) -> None:
    policy = torch.tensor([-1000.0, 1000.0]).requires_grad_()
    fixed = torch.zeros(2)
    loss = losses.dpo(policy, policy, fixed, fixed, loss=DpoLoss(divergence=divergence, alpha=-0.5))
    assert abs(loss.item() - LN2) < 1e-6 and bool(torch.autograd.grad(loss, policy)[0].isfinite().all())


def test_the_reference_gets_no_gradient() -> None:
    pair = [x.requires_grad_() for x in quad()]
    found = torch.autograd.grad(losses.dpo(*pair), pair, allow_unused=True)
    assert found[2] is None and found[3] is None


# --- length terms and weights ----------------------------------------------------------------------------------------


def test_desensitised_sums_weigh_what_the_other_answer_does_not_have() -> None:
    logprobs, keep = -torch.arange(12.0).view(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]]).bool()
    shared = torch.tensor([2, 2])
    assert losses.desensitised_sums(logprobs, keep, shared, 0.5).tolist() == [-5 - 0.5 * 9, -15]
    assert losses.desensitised_sums(logprobs, keep, shared, 0.0).tolist() == [-5, -15]
    assert torch.equal(losses.desensitised_sums(logprobs, keep, shared, 1.0), losses.sequence_sums(logprobs, keep))


# --- KTO, ORPO -------------------------------------------------------------------------------------------------------


def test_kto_at_worked_values() -> None:
    policy, reference = torch.tensor([-1.0, -4.0]).double(), torch.tensor([-3.0, -2.0]).double()
    desirable, z0 = torch.tensor([True, False]), 0.5
    wanted, unwanted = 1 - 1 / (1 + math.exp(-0.75)), 1 - 1 / (1 + math.exp(-1.25))
    found = losses.kto(policy, reference, desirable, z0, beta=0.5, weights=(1.0, 2.0))
    assert found.item() == pytest.approx((wanted + 2 * unwanted) / 2, rel=1e-14)
    plain = losses.kto(policy, reference, desirable, z0, beta=0.5, loss="apo_zero_unpaired")
    assert plain.item() == pytest.approx(1 - 1 / (1 + math.exp(-1.0)), rel=1e-14)
    assert losses.kto_reference_point(policy, policy + 1) == 0
    assert losses.kto_reference_point(policy, policy - 1) == 1


def test_kto_gradcheck_and_no_gradient_through_the_reference_point() -> None:
    policy, reference, *_ = quad()
    desirable = torch.tensor([True, False, True])
    z0 = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: losses.kto(x, reference, desirable, z0), policy.requires_grad_())
    assert torch.autograd.grad(losses.kto(policy, reference, desirable, z0), z0, allow_unused=True)[0] is None


def test_orpo_at_worked_values() -> None:
    chosen, rejected = torch.tensor([[0.5], [0.2]], dtype=torch.float64).log()
    found = losses.orpo(chosen, rejected, torch.tensor(0.7, dtype=torch.float64), beta=0.1)  # odds 1 and 1/4: ratio 4
    assert found.item() == pytest.approx(0.7 - 0.1 * math.log(4 / 5), rel=1e-14)
    assert losses.orpo(chosen, rejected, torch.tensor(0.7), beta=0).item() == pytest.approx(0.7)


def test_log_odds_gradcheck_and_limits() -> None:
    probabilities = torch.tensor([1e-12, 0.3, 0.4999, 0.5001, 0.9, 0.999]).double()
    logs = probabilities.log().requires_grad_()
    torch.testing.assert_close(losses.log_odds(logs), torch.logit(probabilities), rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(losses.log_odds, logs, eps=1e-7)
    certain = torch.tensor([0.0, -1e-9, -1e4], requires_grad=True)
    odds = losses.log_odds(certain)
    assert bool(odds.isfinite().all()) and bool(torch.autograd.grad(odds.sum(), certain)[0].isfinite().all())


# --- bad input -------------------------------------------------------------------------------------------------------

X, NAN = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, math.nan])
K = torch.tensor([True, False])
L3 = torch.zeros(1, 3, 4)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "beta 0": (lambda: losses.dpo(X, X, X, X, beta=0), "beta is 0; it must be a finite number above 0"),
    "beta negative": (lambda: losses.dpo(X, X, X, X, beta=-0.1), "beta is -0.1"),
    "beta nan": (lambda: losses.dpo(X, X, X, X, beta=math.nan), "beta is nan"),
    "rewards beta": (lambda: losses.implicit_rewards(X, X, X, X, beta=0), "beta is 0"),
    "unknown loss": (lambda: losses.dpo(X, X, X, X, loss="sigmod"), r"loss 'sigmod' is unknown \(nearest: sigmoid"),
    "unknown divergence": (lambda: DpoLoss(divergence="kl"), "divergence 'kl' is unknown"),
    "smoothing 0.5": (lambda: DpoLoss(label_smoothing=0.5), r"must be in \[0, 0.5\)"),
    "smoothing negative": (lambda: DpoLoss("robust", label_smoothing=-0.1), r"must be in \[0, 0.5\)"),
    "smoothing nan": (lambda: DpoLoss(label_smoothing=math.nan), r"must be in \[0, 0.5\)"),
    "smoothing ignored": (lambda: DpoLoss("ipo", label_smoothing=0.1), "ipo has no label smoothing"),
    "exo": (lambda: losses.dpo(X, X, X, X, loss="exo_pair"), "the paper has 1e-3"),
    "tau": (lambda: DpoLoss("discopop", tau=0), "tau is 0"),
    "alpha": (lambda: DpoLoss(divergence="alpha_divergence", alpha=math.inf), "alpha is inf"),
    "shapes": (lambda: losses.dpo(X, X, X[:1], X), r"reference_chosen \(1,\)"),
    "token sums left out": (lambda: losses.dpo(X[None], X, X, X), r"policy_chosen has shape \(1, 2\)"),
    "no pairs": (lambda: losses.dpo(*[X[:0]] * 4), r"policy_chosen has shape \(0,\)"),
    "integers": (lambda: losses.dpo(X, X.long(), X, X), "policy_rejected is torch.int64"),
    "lengths missing": (lambda: losses.dpo(X, X, X, X, loss="ipo"), "ipo is a loss per token"),
    "lengths 0": (lambda: losses.dpo(X, X, X, X, loss="sft", lengths=(X * 0, X * 0)), "at least 1; none is empty"),
    "margin": (lambda: losses.bradley_terry(X, X, margin=X[:1]), r"margin \(1,\)"),
    "centring": (lambda: losses.bradley_terry(X, X, centring=-1), "centring is -1; it must be a finite number of at"),
    "kto labels": (lambda: losses.kto(X, X, X), "desirable is torch.float32"),
    "kto loss": (lambda: losses.kto(X, X, K, loss="bco"), "KTO's are kto and apo_zero_unpaired"),
    "kto weights": (lambda: losses.kto(X, X, K, weights=(1.0, -1.0)), r"weights\[1\] is -1.0"),
    "orpo positive": (lambda: losses.orpo(-X, X, X[0]), "above 0; give the mean"),
    "ld alpha": (lambda: losses.desensitised_sums(L3[0], L3[0] == 0, torch.ones(3), 1.5), "alpha is 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_says_what_and_where(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(InputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda: losses.dpo(X, X, X, NAN), "reference_rejected of example 1 is nan"),
        (lambda: losses.dpo(X, X / 0, X, X), "policy_rejected of example 0 is -inf"),
        (lambda: losses.bradley_terry(NAN, X), "chosen of example 1 is nan"),
        (lambda: losses.kto(NAN, X, K), "policy of example 1 is nan"),
        (lambda: losses.orpo(X, NAN, X[0]), "logprob of example 1 is nan"),
    ],
)
def test_what_is_not_finite_is_named(call: Callable[[], object], where: str) -> None:
    with pytest.raises(NumericsError, match=where):
        call()


# --- planted faults: each of these must fail the checks above --------------------------------------------------


@pytest.mark.parametrize("fault", ["one percent", "swapped reference", "beta squared"])
def test_worked_values_see_planted_faults(fault: str) -> None:
    chosen, rejected, fixed_chosen, fixed_rejected = (torch.tensor([x]).double() for x in (-10.0, -9.0, -12.0, -8.0))
    beta = 0.5
    if fault == "one percent":
        chosen = chosen * 1.01
    elif fault == "swapped reference":
        fixed_chosen, fixed_rejected = fixed_rejected, fixed_chosen
    elif fault == "beta squared":
        beta = 0.25
    found = losses.dpo(chosen, rejected, fixed_chosen, fixed_rejected, beta=beta).item()
    assert found != pytest.approx(WORKED["sigmoid"], rel=1e-3)
