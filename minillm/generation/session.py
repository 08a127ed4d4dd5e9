"""A conversation that keeps its cache: each turn computes only what is new.

The prompt of a turn is the whole conversation so far, rendered and tokenised again. Most of it is already in the cache:

    cached   <s> [INST] hi [/INST] hello!
    prompt   <s> [INST] hi [/INST] hello! </s> <s> [INST] and now? [/INST]
             └──── longest common beginning ───┘└────── computed ───────┘

Comparing token ids, not text, keeps this right when a template renders earlier turns differently than they were
written: the cache is rewound to where the two part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from minillm.data.tokenizer import Tokenizer
from minillm.generation.generate import Completion, answer_stream, sampling_for
from minillm.model import Decoder


class Session:
    """`stream` like `minillm.stream`, on one growing cache."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._cache = model.new_cache(1, 0)
        self._cached: list[int] = []

    def stream(self, prompt: Sequence[int], answer: Completion, **options: Any) -> Iterator[str]:
        """The answer to a prompt of token ids, piece by piece; `answer` is filled as it is written.

        Stopping early is fine: the cache holds what was computed, and the next prompt decides how much of it counts.
        """
        sampling = sampling_for(self.model, options)
        shared = _common(self._cached, prompt[:-1])  # the last token is computed again, for its logits
        self._cache.rewind(shared)
        try:
            yield from answer_stream(self.model, self.tokenizer, prompt, sampling, answer=answer, cache=self._cache)
        finally:
            self._cached = [*prompt, *answer.tokens][: self._cache.length]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning.

    >>> _common([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
