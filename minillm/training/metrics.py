"""What a run measures, as lines of JSON in its folder, written while it trains.

    metrics.jsonl   {"step": 12, "seconds": 3.1, "tokens": 6144, "tokens_per_second": 2011, "loss": 5.1, ...}
                    {"step": 12, "held_out": 5.3}
    samples.jsonl   {"step": 12, "prompt": "2 + 3 =", "text": " 5", "wanted": " 5"}

Each line goes to the system in one write: a run that is killed loses the line it was writing, at the most. A run that
goes on from step N first drops the lines beyond N, in one rename, since it will write them again. `minillm plot` draws
the numbers, `minillm.training.history` reads them, and so does `pandas.read_json(file, lines=True)`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from minillm.atomic import write_atomically
from minillm.errors import InputError
from minillm.training import ranks

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
_EVENTS = "events.out.tfevents.*"  # what TensorBoard calls its files


class Metrics:
    """`with Metrics(folder) as metrics: metrics.write(step, tokens=..., loss=...)`.

    resumed: the step from which an earlier run goes on; None starts anew, and what an earlier run wrote is removed.
    tensorboard: write the same numbers for `tensorboard --logdir`. Of several ranks the first one alone writes.
    Raises InputError where the folder cannot be written, now or on a later line (the disk is full).
    """

    def __init__(self, folder: Path, *, resumed: int | None = None, tensorboard: bool = False) -> None:
        self._folder, self._tokens = folder, 0
        self._files: dict[str, BinaryIO] = {}
        for path in (folder / METRICS, folder / SAMPLES) if ranks.is_first() else ():
            with _written(path):
                if resumed is None:
                    path.unlink(missing_ok=True)
                elif path.exists():
                    kept = cut(path, resumed)
                    self._tokens = max([self._tokens, *(line.get("tokens", 0) for line in kept)])
        self._board = _board(folder, resumed) if tensorboard and ranks.is_first() else None
        self._mark = time.monotonic()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, *, tokens: int = 0, **figures: float) -> None:
        """A line of figures as `step` ends. One that is not finite is written as null, which JSON has.

        tokens: those of this step; the line has the sum over the run, and how many a second there were since the line
        before, so that a look at the held-out examples, which has a line of its own, does not count.
        """
        line = {"step": step, **figures}
        if tokens:
            self._tokens += tokens
            seconds = max(time.monotonic() - self._mark, 1e-9)
            line |= {"tokens": self._tokens, "tokens_per_second": round(tokens / seconds, 1)}
        self._append(METRICS, {name: value if math.isfinite(value) else None for name, value in line.items()})
        if self._board is not None:
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(name, value, step)

    def sample(self, step: int, **texts: str) -> None:
        """A line of samples.jsonl: what the model wrote, and after what."""
        self._append(SAMPLES, {"step": step, **texts})

    def _append(self, name: str, line: dict[str, Any]) -> None:
        path = self._folder / name
        if not ranks.is_first():
            return
        with _written(path):
            if name not in self._files:
                self._files[name] = open(path, "ab", buffering=0)  # noqa: SIM115  # until __exit__
            rest = memoryview((json.dumps(line) + "\n").encode())
            while rest:  # a disk that is nearly full takes a part, and refuses the next
                rest = rest[self._files[name].write(rest) :]
        self._mark = time.monotonic()


def cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines beyond `step`, and any that is half-written, atomically; returns those that stay.

    Raises OSError where it cannot be read, CheckpointError where the disk does not take it; it is untouched then.
    """
    before = path.read_bytes()
    lines = [(raw, _parsed(raw)) for raw in before.split(b"\n")]
    kept = [(raw, line) for raw, line in lines if line is not None and line["step"] <= step]
    after = b"".join(raw + b"\n" for raw, _ in kept)
    if after != before:
        write_atomically(path, after)
    return [line for _, line in kept if line is not None]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that `Metrics` wrote or writes; a last one that is not whole yet is left out.

    Raises InputError for a file that cannot be read, and for any other line that is no object with a step.
    """
    try:
        raws = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    lines = [_parsed(raw) for raw in raws]
    if lines[-1] is None:
        lines.pop()
    for number, line in enumerate(lines, 1):
        if line is None:
            raise InputError(f"{path}: line {number} is no JSON object with a step; delete that line")
    return [line for line in lines if line is not None]


def peak_memory(device: torch.device | str) -> int:
    """Bytes: the most that tensors took on a GPU; elsewhere the most that this process had resident, 0 if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not ru_maxrss, where the system has better: a process inherits that from the one that started it
        found = re.search(rb"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_bytes())
    except OSError:
        found = None
    if found:
        return 1024 * int(found[1])
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def need_tensorboard() -> None:
    """Raise InputError where TensorBoard's writer is not installed; before anything is trained."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("tensorboard is not installed: pip install tensorboard, or leave --tensorboard out")


def _board(folder: Path, resumed: int | None) -> Any:
    need_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    if resumed is None:
        for old in folder.glob(_EVENTS):
            old.unlink()
    return SummaryWriter(str(folder), purge_step=None if resumed is None else resumed + 1)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """The object of a line; None for one that is empty, half-written or no object with a step."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free space, or give another --output"
        ) from error
