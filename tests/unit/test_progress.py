"""What a progress line says, on a terminal and off it."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from minillm.training import progress as module
from minillm.training.progress import Progress


class Time:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(module, "time", time)
    return time


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rates_and_time_left(clock: Time) -> None:
    progress = Progress("train", total=100, console=quiet())
    for step in range(1, 11):
        clock.now += 2
        progress.update(step, loss=3.0, tokens=500)
    assert progress.status() == "10/100 step  loss 3.000  250 tokens/s  0:03:00 left"


def test_the_peak_of_memory(clock: Time) -> None:
    progress = Progress("train", total=2, console=quiet())
    progress.update(1, loss=3.0, memory=2_149_000_000)
    assert progress.status() == "1/2 step  loss 3.000  2.1 GB  0:00:00 left"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_note_is_a_line_of_its_own_as_it_is(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=60)
    text = "  [INST] what? [/INST] :smile: " + "long " * 20
    with Progress("train", total=2, console=console) as progress:
        progress.note(text)
    assert text.rstrip() in written(console)


def test_the_rate_is_that_of_the_last_stretch(clock: Time) -> None:
    progress = Progress("train", total=100, console=quiet())
    for step in range(1, 61):
        clock.now += 1
        progress.update(step, tokens=100 if step <= 30 else 900)
    assert "  900 tokens/s" in progress.status()


def test_a_resumed_run_is_timed_from_where_it_resumed(clock: Time) -> None:
    progress = Progress("train", total=100, done=90, console=quiet())
    clock.now += 10
    progress.update(95)
    assert progress.status() == "95/100 step  0:00:10 left"


def test_the_loss_is_smoothed_without_a_start_from_zero(clock: Time) -> None:
    progress = Progress("train", total=3, console=quiet())
    assert math.isnan(progress.loss)
    progress.update(1, loss=4.0)
    assert progress.loss == 4.0
    progress.update(2, loss=2.0)
    assert progress.loss == pytest.approx((0.9 * 4 + 2) / 1.9)  # weights 0.9 and 1, over their sum
    progress.update(3, loss=1.0)
    assert progress.loss == pytest.approx((0.81 * 4 + 0.9 * 2 + 1) / 2.71)


def test_off_a_terminal_a_line_every_ten_seconds_and_one_at_the_end(clock: Time) -> None:
    console = quiet()
    with Progress("quantise", total=40, unit="tensor", console=console) as progress:
        for step in range(1, 36):
            clock.now += 1
            progress.update(step)
    lines = written(console).splitlines()
    assert [line.split()[1] for line in lines] == ["10/40", "20/40", "30/40", "35/40"]
    assert lines[0] == "quantise  10/40 tensor  0:00:30 left"


def test_on_a_terminal_a_bar(clock: Time) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress("train", total=2, console=console) as progress:
        clock.now += 1
        progress.update(2, loss=1.5, tokens=10)
    assert "2/2 step  loss 1.500  10 tokens/s  0:00:00 left" in written(console)
