"""How sure a counted rate is, and whether it has changed: of n prompts, k answers succeed.

A measured 12 of 40 may be a true 0.18 or 0.45; two models that answer the same prompts differ only in those that one of
them gets right and the other does not. The prompts count as drawn independently: several from one file are alike, and
the true interval is then wider.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from minillm.errors import InputError

#: Normal quantile of a two-sided 95% interval: Phi(1.959964) = 0.975.
Z95 = 1.959963984540054


def wilson(successes: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a rate (J. Am. Stat. Assoc. 22, 1927): the p with |k/n - p| <= z sqrt(p (1-p) / n).

        (k + z^2 / 2  -+  z sqrt(k (n - k) / n + z^2 / 4)) / (n + z^2)

    Unlike k/n -+ z s it stays inside [0, 1], and has a width at k = 0 too. No trial tells nothing: (0, 1).

    >>> [round(end, 4) for end in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    if not 0 <= successes <= count:
        raise InputError(f"{successes} successes of {count}: give a whole number between 0 and the count")
    if not count:
        return 0.0, 1.0
    middle = successes + z * z / 2
    spread = z * math.sqrt(successes * (count - successes) / count + z * z / 4)
    return max((middle - spread) / (count + z * z), 0.0), min((middle + spread) / (count + z * z), 1.0)


class Change(NamedTuple):
    """Two rates on the same trials. difference: after - before; low, high: its 95% interval; p: of no change at all."""

    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p: float


def change(before: Sequence[bool], after: Sequence[bool], z: float = Z95) -> Change:
    """Compare two outcomes of each trial. Only the trials whose outcome changed tell anything about p.

        b = gained, c = lost       p = 2 P(X <= min(b, c)),  X ~ Binomial(b + c, 1/2)       McNemar's test, exact

        d = (b - c) / N    d -+ z sqrt((b + c + 1) - (b - c)^2 / N) / N      N = n + 2      Agresti & Min, 2005, eq. 4

    The interval is Wald's with half a trial added to each of the four cells, which makes it hold for few trials;
    difference is the plain (b - c) / n. Raises InputError for lists of unequal length, and for empty ones.
    """
    if len(before) != len(after) or not before:
        raise InputError(f"{len(before)} outcomes before and {len(after)} after; give the same trials, at least one")
    count = len(before)
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    middle = (gained - lost) / (count + 2)
    spread = z * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (count + 2)) / (count + 2)
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    p = min(2 * tail / 2**changed, 1.0)
    return Change(gained, lost, (gained - lost) / count, max(middle - spread, -1.0), min(middle + spread, 1.0), p)
