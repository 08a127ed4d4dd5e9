"""Records -> examples: what is learned from, as tensors, and an account of every record that is not.

A record that cannot be used (a field is missing, the answer is empty, it is longer than the context, the chat template
refuses it) does not stop a run, and does not vanish either: it is in the `Tally`, with its place and the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from minillm.data.boundaries import encode, end_of_text
from minillm.data.formats import FORMATS, parse, recognise
from minillm.data.records import Record
from minillm.data.seeded import permutation
from minillm.data.tokenizer import Tokenizer
from minillm.errors import InputError, nearest


@dataclass(frozen=True, eq=False)
class Example:
    """One text to learn from: tokens (T,) int32 · taught (T,) bool, True on what the model is to write.

    The first token is never taught: nothing comes before it from which it could be predicted. taught is the `keep` of
    `minillm.losses.next_token_loss`. place: file and line of the record, for messages.
    """

    tokens: Tensor
    taught: Tensor
    place: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Tally:
    """What became of the records: how many are used, which are not and why, which lost their end.

    >>> print(Tally(used=2, unusable=[("a.jsonl line 3", "`output` is empty")]))
    2 of 3 records are used; 1 cannot be: a.jsonl line 3: `output` is empty
    """

    used: int = 0
    unusable: list[tuple[str, str]] = field(default_factory=list)  # (place, reason)
    cut: list[str] = field(default_factory=list)  # places, used all the same

    def __str__(self) -> str:
        text = f"{self.used} of {self.used + len(self.unusable)} records are used"
        if self.unusable:
            named = [f"{place}: {reason}" for place, reason in self.unusable]
            text += f"; {len(named)} cannot be: {_first(named)}"
        if self.cut:
            text += f"; {len(self.cut)} were cut to the context and lost their end: {_first(self.cut)}"
        return text


def make_examples(
    records: Sequence[Record], tokenizer: Tokenizer, *, context: int, format: str | None = None, cut: bool = False
) -> tuple[list[Example], Tally]:
    """An example of every usable record, in order, and the account of all of them.

    context: the most tokens that an example may have, EOS included. A longer record is unusable; with `cut` it keeps
    its first `context` tokens, and so loses the end that would teach the model to stop.
    format: a key of `FORMATS`; None recognises it, file by file.
    Raises `InputError` where no record is usable and for a file of no known format; `TokenizerError` for a tokenizer
    without EOS, and for conversations without a chat template.
    """
    if context < 2:
        raise InputError(f"context is {context}; it takes 2 tokens to predict one from the other")
    if format is not None and format not in FORMATS:
        raise InputError(f"format {format!r} is not known{nearest(format, FORMATS)}; choose {', '.join(FORMATS)}")
    end_of_text(tokenizer)
    examples: list[Example] = []
    tally = Tally()
    for _, same_file in groupby(records, key=lambda record: record.file):
        group = list(same_file)
        name = format or recognise(group)
        for record in group:
            try:
                ids, taught = encode(parse(record, name), tokenizer)
                example = Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(taught), record.place)
                examples.append(_fitted(example, context, cut, tally))
            except InputError as error:
                tally.unusable.append((record.place, str(error)))
    tally.used = len(examples)
    if not examples:
        raise InputError(f"nothing to learn from: {tally}")
    return examples, tally


def divided(examples: Sequence[Example], fraction: float, *, seed: int) -> tuple[list[Example], list[Example]]:
    """Held-out examples, that fraction of all, and the others, drawn by the seed; one at least stays to train on.

    Of two and more one at least is held out, unless the fraction is 0.
    """
    order = permutation(len(examples), seed, "held out")
    count = min(round(fraction * len(examples)), len(examples) - 1)
    if fraction and not count and len(examples) > 1:
        count = 1
    return [examples[i] for i in sorted(order[:count])], [examples[i] for i in sorted(order[count:])]


def _fitted(example: Example, context: int, cut: bool, tally: Tally) -> Example:
    if len(example) <= context:
        return example
    if not cut:
        raise InputError(f"{len(example)} tokens, the context is {context}")
    taught = example.taught[:context].clone()  # not a view, which would hold the whole
    if not taught.any():
        raise InputError(f"{len(example)} tokens, and none of the first {context} is to be taught")
    tally.cut.append(example.place)
    return Example(example.tokens[:context].clone(), taught, example.place)


def _first(named: Sequence[str], most: int = 3) -> str:
    return "; ".join(named[:most]) + (f"; and {len(named) - most} more" if len(named) > most else "")
