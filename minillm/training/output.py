"""The folder that a run writes to, and whether a run may.

    config.json, adapter_config.json     a finished model or adapter lies here (written last)
    state.safetensors                    an unfinished run lies here
    best.safetensors                     beside it, what was trained when the held-out loss was least

A run never touches an earlier one unless it is told to continue it or to start anew; and then not before its own data
and model are there (`clear`), so that a slip of the pen costs nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.atomic import remove_abandoned
from minillm.checkpoint.load import load_model
from minillm.checkpoint.save import save
from minillm.data.tokenizer import Tokenizer
from minillm.errors import CheckpointError, InputError
from minillm.model import Decoder

FINISHED = ("config.json", "adapter_config.json")
STATE = "state.safetensors"
BEST = "best.safetensors"

#: Fields that may differ between a run and its continuation: they change where it goes, not what it computes.
_FREE = ("output", "resume", "overwrite")


def claim(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make `folder`, if need be. Raises InputError where it holds a run that neither flag says what to do with."""
    finished, state = [folder / name for name in FINISHED], folder / STATE
    is_finished = any(file.is_file() for file in finished)
    if resume and not state.is_file():
        reason = "a finished run" if is_finished else "no unfinished run"
        raise InputError(f"{folder}: holds {reason}, so there is nothing to resume; leave --resume out")
    if not (resume or overwrite) and state.is_file():
        raise InputError(f"{folder}: holds an unfinished run; give --resume to go on, --overwrite to start anew")
    if not (resume or overwrite) and is_finished:
        raise InputError(f"{folder}: holds a finished run; give --overwrite to start anew, or another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)  # a killed run's half-written state would fill the disk until something is saved
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --output") from error


def clear(folder: Path) -> None:
    """Take away what makes `folder` an earlier run's: a new one begins."""
    for name in (*FINISHED, STATE, BEST):
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{folder / name}: cannot be removed ({error.strerror}); give another --output") from error


def comparable(recipe: Any, *, free: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a recipe (a dataclass) that a continued run must share, as JSON holds them."""
    fields = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in {*_FREE, *free}}
    return dict(json.loads(json.dumps(fields, default=str)))


def check_same(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Raise InputError, naming the first field in which a continued run differs from its beginning."""
    for name, value in now.items():
        if value != then.get(name):
            raise InputError(f"--resume: {name} is {value}, the run began with {then.get(name)}; give that again")


@torch.inference_mode()
def save_checked(model: Decoder, folder: Path, *, tokenizer: Tokenizer, tokens: Tensor) -> None:
    """Save; raises CheckpointError unless what is loaded back gives the same logits for tokens (B, T), bit for bit."""
    save(model, folder, tokenizer=tokenizer)
    if not torch.equal(load_model(folder)(tokens), model.eval()(tokens)):
        raise CheckpointError(f"{folder}: the model loaded back gives other logits than the one saved; check the disk")
