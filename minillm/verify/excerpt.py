"""Some layers of a checkpoint as a checkpoint of its own, for models that memory does not hold.

Layers a .. b - 1 become layers 0 .. b - a - 1; embedding, last norm and head stay. Nobody would generate with it, but
every operation in it has its own formula, so it verifies like the whole: layers 10:12 of a 70B need two layers' memory.
Both sides then load the excerpt with their real loaders.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minillm.checkpoint.families import read_json
from minillm.checkpoint.shards import open_checkpoint, save_checkpoint
from minillm.errors import InputError

_COUNTS = ("num_hidden_layers", "n_layer")
_KEY = re.compile(r"(.*?\b(?:layers|h)\.)(\d+)(\..*)")


class Layers(NamedTuple):
    """Layers first .. beyond - 1."""

    first: int
    beyond: int


def parse_layers(text: str) -> Layers:
    """`a:b` as in Python; InputError for anything else.

    >>> parse_layers("0:2")
    Layers(first=0, beyond=2)
    """
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise InputError(f"layers {text!r} is no range; write FIRST:BEYOND, like 0:2 for the first two")
    return Layers(int(found[1]), int(found[2]))


def write_excerpt(folder: Path, layers: Layers, target: Path, *, allow_pickle: bool = False) -> None:
    """Write those layers of `folder` to `target`, tensors as they are. InputError where it has no such layers."""
    config = _shorter(read_json(folder / "config.json"), layers, folder)
    with open_checkpoint(folder, allow_pickle=allow_pickle) as files:
        names = {new: old for old in files.keys() if (new := _renamed(old, layers)) is not None}  # noqa: SIM118
        layout = {
            new: torch.empty(files.shape(old), dtype=files.dtype(old), device="meta") for new, old in names.items()
        }
        beside = {"config.json": json.dumps(config)}
        save_checkpoint(layout, lambda new: files.read(names[new]), target, beside=beside)


def _shorter(config: dict[str, Any], layers: Layers, folder: Path) -> dict[str, Any]:
    counted = next((name for name in _COUNTS if isinstance(config.get(name), int)), None)
    if counted is None:
        raise InputError(f"{folder / 'config.json'}: does not say how many layers there are; verify it whole")
    if layers.beyond > config[counted]:
        raise InputError(f"{folder} has layers 0:{config[counted]}; {layers.first}:{layers.beyond} is not in there")
    kinds = config.get("layer_types")
    changed: dict[str, Any] = {counted: layers.beyond - layers.first}
    if isinstance(kinds, list):
        changed["layer_types"] = kinds[layers.first : layers.beyond]
    return {**config, **changed}


def _renamed(key: str, layers: Layers) -> str | None:
    """The key in the excerpt; None for another layer's.

    >>> _renamed("model.layers.7.mlp.up_proj.weight", Layers(6, 8)), _renamed("h.5.ln_attn.bias", Layers(6, 8))
    ('model.layers.1.mlp.up_proj.weight', None)
    """
    found = _KEY.fullmatch(key)
    if found is None:
        return key
    layer = int(found[2])
    return f"{found[1]}{layer - layers.first}{found[3]}" if layers.first <= layer < layers.beyond else None
