"""`minillm outliers`: which columns LLM.int8() keeps in floating point, where they are and which tokens raise them."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from minillm.atomic import write_atomically
from minillm.cli.checkpoint import Loading
from minillm.cli.examine import check_folders, progress
from minillm.data.tokenizer import Tokenizer
from minillm.errors import InputError
from minillm.model import Decoder
from minillm.ops.int8 import THRESHOLD
from minillm.quant.outlier_picture import draw
from minillm.quant.outlier_table import describe
from minillm.quant.outliers import find
from minillm.quant.plant import plant

_ROW = 256  # tokens that are one call
_SWEEP = tuple(float(threshold) for threshold in range(2, 13))


@dataclass
class Outliers(Loading):
    """Which columns of activations are outliers: LLM.int8() keeps those in floating point.

    minillm outliers FOLDER --text README.md --sweep --png outliers.png

    minillm outliers FOLDER --plant 64: outliers put into a model that has none, its outputs unchanged
    """

    text: Path | None = None
    """UTF-8 text to run; without one, random tokens, which raise fewer outliers than text does."""
    tokens: int = 1024
    """How many tokens to run, in rows of 256: the first of the text, or random ones."""
    threshold: float = THRESHOLD
    """|x| from which a number is an outlier."""
    sweep: bool = False
    """Also try thresholds from 2 to 12 on every linear: what is kept, and the error left."""
    plant: float | None = None
    """First make some channels this many times as large, and the weights that read them as much smaller."""
    channels: int = 6
    """How many channels --plant takes, the same in every layer."""
    seed: int = 0
    """Of random tokens and planted channels."""
    json: Path | None = None
    """Write everything as JSON."""
    png: Path | None = None
    """Draw shares by layer and projection, and sizes."""

    def run(self) -> None:
        check_folders(self.json, self.png)
        if self.tokens < 1:
            raise InputError(f"tokens is {self.tokens}; give 1 or more")
        model, tokenizer = self.load()
        rows = self._rows(model, tokenizer)
        if self.plant is not None:
            plant(model, self.plant, channels=self.channels, seed=self.seed)
        with progress() as tell:
            found = find(
                model,
                rows,
                threshold=self.threshold,
                sweep=_SWEEP if self.sweep else (),
                report=lambda done, total: tell("running the text", done, total),
            )
        about = self._about(rows)
        Console(highlight=False).print(describe(found, about, lambda token: _spell(tokenizer, token)))
        if self.json is not None:
            write_atomically(self.json, dumps({"about": about, **found.as_json()}, indent=1) + "\n")
        if self.png is not None:
            draw(found, self.png, about)

    def _rows(self, model: Decoder, tokenizer: Tokenizer) -> Tensor:
        """(B, T) int64. What does not fill a row is left out, unless it is all there is."""
        if self.text is None:
            generator = torch.Generator().manual_seed(self.seed)
            vocabulary = min(len(tokenizer), model.config.vocab_size)  # a model may have rows that are no token
            ids = torch.randint(vocabulary, (self.tokens,), generator=generator)
        else:
            try:
                text = self.text.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{self.text}: not a readable UTF-8 file ({error})") from error
            ids = torch.tensor(tokenizer.encode(text)[: self.tokens], dtype=torch.int64)
            if not len(ids):
                raise InputError(f"{self.text}: holds no text; give another file")
        length = min(_ROW, model.config.longest, len(ids))
        return ids[: len(ids) // length * length].view(-1, length)

    def _about(self, rows: Tensor) -> str:
        text = "random tokens" if self.text is None else f"tokens of {self.text.name}"
        planted = "" if self.plant is None else f", {self.channels} channels planted x {self.plant:g}"
        return f"{self.model}, {rows.numel():,} {text}{planted}"


def _spell(tokenizer: Tokenizer, token: int) -> str:
    try:
        return tokenizer.token(token)
    except InputError:  # an id beyond the tokenizer's
        return "?"
