"""Examples -> batches: rows of tokens, what is taught of them, and whose each token is.

    tokens    5 7 7 9 | 4 8 9 | 0          one row that holds two examples and one empty place
    taught    . . x x   . x x   .
    segments  1 1 1 1   2 2 2   0          positions, which `Decoder` makes of them: 0 1 2 3   0 1 2   0

A row holds one example, or several that were packed; padding is on the right either way. Rows of one example are
batched with others of about their length, or most of what is computed would be padding. Which rows make up which batch
is a function of (seed, epoch): a resumed run needs to remember nothing but its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.data.examples import Example
from minillm.data.packing import pack
from minillm.data.seeded import permutation
from minillm.errors import InputError

# Batches whose rows are sorted by length together: the more, the less padding. All of them would be the same in every
# epoch, so a small data set is sorted in as many parts.
MOST_TOGETHER, FEWEST_PARTS = 64, 4


class Batch(NamedTuple):
    """tokens (B, T) int64 · taught (B, T) bool · segments (B, T) int64: 1, 2, ... by example, 0 on padding.

    taught is the `keep` of `minillm.losses.next_token_loss`, and never True on the first token of an example: a row's
    second example is not predicted from its first. A token may look at those of its own segment only.
    """

    tokens: Tensor
    taught: Tensor
    segments: Tensor

    @property
    def keep(self) -> Tensor:
        """(B, T) bool, True on tokens, False on padding."""
        return self.segments > 0

    @property
    def fullness(self) -> float:
        """Tokens / places."""
        return self.keep.float().mean().item()

    def to(self, device: torch.device | str) -> Batch:
        """The same there."""
        return Batch(*(x.to(device) for x in self))

    def layout(self) -> dict[str, Tensor]:
        """What `Decoder` has to be told: the segments where several share a row. Not what is padding: it stands on the
        right, where no token looks, and nothing is taught of it."""
        return {"segments": self.segments} if int(self.segments.max()) > 1 else {}


def collate(
    rows: Sequence[Sequence[Example]], *, width: int | None = None, multiple: int = 1, pad_id: int = 0
) -> Batch:
    """One batch of rows, each of one example or several.

    width: places of a row; None takes the longest row's, rounded up to a multiple of `multiple`.
    pad_id: any id, EOS too: what is padding is known by its place, not by its id.
    Raises `InputError` for no rows, and for a row that is longer than width.
    """
    longest = max((sum(map(len, row)) for row in rows), default=0)
    if width is None:
        width = -(-longest // multiple) * multiple
    if not longest or longest > width:
        raise InputError(f"the longest of {len(rows)} rows has {longest} tokens for {width} places")
    tokens = torch.full((len(rows), width), pad_id)
    segments = torch.zeros(len(rows), width, dtype=torch.int64)
    taught = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, examples in enumerate(rows):
        begin = 0
        for segment, example in enumerate(examples, 1):
            places = slice(begin, begin + len(example))
            tokens[row, places], taught[row, places] = example.tokens.long(), example.taught
            segments[row, places] = segment
            begin += len(example)
    return Batch(tokens, taught, segments)


def bucketed(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Batches of `size` indices of similar length, each index once, in an order of (seed, epoch); one may be smaller.

    Rows in random order are sorted by length, `MOST_TOGETHER` batches at a time at the most, and the batches shuffled.
    """
    order = permutation(len(lengths), seed, epoch)
    together = size * max(1, min(MOST_TOGETHER, len(lengths) // (size * FEWEST_PARTS)))
    batches: list[list[int]] = []
    for start in range(0, len(order), together):
        near = sorted(order[start : start + together], key=lambda index: lengths[index])
        batches += [near[at : at + size] for at in range(0, len(near), size)]
    return [batches[at] for at in permutation(len(batches), seed, epoch, "batches")]


class Batches:
    """The batch of every step: `size` rows of examples, epoch after epoch.

    pack_to: the width of rows that hold several examples; None gives each its own row. Who shares a row is drawn once,
    from the seed, so that every epoch has as many steps; the order of rows is drawn anew in each.
    """

    def __init__(self, examples: Sequence[Example], *, size: int, seed: int, pack_to: int | None = None) -> None:
        if size < 1 or not examples:
            raise InputError(f"{len(examples)} examples in batches of {size}: both must be at least 1")
        lengths = [len(example) for example in examples]
        chosen = [[i] for i in range(len(examples))] if pack_to is None else pack(lengths, pack_to, seed=seed)
        self._rows = [[examples[i] for i in row] for row in chosen]
        self._widths = lengths if pack_to is None else [pack_to] * len(chosen)
        self._size, self._seed, self._pack_to = size, seed, pack_to
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self._rows) // self._size)

    @property
    def fullness(self) -> float:
        """Tokens / places over an epoch, the first."""
        epoch = bucketed(self._widths, self._size, seed=self._seed, epoch=0)
        places = sum(len(batch) * max(self._widths[i] for i in batch) for batch in epoch)
        return sum(len(example) for row in self._rows for example in row) / places

    def rows(self, step: int) -> list[list[Example]]:
        """What the batch of a step holds, for whoever splits it further: into micro-batches, or among processes."""
        epoch, place = divmod(step, len(self))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, bucketed(self._widths, self._size, seed=self._seed, epoch=epoch))
        return [self._rows[i] for i in self._epoch[1][place]]

    def batch(self, step: int, *, multiple: int = 1, pad_id: int = 0) -> Batch:
        """`rows` as tensors: (size, T); the last batch of an epoch's drawing may have fewer rows."""
        return collate(self.rows(step), width=self._pack_to, multiple=multiple, pad_id=pad_id)
