"""The next-token loss against its formula in float64, torch's own, and itself in pieces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.losses import count_targets, next_token_loss
from tests.error import assert_rule_of_two

B, T, V = 3, 7, 31


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(B, T, V, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(V, (B, T), generator=generator)


def formula(logits: Tensor, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
    """Written as in the docstring, position by position, in float64."""
    surprise = [
        -logits[b, t].double().log_softmax(dim=-1)[tokens[b, t + 1]]
        for b in range(B)
        for t in range(T - 1)
        if keep is None or keep[b, t + 1]
    ]
    return torch.stack(surprise).mean()


def test_equals_the_formula_in_float64() -> None:
    logits, tokens = batch(torch.float64)
    assert abs(next_token_loss(logits, tokens) - formula(logits, tokens)) < 1e-14  # some 100 roundings of 1e-16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_as_exact_as_torchs(dtype: torch.dtype) -> None:
    logits, tokens = batch(dtype)
    plain, exact = (logits.detach().to(wide).requires_grad_() for wide in (torch.float32, torch.float64))
    ours = next_token_loss(logits, tokens)
    theirs = F.cross_entropy(plain[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    reference = formula(exact, tokens)
    assert ours.dtype == torch.float32
    assert_rule_of_two(ours.detach(), theirs.detach(), reference.detach(), "loss")
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in ((ours, logits), (theirs, plain), (reference, exact))]
    assert_rule_of_two(gradients[0], gradients[1].to(dtype), gradients[2], "gradient")


def test_the_last_position_and_what_is_left_out_get_no_gradient() -> None:
    logits, tokens = batch()
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[0, :4] = False
    gradient = torch.autograd.grad(next_token_loss(logits, tokens, keep), logits)[0]
    assert bool((gradient[:, -1] == 0).all()) and bool((gradient[0, :3] == 0).all())
    assert bool((gradient[0, 3:-1] != 0).any(dim=-1).all()), "token 4 of row 0 is kept: the logits at 3 learn from it"


def test_keep_counts_the_tokens_predicted_not_those_predicting() -> None:
    logits, tokens = batch(torch.float64)
    keep = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.5
    assert abs(next_token_loss(logits, tokens, keep) - formula(logits, tokens, keep)) < 1e-14
    assert count_targets(tokens, keep) == keep[:, 1:].sum()


def test_pieces_of_unequal_length_add_up_to_the_whole() -> None:
    logits, tokens = batch()
    lengths = [7, 2, 4]
    keep = torch.arange(T) < torch.tensor(lengths)[:, None]
    whole = next_token_loss(logits, tokens, keep)
    total = count_targets(tokens, keep)
    rows = [slice(row, row + 1) for row in range(B)]
    parts = [
        next_token_loss(logits[row, :n], tokens[row, :n], total=total) for row, n in zip(rows, lengths, strict=True)
    ]
    # the same numbers, added in another order
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)
    split, joint = torch.autograd.grad(sum(parts), logits)[0], torch.autograd.grad(whole, logits)[0]
    torch.testing.assert_close(split, joint, rtol=1e-6, atol=1e-8)


def test_nothing_to_predict_is_no_loss() -> None:
    logits, tokens = batch()
    loss = next_token_loss(logits, tokens, torch.zeros(B, T, dtype=torch.bool))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0 and logits.grad is not None and bool((logits.grad == 0).all())
