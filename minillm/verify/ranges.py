"""Numbers as people write them."""

from __future__ import annotations


def ranges(numbers: list[int], most: int = 6) -> str:
    """Whole numbers as people write them.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    written = [f"{a}-{b}" if b > a else str(a) for a, b in runs]
    return ", ".join(written[:most]) + (f" and {len(written) - most} more" if len(written) > most else "")
