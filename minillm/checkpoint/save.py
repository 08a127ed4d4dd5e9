"""A `Decoder` -> a folder that transformers (and minillm) loads: the same weight map, backwards.

    config.json              from DecoderConfig, in the dialect `config.family` names
    model.safetensors        or numbered shards and their index
    generation_config.json   what the model came with, if anything
    tokenizer files          if a tokenizer is given

Every file appears whole or not at all, and config.json after the weights it describes: a folder that has one is whole.
What an earlier model left in the folder and this one does not have is removed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minillm.checkpoint.families import family_of
from minillm.checkpoint.quantised import how_quantised, written_parts, written_quantisation
from minillm.checkpoint.shards import save_checkpoint
from minillm.checkpoint.weight_map import Rule
from minillm.errors import CheckpointError
from minillm.model import Decoder
from minillm.quant.convert import float_shapes

if TYPE_CHECKING:
    from minillm.data.tokenizer import Tokenizer

_SHARD_BYTES = 5 * 10**9  # transformers' default, below every hub's file limit


def save(
    model: Decoder,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write model (and tokenizer) to a folder, bitwise: loading it back gives every parameter with the same bits.

    Quantised layers are written as they are, in the form that transformers reads with bitsandbytes.
    Raises ConfigError where the format named by `model.config.family` has no such shape, and CheckpointError where a
    layer is neither float nor quantised (adapters are saved as adapters, or merged first).
    """
    folder = Path(folder)
    family = family_of(model.config.family, str(folder))
    config = family.config_to_hf(model.config)  # before anything is written: it may refuse
    rules = {rule.theirs: rule for rule in family.weight_map(model.config).rules}
    _check_complete(set(float_shapes(model)), {name for rule in rules.values() for name in rule.ours})
    how = how_quantised(model)
    layout: dict[str, Tensor] = {}
    owner: dict[str, Rule] = {}
    for rule in rules.values():
        parts = _written(model, rule, "meta")
        layout |= {name: x.to("meta") for name, x in parts.items()}
        owner |= dict.fromkeys(parts, rule)

    def produced(name: str) -> Tensor:
        return _written(model, owner[name], "cpu")[name].contiguous()

    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    ids = {name: model.generation_defaults.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    quantised = {} if how is None else {"quantization_config": written_quantisation(how, dtype)}
    beside = {"config.json": _json(config | {"torch_dtype": dtype} | ids | quantised)}
    if model.generation_defaults:
        beside["generation_config.json"] = _json(dict(model.generation_defaults))
    if tokenizer is not None:
        tokenizer.save(folder)
    save_checkpoint(layout, produced, folder, max_shard_bytes=max_shard_bytes, beside=beside)
    if not model.generation_defaults:
        (folder / "generation_config.json").unlink(missing_ok=True)


def _written(model: Decoder, rule: Rule, device: str) -> dict[str, Tensor]:
    """The tensors of one rule as the file has them: one, or a quantised weight with what belongs to it."""
    parts = written_parts(model, rule)
    if parts is not None:
        return parts
    return {rule.theirs: rule.join([model.get_parameter(name).detach().to(device) for name in rule.ours])}


def _check_complete(parameters: set[str], known: set[str]) -> None:
    odd = sorted(parameters ^ known)
    if odd:
        raise CheckpointError(
            f"parameter {odd[0]} has no place in the checkpoint format; merge adapters and dequantise before saving"
        )


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
