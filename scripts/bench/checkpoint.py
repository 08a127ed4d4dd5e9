"""A random bf16 checkpoint of any size, written tensor by tensor: a 7B needs no more memory than its largest matrix.

    python checkpoint.py FOLDER SHAPE       SHAPE is JSON: family, layers, width, heads, kv_heads, ffn, vocab, outliers

Weights are normal with deviation 0.02, norms 1. In models of billions of parameters a few columns of activations are
far beyond the others (LLM.int8(), arXiv 2208.07339 §4: at most 7 of them); random weights have none. `outliers` makes
that many: the first weights of each norm in a block are 20, so that quantisers with a path for outliers take it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from minillm.checkpoint.families import family_of
from minillm.checkpoint.shards import save_checkpoint
from minillm.config import DecoderConfig
from minillm.model import Decoder

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "falcon": {
        "norm": "layer",
        "mlp": "plain",
        "activation": "gelu",
        "block": "parallel",
        "tied_embeddings": True,
    },
}


def config_of(shape: dict[str, Any]) -> DecoderConfig:
    """The sizes as a config."""
    return DecoderConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_size=shape["width"] // shape["heads"],
        ffn_size=shape["ffn"],
        context=2048,
        family=shape["family"],
        **FAMILIES[shape["family"]],
    )


def write(folder: Path, shape: dict[str, Any], seed: int = 0) -> None:
    """The checkpoint, in a folder that transformers loads."""
    config = config_of(shape)
    family = family_of(config.family, str(folder))
    with torch.device("meta"):
        parameters = dict(Decoder(config).to(torch.bfloat16).named_parameters())
    layout = {
        rule.theirs: rule.join([parameters[name] for name in rule.ours]) for rule in family.weight_map(config).rules
    }
    generator = torch.Generator().manual_seed(seed)

    def produce(key: str) -> torch.Tensor:
        wanted = layout[key]
        if wanted.ndim > 1:
            return torch.empty(wanted.shape, dtype=wanted.dtype).normal_(0, 0.02, generator=generator)
        vector = torch.full(wanted.shape, float(not key.endswith("bias")), dtype=wanted.dtype)
        if "layernorm" in key and not key.endswith("bias"):
            vector[: shape.get("outliers", 0)] = 20
        return vector

    ids = {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = json.dumps(family.config_to_hf(config) | {"torch_dtype": "bfloat16"} | ids, indent=2)
    save_checkpoint(layout, produce, folder, beside={"config.json": text})


if __name__ == "__main__":
    write(Path(sys.argv[1]), json.loads(sys.argv[2]))
