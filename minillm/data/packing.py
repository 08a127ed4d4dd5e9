"""Several short examples in one row: which of them share it, so that few places stay empty.

Best fit, decreasing: longest first, each into the fullest row that still has room for it. In the limit that takes at
most 11/9 of the fewest rows that would do (Johnson et al. 1974), and far fewer where lengths vary.

Over a whole data set the same neighbours would meet whatever the seed, and rows would be sorted by length. So packing
runs over seeded windows of it.

Attention and positions must not see that a row holds several examples: that is what `Batch.segments` of
`minillm.data.batches` and the `segments` of `Decoder` are for.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from minillm.data.seeded import permutation
from minillm.errors import InputError

WINDOW = 4096  # examples; fuller rows in a larger one, more chance in a smaller


def pack(lengths: Sequence[int], width: int, *, seed: int, window: int = WINDOW) -> list[list[int]]:
    """Rows of indices into lengths, each index in one row, no row longer than width in all.

    A function of its arguments alone. Raises `InputError` for an example that no row can hold.

    >>> sorted(map(sorted, pack([6, 3, 5, 2, 4], 10, seed=0)))
    [[0, 4], [1, 2, 3]]
    """
    if lengths and max(lengths) > width:
        raise InputError(f"an example has {max(lengths)} tokens, a row {width}; widen the rows or cut the examples")
    order = permutation(len(lengths), seed, "pack")
    windows = (order[start : start + window] for start in range(0, len(order), window))
    return [row for chosen in windows for row in _best_fit(chosen, lengths, width)]


def _best_fit(chosen: Sequence[int], lengths: Sequence[int], width: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (places left, row), sorted
    for index in sorted(chosen, key=lambda index: -lengths[index]):
        at = bisect_left(room, (lengths[index], 0))
        left, row = room.pop(at) if at < len(room) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows


def fullness(rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> float:
    """Tokens / places: 1 is a packing without a gap.

    >>> fullness([[0, 1]], [6, 3], 10)
    0.9
    """
    return sum(lengths[index] for row in rows for index in row) / max(1, len(rows) * width)
