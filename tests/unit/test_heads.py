"""What sits on the last hidden state: a scalar a token, read at the last real one (T14), and the tied embedding."""

from __future__ import annotations

import pytest
import torch

from minillm.errors import InputError
from minillm.model.heads import at_last_token
from tests import tiny
from tests.decoders import decoder
from tests.error import assert_near

EOS = PAD = 5


def test_one_number_a_token() -> None:
    model = decoder(head="scalar")
    tokens = tiny.tokens(2, 7)
    with torch.inference_mode():
        values = model(tokens)
        assert values.shape == (2, 7)
        assert torch.equal(values, model.hidden(tokens) @ model.lm_head.score.weight[0])
    assert model.lm_head.score.weight.shape == (1, 32)


@pytest.mark.parametrize("tied", [True, False])
def test_a_scalar_head_is_never_tied(tied: bool) -> None:
    names = dict(decoder(head="scalar", tied_embeddings=tied).named_parameters())
    assert [name for name in names if "lm_head" in name] == ["lm_head.score.weight"]


def test_the_last_token_comes_from_the_mask() -> None:
    """Padding shares its id with end-of-text, which also stands inside a prompt: ids alone would mislead."""
    tokens = torch.tensor(
        [
            [7, EOS, 8, EOS, PAD, PAD],  # right padding; the end is real
            [PAD, PAD, 7, EOS, 8, EOS],  # left padding
            [7, EOS, 8, 9, 6, 4],  # none
            [7, PAD, PAD, PAD, PAD, PAD],  # one token
            [PAD, PAD, EOS, PAD, PAD, PAD],  # both sides, and the token is an end
        ]
    )
    lengths, starts = torch.tensor([4, 4, 6, 1, 1]), torch.tensor([0, 2, 0, 0, 2])
    place = torch.arange(6)
    keep = (place >= starts[:, None]) & (place < (starts + lengths)[:, None])
    values = place.float().expand(tokens.shape)
    assert at_last_token(values, keep).tolist() == [3, 5, 5, 0, 2]


def test_a_row_without_a_token() -> None:
    with pytest.raises(InputError, match="a row has no real token to read a value at; remove empty rows"):
        at_last_token(torch.zeros(2, 3), torch.tensor([[True] * 3, [False] * 3]))


def test_gradient_reaches_the_last_real_token_alone() -> None:
    values = torch.zeros(2, 3, requires_grad=True)
    at_last_token(values, torch.tensor([[True, True, False], [False, True, True]])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("pads", [1, 4])
def test_a_reward_does_not_depend_on_the_side_of_the_padding(pads: int) -> None:
    model, text = decoder(head="scalar"), tiny.tokens(1, 9)
    padding, real = torch.full((1, pads), PAD), torch.ones(1, 9, dtype=torch.bool)
    none = torch.zeros(1, pads, dtype=torch.bool)
    with torch.inference_mode():
        alone = at_last_token(model(text), real)
        for order in (slice(None), slice(None, None, -1)):
            tokens, keep = (torch.cat([x, y][order], dim=1) for x, y in ((text, padding), (real, none)))
            assert_near(at_last_token(model(tokens, keep=keep), keep), alone)


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = decoder(tied_embeddings=True), decoder()
    assert sum(p.shape == (131, 32) for p in tied.parameters()) == 1
    assert sum(p.shape == (131, 32) for p in untied.parameters()) == 2
    assert tied.lm_head is None
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.embed.weight})
    tokens = tiny.tokens(2, 7)
    for model in (tied, untied):
        model(tokens)[:, -1].logsumexp(-1).sum().backward()
    # from both of its uses: as the rows that were read, and as the head
    both = untied.embed.weight.grad + untied.lm_head.weight.grad
    assert untied.embed.weight.grad.abs().max() > 0 and untied.lm_head.weight.grad.abs().max() > 0
    assert_near(tied.embed.weight.grad, both)
