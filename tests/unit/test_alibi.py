"""ALiBi: the paper's slopes, distances that softmax sees, pads that do not count, and Falcon's rounding to bfloat16."""

from __future__ import annotations

import pytest
import torch

from minillm.model.alibi import alibi_bias, alibi_slopes
from tests.error import assert_near


def test_slopes_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [1 / 2**h for h in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2**-8]
    assert alibi_slopes(16).tolist() == pytest.approx([2 ** (-h / 2) for h in range(1, 17)])


@pytest.mark.parametrize(("heads", "power"), [(3, 2), (6, 4), (12, 8), (71, 64), (112, 64)])
def test_slopes_between_powers_of_two(heads: int, power: int) -> None:
    """Those of the power below, then the first, third, fifth ... of the power above."""
    expected = torch.cat((alibi_slopes(power), alibi_slopes(2 * power)[::2]))[:heads]
    assert torch.equal(alibi_slopes(heads), expected)
    assert len(set(expected.tolist())) == heads


@pytest.mark.parametrize("heads", [1, 4, 6, 8])
def test_softmax_sees_the_distance_of_the_paper(heads: int) -> None:
    """m p_j, divided by sqrt(E), and the paper's -m (i - j), divided alike, are the same attention."""
    positions, size = torch.arange(20), 16  # below 257, times a power of two: bfloat16 rounds nothing
    scores = torch.randn(1, heads, 20, 20, dtype=torch.float64)
    paper = -alibi_slopes(heads).double().view(-1, 1, 1) * (positions[:, None] - positions) / size**0.5
    found = (scores + alibi_bias(positions[None], heads, size, torch.float64)).softmax(-1)
    assert_near(found, (scores + paper).softmax(-1), 1e-14)  # float64 rounds at 1e-16


def test_shape_and_dtype() -> None:
    bias = alibi_bias(torch.zeros(3, 7, dtype=torch.int64), 4, 8, torch.float16)
    assert bias.shape == (3, 4, 1, 7) and bias.dtype == torch.float16


def test_rounded_to_bfloat16_as_falcon_was_trained() -> None:
    """bf16 has 8 bits: of 255 .. 260 it has only 255, 256, 256 (a tie, to even), 258, 260 (a tie), 260."""
    bias = alibi_bias(torch.arange(255, 261)[None], 8, 1, torch.float32)
    assert (bias[0, 0, 0] * 2).tolist() == [255, 256, 256, 258, 260, 260]


def test_division_by_the_root_of_the_head_size() -> None:
    one, sixteen = (alibi_bias(torch.arange(9)[None], 2, size, torch.float32) for size in (1, 16))
    assert torch.equal(one, 4 * sixteen)
