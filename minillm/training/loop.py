"""What every training loop needs around its own three lines: gradients, a clock, and a way to stop.

The loops themselves stand in scripts/, each whole and on one screen:

    while not clock.over:
        loss = accumulate(model, micro_batches)            gradients of one large batch, in pieces that fit
        clip, set the learning rate for clock.done, optimizer.step()
        clock.tick()
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Literal

import torch
from torch import Tensor, nn

from minillm.data.batches import Batch
from minillm.errors import InputError, NumericsError
from minillm.losses import count_targets
from minillm.training import ranks, spread
from minillm.training.token_loss import TokenLoss, whole_rows

Precision = Literal["float32", "bfloat16", "float16"]


def autocast(device: torch.device | str, precision: Precision) -> torch.autocast:
    """Inside, matrix products run in 16 bits where `precision` says so; parameters, norms and losses stay fp32."""
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=precision != "float32")


def loss_scale(device: torch.device | str, precision: Precision) -> torch.amp.GradScaler:
    """What keeps gradients in fp16's range (arXiv 1710.03740 §3.2): the loss is multiplied by a power of two, which
    halves where a gradient overflows, whose step is left out, and doubles after 2000 that did not. Else does nothing.
    """
    return torch.amp.GradScaler(torch.device(device).type, enabled=precision == "float16")


def accumulate(
    model: nn.Module,
    batches: Sequence[Tensor | Batch],
    *,
    precision: Precision = "float32",
    scale: torch.amp.GradScaler | None = None,
) -> float:
    """Add the gradients of the mean token loss over all batches together; returns that loss.

    model: a `Decoder`, another module tokens -> logits, or a `TokenLoss`, as it is or spread over ranks
    (`minillm.training.spread`), each of which brings its own batches. batches: (B_i, T_i) int64 each, every token a
    target; or `Batch`es, which say what is padding and what is taught. scale: what gradients are multiplied by. Every
    token weighs the same however it is batched: one batch of 8 rows, 8 of one, or one of 4 on each of two ranks give
    the same gradient. Raises NumericsError where the loss is not finite, before any weight is touched, on all ranks.
    """
    measured = model if isinstance(getattr(model, "module", model), TokenLoss) else TokenLoss(model)
    parts = [each if isinstance(each, Batch) else whole_rows(each) for each in batches]
    is_spread = spread.is_spread(measured)
    total: float = sum(int(count_targets(part.tokens, part.taught)) for part in parts)
    total = int(ranks.total(total)) if is_spread else total
    loss = 0.0
    for place, part in enumerate(parts, 1):
        with spread.adding(measured, last=place == len(parts)):
            with autocast(part.tokens.device, precision):
                share: Tensor = measured(part, max(total, 1))
            sought = share * ranks.world() if is_spread else share  # as gradients become the mean over the ranks
            (sought if scale is None else scale.scale(sought)).backward()
        loss += share.item()
    loss = ranks.total(loss) if is_spread else loss
    if not math.isfinite(loss):
        raise NumericsError(f"the loss is {loss}; lower the learning rate, or warm up longer")
    return loss


def clip_gradients(parameters: Sequence[nn.Parameter], longest: float, *, may_overflow: bool = False) -> float:
    """Shorten the gradients, taken as one vector, to at most `longest`; returns their length before.

    Raises NumericsError where it is not finite, unless they `may_overflow`, as scaled gradients of fp16 do.
    """
    norm = float(spread.whole(torch.nn.utils.clip_grad_norm_(parameters, longest)))
    if not math.isfinite(norm) and not may_overflow:
        raise NumericsError(f"the gradient's norm is {norm} while the loss is finite; lower the learning rate")
    return norm


@contextlib.contextmanager
def naming(step: int, places: Iterable[str]) -> Iterator[None]:
    """A NumericsError from the block says in which step it was, and which examples that step had."""
    try:
        yield
    except NumericsError as error:
        named = list(places)
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        raise NumericsError(f"step {step}: {error}; its examples: {', '.join(named[:8])}{more}") from error


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
    what the machine manages, and is ready when it was promised to be. Of several ranks the first one's clock counts, as
    it was when the last step ended: all of them see the same time.
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
        self._earlier, self._begin, self._agreed = 0.0, time.monotonic(), 0.0

    def resume(self, step: int, seconds: float) -> None:
        """Go on from where an earlier part of the run stopped."""
        self.step, self._earlier, self._begin, self._agreed = step, seconds, time.monotonic(), seconds

    @property
    def seconds(self) -> float:
        """Time spent training, in all parts of the run."""
        return self._agreed if ranks.world() > 1 else self._earlier + time.monotonic() - self._begin

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
        self._agreed = ranks.firsts(self._earlier + time.monotonic() - self._begin)


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
