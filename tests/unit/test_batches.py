"""Rows of tokens: what is padding, whose each token is, and which rows make up the batch of a step."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from minillm.data.batches import Batch, Batches, bucketed, collate
from minillm.data.examples import Example
from minillm.errors import InputError
from minillm.losses.next_token import count_targets, next_token_loss
from tests.decoders import SHAPES, decoder

EOS = 9


def example(*tokens: int, prompt: int = 1, place: str = "") -> Example:
    taught = torch.arange(len(tokens)) >= prompt
    return Example(torch.tensor(tokens, dtype=torch.int32), taught, place)


A, B, C = example(5, 7, 7, EOS, prompt=2), example(4, 8, EOS), example(3, EOS)


def random_examples(count: int, longest: int = 60) -> list[Example]:
    draw = random.Random(0)
    return [
        example(*(draw.randrange(1, 20) for _ in range(draw.randint(2, longest))), prompt=1, place=str(i))
        for i in range(count)
    ]


def test_a_batch_is_padded_on_the_right() -> None:
    batch = collate([[A], [C]], pad_id=EOS)
    assert batch.tokens.tolist() == [[5, 7, 7, EOS], [3, EOS, EOS, EOS]]
    assert batch.keep.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.taught.tolist() == [[False, False, True, True], [False, True, False, False]]  # T10: EOS, not padding
    assert (batch.tokens.dtype, batch.taught.dtype, batch.segments.dtype) == (torch.int64, torch.bool, torch.int64)
    assert batch.fullness == 6 / 8


def test_a_row_of_several_knows_whose_each_token_is() -> None:
    batch = collate([[A, B], [C]], width=8)
    assert batch.tokens.tolist() == [[5, 7, 7, EOS, 4, 8, EOS, 0], [3, EOS, 0, 0, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.taught.int().tolist() == [[0, 0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(("multiple", "width"), [(1, 4), (4, 4), (8, 8), (3, 6)])
def test_widths_are_rounded_up(multiple: int, width: int) -> None:
    assert collate([[A], [C]], multiple=multiple).tokens.shape == (2, width)


def test_what_does_not_fit_is_refused() -> None:
    assert collate([[A, B]], width=7).tokens.shape == (1, 7)
    with pytest.raises(InputError, match="has 7 tokens for 6 places"):
        collate([[A, B]], width=6)
    with pytest.raises(InputError, match="0 rows"):
        collate([])


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("pack_to", [None, 64, 200])
def test_batched_and_packed_losses_are_those_of_single_examples(kind: str, pack_to: int | None) -> None:
    """The sum over all rows, and the number of what is predicted: packing and padding change neither."""
    model = decoder(**(SHAPES[kind] | {"context": 200})).double()
    examples = random_examples(30)
    alone = [collate([[one]]) for one in examples]
    batches = Batches(examples, size=4, seed=0, pack_to=pack_to)
    epoch = [batches.batch(step) for step in range(len(batches))]

    @torch.no_grad()
    def total(batch: Batch) -> Tensor:
        return next_token_loss(model(batch.tokens, **batch.layout()), batch.tokens, batch.taught, total=1)

    assert sum(count_targets(b.tokens, b.taught) for b in epoch) == sum(len(one) - 1 for one in examples)
    assert any("segments" in batch.layout() for batch in epoch) == (pack_to is not None)
    theirs, ours = sum(map(total, alone)), sum(map(total, epoch))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)  # float64, sums in another order


@pytest.mark.parametrize("count", [1, 7, 8, 1000])
def test_an_epoch_has_every_example_once(count: int) -> None:
    lengths = [len(one) for one in random_examples(count)]
    batches = bucketed(lengths, 8, seed=0, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert sorted(map(len, batches))[1:] == [8] * (len(batches) - 1)
    assert len(batches) == -(-count // 8)


def test_rows_of_a_batch_are_of_similar_length() -> None:
    """Lengths uniform up to 60: eight at random are padded to 53 on average, 31 being the mean."""
    lengths = [len(one) for one in random_examples(2000)]
    batches = bucketed(lengths, 8, seed=0, epoch=0)
    places = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert sum(lengths) / places > 0.97
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert sum(a <= b for a, b in pairwise(longest)) < 0.7 * len(batches), "sorted by length"


def test_orders_are_drawn_from_seed_and_epoch() -> None:
    lengths = [len(one) for one in random_examples(100)]
    drawn = [bucketed(lengths, 8, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert drawn[0] == bucketed(lengths, 8, seed=0, epoch=0)
    sets = [{frozenset(batch) for batch in batches} for batches in drawn]
    assert len(sets[0] & sets[1]) < 3 and len(sets[0] & sets[2]) < 3, "the same rows meet again"


@pytest.mark.parametrize("pack_to", [None, 128])
def test_a_resumed_run_gets_the_same_batches(pack_to: int | None) -> None:
    """From any step on, and asked in any order."""
    examples = random_examples(50)
    first = Batches(examples, size=4, seed=0, pack_to=pack_to)
    steps = list(range(2 * len(first) + 1))
    whole = [first.batch(step) for step in steps]
    for step in reversed(steps):
        resumed = Batches(examples, size=4, seed=0, pack_to=pack_to)
        assert all(map(torch.equal, whole[step], resumed.batch(step)))
        assert all(map(torch.equal, whole[step], first.batch(step)))
    assert not all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole, whole[len(first) :], strict=False))


@pytest.mark.parametrize("pack_to", [None, 128])
def test_each_epoch_is_all_examples(pack_to: int | None) -> None:
    examples = random_examples(50)
    batches = Batches(examples, size=4, seed=0, pack_to=pack_to)
    for epoch in range(3):
        steps = range(epoch * len(batches), (epoch + 1) * len(batches))
        places = [one.place for step in steps for row in batches.rows(step) for one in row]
        assert sorted(places, key=int) == [str(i) for i in range(50)]


def test_packed_batches_have_one_width_and_are_fuller() -> None:
    examples = random_examples(500)
    packed, padded = (Batches(examples, size=4, seed=0, pack_to=width) for width in (128, None))
    shapes = {packed.batch(step).tokens.shape[1] for step in range(len(packed))}
    assert shapes == {128}
    for batches in (packed, padded):
        epoch = [batches.batch(step).keep.flatten() for step in range(len(batches))]
        assert batches.fullness == pytest.approx(torch.cat(epoch).double().mean().item())
        assert batches.fullness > 0.95


def test_no_examples_and_no_size_are_refused() -> None:
    with pytest.raises(InputError, match="0 examples in batches of 4"):
        Batches([], size=4, seed=0)
    with pytest.raises(InputError, match="3 examples in batches of 0"):
        Batches([A, B, C], size=0, seed=0)
