"""What every training loop needs around its own three lines: gradients, a clock, and a way to stop.

The loops themselves stand in scripts/, each whole and on one screen:

    while not clock.over:
        loss = accumulate(model, micro_batches)            gradients of one large batch, in pieces that fit
        clip, set the learning rate for clock.done, optimizer.step()
        clock.tick()
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Literal

import torch
from torch import Tensor, nn

from minillm.data.batches import Batch
from minillm.errors import InputError, NumericsError
from minillm.losses import count_targets, next_token_loss

Precision = Literal["float32", "bfloat16"]


def autocast(device: torch.device | str, precision: Precision) -> torch.autocast:
    """Inside, matrix products run in bf16 where `precision` says so; parameters, norms and losses stay fp32."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def accumulate(model: nn.Module, batches: Sequence[Tensor | Batch], *, precision: Precision = "float32") -> float:
    """Add the gradients of `next_token_loss` over all batches together; returns that loss.

    batches: (B_i, T_i) int64 each, every token a target; or `Batch`es, which say what is padding and what is taught.
    Every token weighs the same however it is batched: one batch of 8 rows, or 8 of one, give the same gradient. Raises
    NumericsError where the loss is not finite, before any weight is touched.
    """
    parts = [(x.tokens, x.keep, x.taught) if isinstance(x, Batch) else (x, None, None) for x in batches]
    total = sum(int(count_targets(tokens, taught)) for tokens, _, taught in parts)
    loss = 0.0
    for tokens, keep, taught in parts:
        with autocast(tokens.device, precision):
            logits = model(tokens) if keep is None or bool(keep.all()) else model(tokens, keep=keep)
        part = next_token_loss(logits, tokens, taught, total=total)
        part.backward()
        loss += part.item()
    if not abs(loss) < float("inf"):
        raise NumericsError(f"the loss is {loss}; lower the learning rate, or warm up longer")
    return loss


def faster_precision(model: nn.Module, tokens: Tensor) -> Precision:
    """Which precision trains faster here, by trying each on tokens (B, T); leaves no gradients.

    Half the bits are twice the speed only where the processor multiplies bf16 itself (AVX512-BF16, AMX, newer arm64;
    any GPU since 2020); elsewhere torch emulates it, several times slower than fp32. So the machine is asked.
    """

    def seconds(precision: Precision) -> float:
        begin = time.perf_counter()
        accumulate(model, [tokens], precision=precision)  # .item() inside waits for the device
        return time.perf_counter() - begin

    choices: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in choices:
        seconds(precision)  # first use: kernels are chosen, memory is touched
    taken = {precision: min(seconds(precision) for _ in range(2)) for precision in choices}
    model.zero_grad()
    return min(choices, key=lambda precision: taken[precision])


class Clock:
    """How much of a run is over, counted in steps, or in minutes of training (pauses before `resume` are none).

    A run counted in steps is the same on every machine and can be repeated to the last bit. One counted in minutes does
    what the machine manages, and is ready when it was promised to be.
    """

    def __init__(self, *, steps: int | None = None, minutes: float | None = None) -> None:
        if (steps is None) == (minutes is None):
            raise InputError("give the length of the run in steps or in minutes, not in both")
        if (steps is not None and steps < 1) or (minutes is not None and not minutes > 0):
            raise InputError(
                f"the run is {steps or minutes} {'steps' if minutes is None else 'minutes'} long; give more"
            )
        self.step = 0
        self.unit = "step" if minutes is None else "s"
        self.total: float = steps if steps is not None else (minutes or 0) * 60
        self._earlier, self._begin = 0.0, time.monotonic()

    def resume(self, step: int, seconds: float) -> None:
        """Go on from where an earlier part of the run stopped."""
        self.step, self._earlier, self._begin = step, seconds, time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent training, in all parts of the run."""
        return self._earlier + time.monotonic() - self._begin

    @property
    def count(self) -> float:
        """What is over, in the unit of `total`."""
        return self.step if self.unit == "step" else self.seconds

    @property
    def over(self) -> bool:
        return self.count >= self.total

    @property
    def done(self) -> float:
        """The fraction that is over while a step is made; a step counts from its middle, so that none has rate 0."""
        return min((self.step + 0.5 if self.unit == "step" else self.seconds) / self.total, 1.0)

    def tick(self) -> None:
        self.step += 1


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM in the block sets the event, so that the loop can end its step and save; a second one raises.

    For the main thread only, as signals are.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
