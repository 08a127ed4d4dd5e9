"""`minillm plot`: how a run went or goes, and several beside each other, as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from minillm.cli.examine import check_folders
from minillm.errors import InputError
from minillm.training.history import X, read_histories
from minillm.training.picture import draw


@dataclass
class Plot:
    """Draw training runs: loss, held-out loss, learning rate, gradient norm, speed, memory, and what else they wrote.

    minillm plot runs/sft: one run, into runs/sft/curve.png; also while it trains

    minillm plot runs/rank4 runs/rank16 runs/rank64 --out ranks.png: several, a colour each

    minillm plot runs/* --x tokens: over the tokens seen, where the runs have batches of unequal size

    Reads metrics.jsonl, or training.json where a finished run has no other.
    """

    runs: Positional[tuple[Path, ...]]
    """Folders that pretrain.py, sft.py ... write to."""
    out: Path | None = None
    """The PNG to write; left out, curve.png in the run's folder, or curves.png here for several."""
    x: X = "step"
    """What runs along the x axis."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        if not self.runs:
            raise InputError("no run is given; name the folder of one or more")
        out = self.out or (self.runs[0] / "curve.png" if len(self.runs) == 1 else Path("curves.png"))
        if out.suffix.lower() != ".png":
            raise InputError(f"{out}: the picture is a PNG; give a name that ends in .png")
        histories = read_histories(self.runs, self.x)
        check_folders(out)
        draw(histories, out, x=self.x)
        Console(highlight=False).print(str(out), markup=False, soft_wrap=True)
