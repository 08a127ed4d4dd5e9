"""`minillm adapter`: what is in an adapter's folder, and whether it fits a model."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from minillm.atomic import write_atomically
from minillm.checkpoint.load import load_model
from minillm.cli.examine import check_folders
from minillm.lora.describe import describe, tables


@dataclass
class Adapter:
    """Ranks, scales and the spectrum of what an adapter (peft's format) adds to each weight.

    minillm adapter FOLDER: from its files alone

    minillm adapter FOLDER --base MODEL: also whether every key and shape fits, and how large each change is beside its
    weight
    """

    folder: Positional[Path]
    """Where adapter_config.json and adapter_model.safetensors are."""
    base: str | None = None
    """Folder or id of the model that the adapter belongs to."""
    json: Path | None = None
    """Write what was found as JSON."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        check_folders(self.json)
        found = describe(self.folder, None if self.base is None else load_model(self.base))
        Console(highlight=False).print(tables(found, self.folder))
        if self.json is not None:
            write_atomically(self.json, dumps(found.as_json(), indent=1) + "\n")
