"""`minillm adapter`: what is in an adapter's folder, and whether it fits a model."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

from rich.console import Console
from tyro.conf import Positional

from minillm.atomic import write_atomically
from minillm.checkpoint.families import read_json
from minillm.checkpoint.load import load_model
from minillm.cli.examine import check_folders
from minillm.lora import describe as of_lora
from minillm.prompt import describe as of_prompt


@dataclass
class Adapter:
    """Ranks, scales and the spectrum of what an adapter (peft's format) adds to each weight; lengths and spectrum of
    the virtual tokens of prompt tuning, P-tuning and prefix tuning.

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
        is_prompt = of_prompt.is_prompt(read_json(self.folder / of_prompt.CONFIG))
        kind: Any = of_prompt if is_prompt else of_lora  # modules of one form
        found = kind.describe(self.folder, None if self.base is None else load_model(self.base))
        Console(highlight=False).print(kind.tables(found, self.folder))
        if self.json is not None:
            write_atomically(self.json, dumps(found.as_json(), indent=1) + "\n")
