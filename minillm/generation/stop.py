"""Stop strings in a text that arrives in pieces.

A stop string may be split over pieces, so text that could be its beginning is held back until the next piece decides.

    stop "END"    pieces "the E", "N", "glish END of"    ->  "the ", "", "ENglish "    and found
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text through until one of the strings appears; neither it nor anything after it comes out.

    >>> stop = StopStrings(["END"])
    >>> stop.push("the E"), stop.push("N"), stop.push("glish END of"), stop.found
    ('the ', '', 'ENglish ', True)
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self._strings = tuple(strings)
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain to stand before any stop string."""
        text = self._held + piece
        starts = [start for string in self._strings if (start := text.find(string)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        held = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The longest end of `text` that is a beginning of `string`."""
    return next((size for size in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:size])), 0)
