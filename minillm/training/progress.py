"""How a long run is doing, while it runs: step, loss, tokens a second, memory, time left.

    pretrain ━━━━━━━━╸━━━━━━━  412/900 step  loss 3.207  7,412 tokens/s  2.1 GB  0:01:07 left

On a terminal a live line; elsewhere (a log file, CI) a plain line every ten seconds. Both go to standard error, so that
standard output carries results only.

The loss shown is smoothed, as a single batch is noisy: an average in which a batch's weight falls by the factor 0.9
with each newer one, over the sum of the weights (Adam's bias correction, arXiv 1412.6980 §3).
"""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from minillm.training import ranks

_QUIET_SECONDS = 10.0
_RATE_SECONDS = 20.0  # tokens/s is that of the last stretch, so that it follows the machine
_REMEMBERED = 0.9


class Progress:
    """`with Progress("pretrain", total=900) as progress: progress.update(step, loss=..., tokens=...)`.

    total and what `update` is given count the same unit: steps, tensors, or the seconds of a time budget (`unit="s"`).
    Everything but that count is optional: quantising has no loss, a reward model no tokens.
    """

    def __init__(
        self, description: str, *, total: float, unit: str = "step", done: float = 0, console: Console | None = None
    ) -> None:
        self.loss, self._memory = float("nan"), 0
        self._description, self._total, self._unit = description, total, unit
        self._first, self._done = done, done  # a resumed run starts in the middle
        self._console = console or Console(stderr=True, quiet=not ranks.is_first())
        self._weight = 0.0
        self._begin = self._said = time.monotonic()
        self._recent = deque([(self._begin, 0)])  # (time, tokens so far)
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total, status="")
        self._bar.update(self._task, completed=done)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if not self._console.is_terminal:
            self._say()

    def update(self, done: float, *, loss: float | None = None, tokens: int = 0, memory: int = 0) -> None:
        """`done` of `total` is over; `loss` of the newest batch, `tokens` it held; peak of `memory` in bytes so far."""
        now = time.monotonic()
        self._done, self._memory = done, memory
        if loss is not None:
            earlier = _REMEMBERED * self._weight
            self._weight = earlier + 1 - _REMEMBERED
            self.loss = loss if earlier == 0 else (earlier * self.loss + (1 - _REMEMBERED) * loss) / self._weight
        self._recent.append((now, self._recent[-1][1] + tokens))
        while len(self._recent) > 2 and now - self._recent[1][0] > _RATE_SECONDS:
            self._recent.popleft()
        self._bar.update(self._task, completed=done, status=self.status())
        if not self._console.is_terminal and now - self._said >= _QUIET_SECONDS:
            self._said = now
            self._say()

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def status(self) -> str:
        """`412/900 step  loss 3.207  7,412 tokens/s  2.1 GB  0:01:07 left`, without what is not known."""
        (begin, before), (end, after) = self._recent[0], self._recent[-1]
        parts = [f"{self._done:.0f}/{self._total:.0f} {self._unit}"]
        if self.loss == self.loss:
            parts.append(f"loss {self.loss:.3f}")
        if after > before and end > begin:
            parts.append(f"{(after - before) / (end - begin):,.0f} tokens/s")
        if self._memory:
            parts.append(f"{self._memory / 1e9:.1f} GB")
        if self._done > self._first:
            parts.append(f"{_clock(self._seconds_left())} left")
        return "  ".join(parts)

    def _seconds_left(self) -> float:
        per_unit = (self._recent[-1][0] - self._begin) / (self._done - self._first)
        return max(self._total - self._done, 0) * per_unit

    def _say(self) -> None:
        self._console.print(f"{self._description}  {self.status()}", highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(3725.4)
    '1:02:05'
    """
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
