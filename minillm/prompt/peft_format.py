"""Prompts on disk as peft writes them, both ways.

    adapter_config.json          minillm.prompt.peft_config
    adapter_model.safetensors    prompt_embeddings (P, D), of a prefix (P, 2 L N E): what the encoder has made

The encoder is not in the file, so a prompt that was loaded is trained as its plain values (peft refuses to train one at
all). Source: peft/utils/save_and_load.py, tuners_utils.py `BasePromptEncoder` (0.21).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.atomic import write_atomically
from minillm.checkpoint.families import read_json
from minillm.checkpoint.tensor_file import SafetensorsFile
from minillm.config import DecoderConfig
from minillm.errors import CheckpointError, NumericsError, nearest
from minillm.model import Decoder
from minillm.prompt.config import PromptConfig
from minillm.prompt.peft_config import check_base, from_peft, to_peft
from minillm.prompt.prompted import Prompted, check
from minillm.prompt.virtual import Virtual, sizes

CONFIG, WEIGHTS, KEY = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


def save(prompted: Prompted, folder: str | os.PathLike[str], *, base: str = "") -> None:
    """Write a prompt as a folder that peft loads; base: the id or folder of the model it belongs to."""
    folder, config, values = Path(folder), prompted.settings, prompted.prompt.finished()
    model, heads = prompted.base.config, prompted.base.config.num_heads
    if not bool(torch.isfinite(values).all()):
        raise NumericsError("the prompt has NaN or infinite numbers and is not saved; train it again, more slowly")
    if config.kind == "prefix":
        heads = values.shape[1] // (2 * model.num_layers * model.head_size)
    settings = to_peft(config, model, heads=heads, base=base)
    from safetensors.torch import save as safetensors_bytes  # here, as importing minillm shall cost little

    folder.mkdir(parents=True, exist_ok=True)
    plain = {KEY: values.cpu().contiguous().clone()}
    write_atomically(folder / WEIGHTS, safetensors_bytes(plain, {"format": "pt"}))
    write_atomically(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load(model: Decoder, folder: str | os.PathLike[str], *, trainable: bool = False) -> Prompted:
    """A prompt that peft or `save` wrote, before the model, which is frozen.

    trainable: go on training it; else it is frozen too. Raises CheckpointError naming fields, keys and shapes that do
    not fit; the model is then what it was.
    """
    raw, config, values = read(Path(folder))
    check(model, config)
    check_fit(raw, config, values, model.config, Path(folder))
    model.requires_grad_(False)
    prompt = Virtual(values.float().to(model.embed.weight.device)).requires_grad_(trainable)
    return Prompted(model, config, prompt)


def check_fit(raw: Mapping[str, Any], config: PromptConfig, values: Tensor, model: DecoderConfig, folder: Path) -> None:
    """CheckpointError where a prompt that was read is not this model's."""
    heads = check_base(raw, model, config.kind, str(folder / CONFIG))
    width = sizes(model, config.kind, heads)[1]
    if values.shape[1] != width:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {KEY} has shape {tuple(values.shape)}, and this model asks for "
            f"{config.tokens, width}; the adapter belongs to another base model"
        )


def read(folder: Path) -> tuple[dict[str, Any], PromptConfig, Tensor]:
    """The file's fields, the settings, and the values (P, W), checked as far as they can be without the model."""
    raw = read_json(folder / CONFIG)
    config = from_peft(raw, str(folder / CONFIG))
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {WEIGHTS}; save the adapter as safetensors")
    file = SafetensorsFile(path)
    try:
        if set(file.layout) != {KEY}:
            wrong = next((key for key in file.layout if key != KEY), "nothing")
            raise CheckpointError(f"{path}: holds {wrong}{nearest(KEY, file.layout)}; a prompt is {KEY} alone")
        values = file.read(KEY)
    finally:
        file.close()
    if not values.is_floating_point():
        raise CheckpointError(f"{path}: {KEY} is {values.dtype}; prompts are in floating point, save it again")
    if values.ndim != 2 or len(values) != config.tokens or not values.numel():
        raise CheckpointError(
            f"{path}: {KEY} has shape {tuple(values.shape)}, and {CONFIG} says {config.tokens} virtual tokens; "
            "the two do not belong together"
        )
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{path}: {KEY} has NaN or infinite numbers; the training that wrote it had failed")
    return raw, config, values
