r"""Regular expressions over names of modules, in a time that no pattern can stretch: they come in strangers' files.

`re` goes one way after another, and there may be 2^n of them: `(a|a)*b` on thirty letters a takes minutes. Here all
ways are gone at once (Thompson, CACM 11(6), 1968). A part of a pattern is a step

    step(name, at) -> at'        at, at': the places in the name that are reached, as bits of one number

A character is a mask and a shift; alternatives are an OR; a repetition ends when it reaches no place that is new. What
is repeated or looked ahead to is computed once for each place, so all takes |pattern| |name|^2 at most, however deep it
nests: some 0.2 ms a name, 30 ms for the worst pattern that is taken.

What a pattern is and which characters a class holds, `re` says. Refused by name: what depends on the one way that was
gone (backreferences, conditions, atomic groups, possessive repetitions), and flags within (`(?x)`, `(?i:...)`).
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from minillm.errors import InputError

_LONGEST, _DEEPEST, _MOST = 4096, 50, 64
_TOKEN = re.compile(
    r"""\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|0[0-7]{0,2}|.)  # an escape
    |\[\^?\]?(?:\\.|[^\]\\])*\]                                                        # a class
    |\(\?(?:P<\w+>|<?[=!]|P=\w+\)|\#[^)]*\)|[a-zA-Z-]+[:)]|[:>(])|\(                   # how a group begins
    |(?:[*+?]|\{(?:[0-9]+(?:,[0-9]*)?|,[0-9]*)\})[?+]?                                 # how often
    |.""",
    re.VERBOSE | re.DOTALL,
)
_REPEAT = re.compile(r"([*+?])\??|\{([0-9]*)(,?)([0-9]*)\}\??")
_OURS_NOT = re.compile(r"\\[1-9]|\(\?[>(]|\(\?P=.*|\(\?[a-zA-Z-]+:|\(\?[a-zA-Z]*x[a-zA-Z]*\)|(?:[*+?]|\{.*\})\+")
_NOTHING = re.compile(r"\(\?(?:\#.*|[a-zA-Z]+)\)", re.DOTALL)  # comments, and flags, which `re` has read
_LOOK = re.compile(r"\(\?<?[=!]")
_SIGNS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class _Name:
    """A name that is matched, and what was found out about it."""

    def __init__(self, text: str, flags: int) -> None:
        self.text, self.flags = text, flags
        self.last = 1 << len(text)
        self.all = 2 * self.last - 1
        self._where: dict[str, int] = {}
        self._after: dict[tuple[Step, int], int] = {}

    def where(self, atom: str) -> int:
        """The places at whose right a character is that the atom matches."""
        if atom not in self._where:
            fits = (1 << place for place, sign in enumerate(self.text) if _holds(atom, sign, self.flags))
            self._where[atom] = sum(fits)
        return self._where[atom]

    def borders(self) -> int:
        """The places between a letter of a word and none."""
        words = self.where(r"\w")
        return words ^ (words << 1)

    def after(self, step: Step, at: int) -> int:
        """step(self, at), from each place by itself and once."""
        found = 0
        for place in _bits(at):
            key = step, place
            if key not in self._after:
                self._after[key] = step(self, place)
            found |= self._after[key]
        return found


Step = Callable[[_Name, int], int]


class Pattern(NamedTuple):
    """A pattern ready to be used."""

    step: Step
    flags: int

    def matches(self, text: str) -> bool:
        """Whether it matches the text as a whole."""
        name = _Name(text, self.flags)
        return bool(self.step(name, 1) & name.last)


@functools.lru_cache(maxsize=256)
def compiled(pattern: str) -> Pattern:
    r"""InputError for what is no regular expression, and for what cannot be matched without going back.

    >>> compiled(r".*\.(q|v)_proj").matches("layers.0.v_proj"), compiled("(a|a)*b").matches("a" * 60)
    (True, False)
    """
    if len(pattern) > _LONGEST:
        raise InputError(
            f"pattern {pattern!r:.100} has {len(pattern)} characters, at most {_LONGEST}; write it shorter"
        )
    try:
        flags = re.compile(pattern).flags
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"pattern {pattern!r:.100} is no regular expression ({error}); correct it") from None
    tokens = _TOKEN.findall(pattern)
    for token in tokens:
        if _OURS_NOT.fullmatch(token):
            raise InputError(f"pattern {pattern!r:.100} uses {token!r}, which minillm does not have; write it plainly")
    dear = sum(bool(_REPEAT.fullmatch(each) or _LOOK.fullmatch(each)) for each in tokens)
    if _depth(tokens) > _DEEPEST or dear > _MOST:
        raise InputError(
            f"pattern {pattern!r:.100} nests {_depth(tokens)} groups, at most {_DEEPEST}, and has {dear} repetitions, "
            f"at most {_MOST}; write it plainly"
        )
    return Pattern(_either(deque(token for token in tokens if not _NOTHING.fullmatch(token))), flags)


def _depth(tokens: list[str]) -> int:
    depth = deepest = 0
    for token in tokens:
        depth += (token[0] == "(" and token[-1] != ")") - (token == ")")
        deepest = max(depth, deepest)
    return deepest


@functools.lru_cache(maxsize=2**16)
def _holds(atom: str, sign: str, flags: int) -> bool:
    return re.fullmatch(atom, sign, flags) is not None


def _bits(at: int) -> Iterator[int]:
    while at:
        lowest = at & -at
        yield lowest
        at ^= lowest


def _either(tokens: deque[str]) -> Step:
    """The steps up to the end of the group."""
    ways = [_sequence(tokens)]
    while tokens and tokens[0] == "|":
        tokens.popleft()
        ways.append(_sequence(tokens))

    def step(name: _Name, at: int) -> int:
        found = 0
        for way in ways:
            found |= way(name, at)
        return found

    return ways[0] if len(ways) == 1 else step


def _sequence(tokens: deque[str]) -> Step:
    parts: list[Step] = []
    while tokens and tokens[0] not in ("|", ")"):
        part = _atom(tokens.popleft(), tokens)
        often = _REPEAT.fullmatch(tokens[0]) if tokens else None
        if often is not None:
            tokens.popleft()
            part = _repeated(part, *_times(often))
        parts.append(part)

    def step(name: _Name, at: int) -> int:
        for part in parts:
            if not at:
                break
            at = part(name, at)
        return at

    return step


def _times(often: re.Match[str]) -> tuple[int, int | None]:
    """At least, at most; None: any number."""
    sign, low, comma, high = often.groups()
    if sign:
        return _SIGNS[sign]
    return int(low or 0), int(high) if high else None if comma else int(low)


def _repeated(part: Step, low: int, high: int | None) -> Step:
    def step(name: _Name, at: int) -> int:
        most = len(name.text) + 1  # after so many nothing is new: each moves on, or stays and may do so for ever
        for _ in range(min(low, most)):
            at = name.after(part, at)
        found = at
        for _ in range(most if high is None else min(high - low, most)):
            at = name.after(part, at) & ~found
            if not at:
                break
            found |= at
        return found

    return step


def _atom(token: str, tokens: deque[str]) -> Step:
    """What one token, or the group that it opens, does."""
    if token[0] == "(":
        inner = _either(tokens)
        tokens.popleft()
        return _looking(token, inner)
    match token:
        case "^" | r"\A":
            return lambda name, at: at & 1
        case "$" | r"\Z" | r"\z":
            return lambda name, at: at & name.last
        case r"\b":
            return lambda name, at: at & name.borders()
        case r"\B":
            return lambda name, at: at & ~name.borders()
        case _:
            return lambda name, at: (at & name.where(token)) << 1


def _looking(token: str, inner: Step) -> Step:
    """A group, or what it says of the places: that it begins, or ends, there, or not."""
    match token[2:]:
        case "=":
            return lambda name, at: sum(place for place in _bits(at) if name.after(inner, place))
        case "!":
            return lambda name, at: sum(place for place in _bits(at) if not name.after(inner, place))
        case "<=":
            return lambda name, at: at & name.after(inner, name.all)
        case "<!":
            return lambda name, at: at & ~name.after(inner, name.all)
        case _:
            return inner
