"""Rows of several examples: nothing lost, nothing over the edge, little empty."""

from __future__ import annotations

import random

import pytest

from minillm.data.packing import fullness, pack
from minillm.data.seeded import permutation
from minillm.errors import InputError


def lengths_like_instructions(count: int, width: int) -> list[int]:
    """Log-normal, median 90, cut at the width: about Alpaca's prompts and answers in tokens."""
    draw = random.Random(0)
    return [min(width, int(draw.lognormvariate(4.5, 0.6)) + 2) for _ in range(count)]


@pytest.mark.parametrize("window", [1, 7, 100, 4096])
def test_every_example_is_in_one_row(window: int) -> None:
    lengths = lengths_like_instructions(1000, 256)
    rows = pack(lengths, 256, seed=0, window=window)
    assert sorted(index for row in rows for index in row) == list(range(1000))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 256
    assert (len(rows) == 1000) == (window == 1)


def test_rows_are_full() -> None:
    lengths = lengths_like_instructions(5000, 1024)
    rows = pack(lengths, 1024, seed=0)
    assert fullness(rows, lengths, 1024) > 0.98
    assert fullness([[i] for i in range(5000)], lengths, 1024) < 0.15


def test_the_fullest_row_with_room_is_taken() -> None:
    """7 and 6 open rows of 10; 3 fits both and goes to the 7, so that 4 finds its place beside the 6."""
    assert sorted(map(sorted, pack([6, 7, 3, 4], 10, seed=3))) == [[0, 3], [1, 2]]
    assert len(pack([10, 10], 10, seed=0)) == 2


@pytest.mark.parametrize("seed", range(20))
def test_a_packing_is_near_the_best(seed: int) -> None:
    """Rows cut at random into examples: the cuts themselves show that so many rows suffice."""
    draw, lengths = random.Random(seed), []
    for _ in range(60):
        marks = sorted(draw.sample(range(1, 100), 3))
        lengths += [b - a for a, b in zip([0, *marks], [*marks, 100], strict=True)]
    assert 60 <= len(pack(lengths, 100, seed=seed)) <= 60 * 11 / 9


def test_a_packing_is_drawn_from_its_seed() -> None:
    lengths = lengths_like_instructions(300, 256)
    assert pack(lengths, 256, seed=1, window=50) == pack(lengths, 256, seed=1, window=50)
    assert pack(lengths, 256, seed=1, window=50) != pack(lengths, 256, seed=2, window=50)


def test_what_no_row_can_hold_is_refused() -> None:
    with pytest.raises(InputError, match="an example has 11 tokens, a row 10"):
        pack([3, 11], 10, seed=0)
    assert pack([], 10, seed=0) == []


def test_permutations_depend_on_all_of_their_origin() -> None:
    orders = [permutation(50, *origin) for origin in ((0, 1), (0, 2), (1, 1), (1 << 32, 1), (0, 1, "batches"))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert permutation(50, 0, 1) == orders[0]
    assert permutation(8, 0, 0) == [1, 0, 5, 7, 2, 6, 4, 3]  # on every machine
