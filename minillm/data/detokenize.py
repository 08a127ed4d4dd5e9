"""Streaming: ids come one at a time, text goes out as soon as it can no longer change.

A token is not a piece of text. A character may be spread over several tokens; a token's leading space depends on what
stands before it; a byte-fallback run (`<0xF0><0x9F>...`) becomes characters only if all of it is valid UTF-8. Decoding
everything so far at each token would be right and quadratic. Decoding a short window is right and linear, because

1. text before the window has no influence: the one thing that a decoder does at the beginning only, taking off a
   leading space, it does to the window's context, which is out already;
2. of the window's text only the end can still change: one U+FFFD, which may be the beginning of a character, or a
   whole run of byte tokens. That is held back, and nothing else is.

For every sequence of ids and for `prompt` whose text ends in a whole character:

    "".join(pieces)                     == tokenizer.decode(ids)                        without a prompt
    decode(prompt) + "".join(pieces)    == tokenizer.decode(prompt + ids)               with one
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
# A UTF-8 character has at most 4 bytes, so 4 tokens contain whatever character the last one may be part of.
CONTEXT = 4


class Decodes(Protocol):
    """What `StreamDecoder` needs of a tokenizer; `minillm.data.tokenizer.Tokenizer` has it."""

    special_ids: frozenset[int]
    byte_ids: frozenset[int]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def __len__(self) -> int: ...


class StreamDecoder:
    """Turns ids into pieces of text, one `push` a token and one `finish` at the end.

    prompt: the ids in front of the first pushed one. With it the first piece keeps its leading space ("Once" and
    " upon"); without it the pieces are a text of their own, as `decode` of them alone is (transformers' `TextStreamer`
    with `skip_prompt` does the latter). If the prompt ends inside a character, the first pieces complete it.
    """

    def __init__(self, tokenizer: Decodes, *, skip_special: bool = True, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window = self._tail([int(i) for i in prompt])
        self._fresh = 0  # where in the window the ids begin whose text is not all out
        self._shown = self._decode(self._window)  # the part of the window's text that is out

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often empty, never half a character."""
        if not self._prints(token_id):
            return ""
        self._window.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            return ""
        text = self._decode(self._window)
        certain = text[:-1] if text.endswith(REPLACEMENT) else text
        piece = self._new_part(certain)
        if certain == text:
            self._move(self._window[self._fresh :])
        elif len(self._window) - self._fresh > 2 * CONTEXT and certain.startswith(self._shown):
            self._move(self._window[-CONTEXT:], held=1)
        elif piece:
            self._shown = certain
        return piece

    def finish(self) -> str:
        """What was held back. The decoder is then as new, without a prompt."""
        piece = self._new_part(self._decode(self._window))
        self._window, self._fresh, self._shown = [], 0, ""
        return piece

    def _move(self, window: list[int], *, held: int = 0) -> None:
        """Make `window` the context of what comes next; all of its text but the last `held` characters is out."""
        text = self._decode(window)
        self._window, self._shown = window, text[: len(text) - held]
        self._fresh = 0 if held else len(window)

    def _new_part(self, text: str) -> str:
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        # a prompt may end in U+FFFD that turns out to be a character, and then it differs from there on
        same = next((i for i, (a, b) in enumerate(zip(self._shown, text, strict=False)) if a != b), len(text))
        return text[same:]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)

    def _prints(self, token_id: int) -> bool:
        known = 0 <= token_id < len(self._tokenizer)
        return known and not (self._skip_special and token_id in self._tokenizer.special_ids)

    def _tail(self, prompt: list[int]) -> list[int]:
        """The last few printing ids of the prompt, from the beginning of a byte run if there is one."""
        ids = [i for i in prompt if self._prints(i)]
        start = max(0, len(ids) - 2 * CONTEXT)
        while start and ids[start] in self._tokenizer.byte_ids:
            start -= 1
        return ids[start:]
