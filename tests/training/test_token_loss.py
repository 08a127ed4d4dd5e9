"""Model and loss in one: by chunks where the head is a plain matrix, else whole, and the same number either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minillm import lora
from minillm.data.batches import Batch, collate
from minillm.data.examples import Example
from minillm.errors import NumericsError
from minillm.losses import next_token_loss
from minillm.model import Decoder
from minillm.quant.convert import Quantisation, quantize_linears
from minillm.training import token_loss
from minillm.training.loop import accumulate, clip_gradients, loss_scale, naming
from minillm.training.token_loss import TokenLoss, whole_rows
from tests.decoders import SHAPES, decoder
from tests.error import assert_near


def batch() -> Batch:
    """Two rows of unequal length whose first two tokens are not taught."""
    rows = [Example(torch.arange(3, 3 + n, dtype=torch.int32), torch.arange(n) > 1, f"line {n}") for n in (5, 9)]
    return collate([[row] for row in rows], pad_id=7)


def plainly(model: Decoder, rows: Batch) -> Tensor:
    """The definition, with the padding told."""
    return next_token_loss(model(rows.tokens, keep=rows.keep), rows.tokens, rows.taught)


def gradient(model: Decoder) -> Tensor:
    """All gradients as one vector, which are then gone: some are zero but for rounding, as of a key's bias."""
    found = torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])
    for x in model.parameters():
        x.grad = None
    return found


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each loss that is taken in chunks."""
    calls: list[int] = []
    original = token_loss.chunked_next_token_loss

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr(token_loss, "chunked_next_token_loss", counted)
    return calls


@pytest.mark.parametrize("kind", SHAPES)
def test_loss_and_gradients_are_those_of_whole_logits(kind: str, chunked: list[int]) -> None:
    model = decoder(**SHAPES[kind]).double()
    plainly(model, batch()).backward()
    wanted = gradient(model)
    loss = accumulate(model, [batch()])
    assert chunked
    assert loss == pytest.approx(plainly(model, batch()).item(), rel=1e-12)
    assert_near(gradient(model), wanted, 1e-12)


def adapted_head(model: Decoder) -> None:
    lora.add(model, targets=["lm_head"], rank=2, init="linear")


def watched_head(model: Decoder) -> None:
    assert isinstance(model.lm_head, nn.Module)
    model.lm_head.register_forward_hook(lambda *_: None)


def watched_on_the_way_back(model: Decoder) -> None:
    assert isinstance(model.lm_head, nn.Module)
    model.lm_head.register_full_backward_hook(lambda *_: None)


def watched_model(model: Decoder) -> None:
    model.register_forward_hook(lambda *_: None)


def quantised_head(model: Decoder) -> None:
    quantize_linears(model, Quantisation("int8", skip=()))


def retrained_head(model: Decoder) -> None:
    lora.add(model, targets=["q_proj"], rank=2, retrain=("lm_head",))


@pytest.mark.parametrize(
    "change", [adapted_head, watched_head, watched_on_the_way_back, watched_model, quantised_head, retrained_head]
)
def test_a_head_that_is_no_plain_matrix_gives_whole_logits(
    change: Callable[[Decoder], None], chunked: list[int]
) -> None:
    model = decoder()
    change(model)
    rows = batch()
    wanted = next_token_loss(model(rows.tokens), rows.tokens, rows.taught)  # int8: padding may make outlier columns
    assert accumulate(model.train(), [rows]) == pytest.approx(wanted.item(), rel=1e-5)
    assert not chunked


def test_any_module_that_gives_logits_will_do() -> None:
    model = nn.Sequential(nn.Embedding(131, 8), nn.Linear(8, 131))
    rows = whole_rows(batch().tokens)
    assert accumulate(model, [rows.tokens]) == pytest.approx(next_token_loss(model(rows.tokens), rows.tokens).item())


def test_a_wrapped_loss_is_taken_as_it_is() -> None:
    model, seen = decoder(), []
    measured = TokenLoss(model)
    measured.register_forward_hook(lambda *_: seen.append(1))
    assert accumulate(measured, [batch()]) == accumulate(model, [batch()])
    assert len(seen) == 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_sixteen_bits_train_nearly_as_thirty_two(precision: Any) -> None:
    """Within some ten roundings of 2^-9 (bf16) or 2^-12: two blocks and the head, forward and backward."""
    model, scale = decoder(), torch.amp.GradScaler("cpu", init_scale=2**10, enabled=precision == "float16")
    accumulate(model, [batch()])
    wanted = gradient(model)
    accumulate(model, [batch()], precision=precision, scale=scale)
    scale.unscale_(torch.optim.SGD(model.parameters(), lr=0.0))
    assert_near(gradient(model), wanted, 10 * 2 ** (-9 if precision == "bfloat16" else -12))


def test_a_gradient_that_overflows_leaves_out_the_step_and_halves_the_scale() -> None:
    model, scale = decoder(), loss_scale("cpu", "float16")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    accumulate(model, [batch()], precision="float16", scale=scale)
    model.norm.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
    scale.unscale_(optimizer)
    assert clip_gradients(list(model.parameters()), 1.0, may_overflow=True) == float("inf")
    scale.step(optimizer)
    scale.update()
    assert scale.get_scale() == 2**15
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())


def test_what_is_not_finite_stops_with_the_examples_named() -> None:
    model = decoder()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with (
        pytest.raises(NumericsError, match=r"^step 3: the loss is nan; .*; its examples: a line 1, a line 2$"),
        naming(3, ["a line 1", "a line 2"]),
    ):
        accumulate(model, [batch()])
    for x in model.parameters():
        x.grad = torch.full_like(x, float("inf"))
    with (
        pytest.raises(
            NumericsError, match=r"step 0: the gradient's norm is (inf|nan) .* 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
        ),
        naming(0, map(str, range(10))),
    ):
        clip_gradients(list(model.parameters()), 1.0)
