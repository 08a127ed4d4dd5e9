"""metrics.jsonl: whole lines as they are written, cut where a run goes on, one line of error where a disk is full."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.errors import InputError, MinillmError
from minillm.training import metrics as module
from minillm.training.metrics import METRICS, SAMPLES, Metrics, need_tensorboard, peak_memory, read_lines


def fill(folder: Path, steps: int, **options: Any) -> None:
    with Metrics(folder, **options) as metrics:
        for step in range(1, steps + 1):
            metrics.write(step, tokens=10, loss=1 / step)
            metrics.sample(step, prompt="a", text="b")


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, tokens=5, loss=2.0)
            lines = read_lines(tmp_path / METRICS)
            assert [(line["step"], line["tokens"]) for line in lines] == [
                (each, 5 * each) for each in range(1, step + 1)
            ]


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "from itertools import count\nfrom pathlib import Path\nfrom minillm.training.metrics import Metrics\n"
        f"metrics = Metrics(Path({str(tmp_path)!r}))\n"
        "for step in count(1): metrics.write(step, tokens=1, loss=1.0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / METRICS).exists():
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    raw = (tmp_path / METRICS).read_bytes()
    steps = [json.loads(line)["step"] for line in raw.split(b"\n")[:-1]]
    assert len(steps) > 10 and steps == list(range(1, len(steps) + 1))


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.write(1, loss=float("nan"), gradient_norm=float("inf"))
    text = (tmp_path / METRICS).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "gradient_norm": None}


def test_tokens_a_second_are_those_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now))
    with Metrics(tmp_path) as metrics:
        now += 2
        metrics.write(1, tokens=500, loss=1.0)
        now += 60  # a look at the held-out examples
        metrics.write(1, held_out=1.0)
        now += 4
        metrics.write(2, tokens=500, loss=1.0)
    assert [line.get("tokens_per_second") for line in read_lines(tmp_path / METRICS)] == [250, None, 125]


@pytest.mark.parametrize("half", ['{"step": 9, "los', '{"step": 6, "loss": 1.0}', ""])
def test_going_on_cuts_what_will_be_written_again(tmp_path: Path, half: str) -> None:
    fill(tmp_path, 5)
    for name in (METRICS, SAMPLES):
        with open(tmp_path / name, "a") as file:
            file.write(half)
    with Metrics(tmp_path, resumed=3) as metrics:
        for name in (METRICS, SAMPLES):
            assert [line["step"] for line in read_lines(tmp_path / name)] == [1, 2, 3]
        metrics.write(4, tokens=10, loss=0.0)
    assert [(line["step"], line["tokens"]) for line in read_lines(tmp_path / METRICS)][-1] == (4, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS, SAMPLES]


def test_starting_anew_leaves_nothing_of_before(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    with Metrics(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_run_from_before_there_were_metrics_goes_on(tmp_path: Path) -> None:
    with Metrics(tmp_path, resumed=7) as metrics:
        metrics.write(8, loss=1.0)
    assert read_lines(tmp_path / METRICS) == [{"step": 8, "loss": 1.0}]


def test_reading_passes_over_a_line_that_is_being_written_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_lines(file) == [{"step": 1}]
    for broken in ('{"st', "[1]", '{"loss": 1}', ""):
        file.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
        with pytest.raises(InputError, match=r"metrics.jsonl: line 2 is no JSON object with a step"):
            read_lines(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_lines(tmp_path / "none.jsonl")


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size`: as a full disk, a part of a line is taken and the rest refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_run_goes_on_from_it(tmp_path: Path) -> None:
    said = r"metrics.jsonl: cannot be written \(File too large\); free space"
    with pytest.raises(InputError, match=said) as caught, small_disk(110), Metrics(tmp_path) as metrics:
        for step in range(1, 9):  # the step that fails is looked at below
            metrics.write(step, loss=1.0)
    assert "\n" not in str(caught.value)
    whole = [line["step"] for line in read_lines(tmp_path / METRICS)]
    assert whole == [1, 2, 3, 4] and step == 5 and (tmp_path / METRICS).stat().st_size == 110
    with Metrics(tmp_path, resumed=3) as metrics:
        metrics.write(4, loss=1.0)
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == [1, 2, 3, 4]


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / METRICS).mkdir()
    for resumed in (None, 3):
        with pytest.raises(MinillmError, match=r"metrics.jsonl: cannot be written \(Is a directory\)"):
            Metrics(tmp_path, resumed=resumed)


def test_the_peak_of_memory_grows_with_what_is_taken() -> None:
    before = peak_memory("cpu")
    assert 5e7 < before < 1e12
    torch.ones(before // 4)  # as large again, and all of it touched
    assert peak_memory("cpu") > before + 5e7


def test_without_tensorboard_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from scripts.pretrain import Pretrain
    from scripts.sft import Sft

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for make in (
        lambda: Metrics(tmp_path, tensorboard=True),
        lambda: Pretrain(tensorboard=True),
        lambda: Sft(model="x", data=(), tensorboard=True),
    ):
        with pytest.raises(InputError, match=r"pip install tensorboard, or leave --tensorboard out"):
            make()


def test_the_same_numbers_for_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            told.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            told.append("closed")

    spec = types.ModuleType("tensorboard")
    spec.__spec__ = types.SimpleNamespace(name="tensorboard")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "tensorboard", spec)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    (tmp_path / "events.out.tfevents.1.old").touch()
    with Metrics(tmp_path, tensorboard=True) as metrics:
        assert not list(tmp_path.iterdir())
        metrics.write(1, loss=2.0, learning_rate=0.1)
    Metrics(tmp_path, tensorboard=True, resumed=1)
    folder = str(tmp_path)
    assert told == [(folder, None), ("loss", 2.0, 1), ("learning_rate", 0.1, 1), "closed", (folder, 2)]


def test_tensorboard_itself_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    need_tensorboard()
    fill(tmp_path, 3, tensorboard=True)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(each.step, each.value) for each in found.Scalars("loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
