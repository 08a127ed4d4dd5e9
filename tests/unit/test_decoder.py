"""The whole decoder: the future is unseen, padding is unheard on either side, and it is a module like any other."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.errors import InputError
from minillm.generation.generate import left_pad
from minillm.model import Decoder
from tests import tiny
from tests.decoders import SHAPES, config, decoder
from tests.error import assert_near, distance

EVERY = pytest.mark.parametrize("shape", SHAPES)


# -- causality ---------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_a_token_changes_nothing_before_it(shape: str, padded: bool) -> None:
    model, tokens = decoder(**SHAPES[shape]), tiny.tokens(2, 20)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0, :3] = not padded
    before = model(tokens, keep=keep if padded else None)
    for t in (3, 11, 19):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 131
        after = model(changed, keep=keep if padded else None)
        assert torch.equal(after[:, :t], before[:, :t])
        assert all(distance(after[r, i], before[r, i]) > 1e-4 for r in range(2) for i in range(t, 20))


@EVERY
def test_no_gradient_comes_from_the_future(shape: str) -> None:
    """Every id but one's own: the tied embedding also hears of the others, as the head."""
    model = decoder(**{**SHAPES[shape], "tied_embeddings": False})
    tokens = torch.arange(20)[None]
    model(tokens)[0, 7].square().sum().backward()
    reached = model.embed.weight.grad.abs().sum(dim=1)
    assert (reached[:8] > 0).all() and (reached[8:] == 0).all()


# -- padding (T6) ------------------------------------------------------------------------------------------------------


def staircase() -> tuple[list[list[int]], Tensor, Tensor]:
    """Rows with 0, 1, ... 33 pads on the left, all 40 slots long."""
    rows = [tiny.tokens(1, 40 - pads, seed=pads)[0].tolist() for pads in range(34)]
    return rows, *left_pad(rows)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_number_of_pads_gives_finite_numbers(shape: str, dtype: torch.dtype) -> None:
    """Pad rows included, and every gradient, also where the loss reads the pad rows."""
    model = decoder(**SHAPES[shape]).to(dtype)
    _, tokens, keep = staircase()
    logits = model(tokens, keep=keep)
    assert logits.isfinite().all()
    (logits.float().logsumexp(-1).mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@EVERY
@torch.inference_mode()
def test_what_stands_in_the_padding_is_unheard(shape: str) -> None:
    model = decoder(**SHAPES[shape])
    rows, tokens, keep = staircase()
    found = model(tokens, keep=keep)
    other = torch.where(keep, tokens, tiny.tokens(34, 40, seed=99))
    assert torch.equal(model(other, keep=keep)[keep], found[keep])
    for r in (1, 8, 33):
        assert_near(found[r, keep[r]], model(torch.tensor([rows[r]]))[0], what=f"{r} pads")


@EVERY
def test_padding_adds_nothing_to_gradients(shape: str) -> None:
    """A loss over real tokens: the padded batch's gradients are the sum of the single rows'.

    In float64, where only the order of sums differs; measured against the largest gradient of all, because that of the
    key bias is zero in exact arithmetic (softmax does not see it).
    """
    model = decoder(**SHAPES[shape]).double()
    rows, tokens, keep = staircase()
    chosen = [0, 3, 17, 33]
    model(tokens[chosen], keep=keep[chosen])[keep[chosen]].logsumexp(-1).sum().backward()
    padded = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for r in chosen:
        model(torch.tensor([rows[r]]))[0].logsumexp(-1).sum().backward()
    assert_near(
        *(torch.cat([x.flatten() for x in grads]) for grads in (padded, [p.grad for p in model.parameters()])), 1e-13
    )


@EVERY
@torch.inference_mode()
def test_right_padded_rows_equal_single_rows(shape: str) -> None:
    model = decoder(**SHAPES[shape])
    tokens = tiny.tokens(3, 30)
    lengths = torch.tensor([1, 13, 30])
    found = model(tokens, keep=torch.arange(30) < lengths[:, None])
    for r, length in enumerate(lengths.tolist()):
        assert_near(found[r, :length], model(tokens[r : r + 1, :length])[0], what=f"row {r}")


@pytest.mark.parametrize(
    ("keep", "named"),
    [
        (torch.ones(2, 4, dtype=torch.bool), r"torch.bool \(2, 4\)"),
        (torch.ones(1, 5, dtype=torch.bool), r"torch.bool \(1, 5\)"),
        (torch.ones(2, 5, dtype=torch.long), r"torch.int64 \(2, 5\)"),  # an attention_mask of transformers
    ],
)
def test_a_mask_that_does_not_fit(keep: Tensor, named: str) -> None:
    with pytest.raises(InputError, match=rf"keep is {named}; it must be bool and of the tokens' shape \(2, 5\)"):
        decoder()(tiny.tokens(2, 5), keep=keep)


# -- a module like any other -------------------------------------------------------------------------------------------


@EVERY
@torch.inference_mode()
def test_copies_and_saved_states_compute_the_same(shape: str) -> None:
    model, tokens = decoder(**SHAPES[shape]), tiny.tokens(2, 9)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = Decoder(config(**SHAPES[shape]))
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), torch.load(saved, weights_only=False), loaded):
        assert other.config == model.config
        assert torch.equal(other(tokens), model(tokens))


@EVERY
def test_every_parameter_learns(shape: str) -> None:
    """DistributedDataParallel waits for the gradient of each; one left out would hang it."""
    model = decoder(**SHAPES[shape])
    model(tiny.tokens(2, 9)).logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not list(model.buffers())


@EVERY
@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_one_graph_for_torch_compile(shape: str, padded: bool) -> None:
    torch.compiler.reset()
    model, tokens = decoder(**SHAPES[shape]), tiny.tokens(2, 9)
    keep = torch.tensor([[False] * 2 + [True] * 7, [True] * 9]) if padded else None
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens, keep=keep), model(tokens, keep=keep))


@EVERY
@pytest.mark.parametrize("cached", [False, True])
@torch.inference_mode()
def test_autocast(shape: str, cached: bool) -> None:
    model, tokens = decoder(**SHAPES[shape]), tiny.tokens(2, 9)
    expected = model(tokens)
    cache = model.new_cache(2, 9) if cached else None
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([model(tokens[:, :8], cache=cache), model(tokens[:, 8:], cache=cache)], 1) if cached else None
        found = model(tokens) if found is None else found
    # bf16 keeps 2^-9 a rounding; two layers of some ten roundings each
    assert 1e-4 < distance(found, expected) < 20 * 2**-9
