"""Tiny decoders built straight from a `DecoderConfig`: no files, no oracle."""

from __future__ import annotations

from typing import Any

import torch

from minillm.config import DecoderConfig
from minillm.model import Decoder

_LLAMA: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 8,
    "ffn_size": 48,
    "context": 64,
}
_FALCON = {"norm": "layer", "mlp": "plain", "activation": "gelu", "separate_bias": True}

#: One of each way to place tokens and to group heads.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "falcon": {**_FALCON, "block": "parallel", "num_kv_heads": 1, "tied_embeddings": True},
    "falcon_rw": {**_FALCON, "position": "alibi", "num_kv_heads": 4, "attention_bias": True, "mlp_bias": True},
    "grouped_alibi": {"position": "alibi"},
}


def config(**fields: Any) -> DecoderConfig:
    """A small Llama with some fields changed."""
    return DecoderConfig(**{**_LLAMA, **fields})


def decoder(seed: int = 0, **fields: Any) -> Decoder:
    """Random weights, drawn wide, and norms and biases too, so that every operation shows in the logits."""
    model = Decoder(config(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = float(parameter.ndim == 1 and name.endswith("weight"))
            parameter.normal_(mean, 0.3, generator=generator)
    return model
