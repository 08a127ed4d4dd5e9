"""`minillm info`, `minillm verify`, `minillm doctor`: what is there, and whether it is right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from minillm.atomic import write_atomically
from minillm.checkpoint.resolve import resolve
from minillm.cli.checkpoint import Checkpoint
from minillm.cli.terminal import NOTES
from minillm.doctor import describe as diagnosis_table
from minillm.doctor import examine
from minillm.errors import InputError
from minillm.info import describe
from minillm.verify.checkpoints import Settings, verify
from minillm.verify.excerpt import parse_layers
from minillm.verify.heatmap import draw
from minillm.verify.run import Tell
from minillm.verify.table import describe as verification_table


@dataclass
class Info(Checkpoint):
    """Parameters, memory by number format, and what the key/value cache costs; reads no weights."""

    def run(self) -> None:
        folder = resolve(self.model, revision=self.revision, weights=False, allow_pickle=self.allow_pickle)
        Console(highlight=False).print(describe(folder, self.model, self.allow_pickle, self.ignore))


@dataclass
class Verify(Checkpoint):
    """Name the first operation that differs from transformers, or from another run, and why.

    minillm verify FOLDER: against transformers on the same folder

    minillm verify FOLDER --layers 0:2: two layers of a model too large for memory

    minillm verify FOLDER --against OTHER: against another folder of the same shape

    minillm verify FOLDER --save-trace then.trace, and later or elsewhere minillm verify FOLDER --against then.trace

    Every operation is held against its formula in float64. Exit status: 0 all within rounding, 1 a fault, 2 bad input.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format to run in; auto is the checkpoint's own."""
    tokens: int = 32
    """Length of the text, random tokens; a second row has a quarter of padding."""
    layers: str | None = None
    """FIRST:BEYOND, verify only these layers: 0:2 the first two."""
    against: str | None = None
    """Instead of transformers: a folder or id that minillm loads too, or a trace it saved."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """How transformers computes attention."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1."""
    gradients: bool = False
    """Also run backward, and verify every gradient."""
    full: bool = False
    """Show every operation of every layer."""
    json: Path | None = None
    """Write the report as JSON."""
    png: Path | None = None
    """Draw errors by layer and operation."""
    save_trace: Path | None = None
    """Keep our run for a later --against."""

    def run(self) -> int:
        check_folders(self.json, self.png, self.save_trace)
        settings = Settings(
            dtype=None if self.dtype == "auto" else self.dtype,
            tokens=self.tokens,
            layers=None if self.layers is None else parse_layers(self.layers),
            attention=self.attention,
            device=self.device,
            gradients=self.gradients,
            allow_pickle=self.allow_pickle,
            ignore=self.ignore,
        )
        folder = resolve(self.model, revision=self.revision, allow_pickle=self.allow_pickle)
        with progress() as tell:
            report = verify(folder, settings, against=self.against, save_trace=self.save_trace, tell=tell)
        Console(highlight=False).print(verification_table(report, full=self.full))
        if self.json is not None:
            write_atomically(self.json, dumps(report.as_json(), indent=1) + "\n")
        if self.png is not None:
            draw(report, self.png)
        return 0 if report.verdict == "equal" else 1


@dataclass
class Doctor:
    """What is installed and active, each kernel's self-test, and its speed against the plain torch operation."""

    json: Path | None = None
    """Write what was found as JSON."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> int:
        check_folders(self.json)
        with progress() as tell:
            found = examine(tell)
        Console(highlight=False).print(diagnosis_table(found))
        if self.json is not None:
            write_atomically(self.json, dumps(found.as_json(), indent=1) + "\n")
        return 0 if found.healthy else 1


def check_folders(*files: Path | None) -> None:
    """InputError for a file to write whose folder is missing, before the work is done."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise InputError(f"{file}: there is no folder {file.parent}; make it first")


@contextmanager
def progress() -> Iterator[Tell]:
    """A bar that shows what is going on, how much of it is done, and the time left where that is known."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=NOTES, transient=True) as bars:
        task = bars.add_task("", total=None)
        before = ""

        def tell(what: str, done: int = 0, total: int | None = None) -> None:
            nonlocal before
            if what != before:
                bars.reset(task, total=total, description=what)
                before = what
            bars.update(task, completed=done, total=total)

        yield tell
