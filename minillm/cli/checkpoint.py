"""Flags of every command that takes a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional, UseAppendAction

from minillm.checkpoint.load import load_model
from minillm.checkpoint.resolve import resolve
from minillm.cli.terminal import NOTES
from minillm.data.tokenizer import Tokenizer
from minillm.model import Decoder


@dataclass
class Checkpoint:
    """Which model, and how to hold it."""

    model: Positional[str]
    """Hugging Face id (owner/name) or a folder in Hugging Face's or Meta's format."""
    revision: str | None = None
    """Branch, tag or commit of an id."""
    allow_pickle: bool = False
    """Read .bin and .pth weights too, with torch's restricted unpickler. Safetensors need no trust."""
    ignore: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A config.json field minillm does not know and you know to be harmless."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Loading(Checkpoint):
    """A model to run."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto keeps the checkpoint's own."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Round linear layers while they are read: int8 halves bf16's memory and time a token, nf4 quarters them."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1."""
    without: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A field of generation_config.json to do without, where minillm refuses what it asks for."""

    def load(self) -> tuple[Decoder, Tokenizer]:
        """Model and tokenizer, with a progress bar while weights are read."""
        folder = resolve(self.model, revision=self.revision, allow_pickle=self.allow_pickle)
        tokenizer = Tokenizer.load(folder)
        model = load_with_progress(
            folder,
            dtype=None if self.dtype == "auto" else self.dtype,
            device=self.device,
            quantize=None if self.quantize == "none" else self.quantize,
            allow_pickle=self.allow_pickle,
            ignore=self.ignore,
        )
        model.generation_defaults = {k: v for k, v in model.generation_defaults.items() if k not in self.without}
        return model, tokenizer


def load_with_progress(folder: Path, **options: Any) -> Decoder:
    """`load_model`, with a bar while weights are read."""
    columns = (TextColumn("reading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=NOTES, transient=True) as progress:
        task = progress.add_task("", total=None)
        return load_model(
            folder, report=lambda done, total: progress.update(task, completed=done, total=total), **options
        )
