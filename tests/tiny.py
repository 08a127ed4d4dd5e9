"""Tiny random models of every variant, made and saved by transformers, so that our real loader reads their files.

Nothing here is trained; weights are drawn wide, and norms and biases too, so that every operation shows in the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SIZES = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.15, **_NO_IDS}
_LLAMA = {**_SIZES, "num_attention_heads": 8, "intermediate_size": 96, "max_position_embeddings": 128}
_FALCON = {**_SIZES, "num_attention_heads": 8, "max_position_embeddings": 128}


@dataclass(frozen=True)
class Variant:
    """One shape of one family: transformers' config class and its arguments."""

    family: str
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def length_dependent(self) -> bool:
        """Whether rotary frequencies change with the longest row, so that cached and uncached runs may differ."""
        return self.fields.get("rope_parameters", {}).get("rope_type") in ("dynamic", "longrope")


def _llama(**fields: Any) -> Variant:
    return Variant("Llama", {**_LLAMA, **fields})


def _falcon(**fields: Any) -> Variant:
    return Variant("Falcon", {**_FALCON, **fields})


def _rope(kind: str, theta: float = 500.0, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


_ROPES: dict[str, dict[str, Any]] = {
    "theta": _rope("default", 1e6),
    "linear": _rope("linear", factor=4.0),
    "dynamic": _rope("dynamic", factor=2.0) | {"max_position_embeddings": 64},
    "llama3": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=32),
    "yarn_betas": _rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=8.0, beta_slow=2.0),
    "yarn_mscale": _rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.3),
    "yarn_factor": _rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=0.8),
    "yarn_untruncated": _rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False),
    "longrope": _rope(
        "longrope",
        original_max_position_embeddings=48,
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[2.0, 3.0, 5.0, 8.0],
    ),
    "longrope_factor": _rope(
        "longrope",
        factor=3.0,
        attention_factor=1.1,
        original_max_position_embeddings=48,
        short_factor=[1.0] * 4,
        long_factor=[4.0] * 4,
    ),
}

_GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
_RW = {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}

VARIANTS: dict[str, Variant] = {
    "llama_mha": _llama(),
    "llama_gqa_8_4": _llama(num_key_value_heads=4),
    "llama_gqa_8_2": _llama(num_key_value_heads=2),
    "llama_mqa": _llama(num_key_value_heads=1),
    "llama_one_head": _llama(num_attention_heads=1, num_key_value_heads=1, head_dim=16),
    "llama_head_dim": _llama(num_key_value_heads=2, head_dim=24),
    "llama_wide_heads": _llama(num_attention_heads=4, num_key_value_heads=2, head_dim=32),
    "llama_attention_bias": _llama(num_key_value_heads=4, attention_bias=True),
    "llama_mlp_bias": _llama(mlp_bias=True),
    "llama_all_bias": _llama(attention_bias=True, mlp_bias=True),
    "llama_tied": _llama(tie_word_embeddings=True),
    "llama_eps": _llama(rms_norm_eps=1e-3),
    "llama_gelu": _llama(hidden_act="gelu"),
    "llama_gelu_tanh": _llama(hidden_act="gelu_pytorch_tanh"),
    "llama_relu": _llama(hidden_act="relu"),
    "llama_one_layer": _llama(num_hidden_layers=1),
    "llama_deep": _llama(num_hidden_layers=5, num_key_value_heads=2),
    **{f"llama_rope_{name}": _llama(num_key_value_heads=2, **fields) for name, fields in _ROPES.items()},
    "mistral": Variant("Mistral", {**_LLAMA, "num_key_value_heads": 2, "sliding_window": None}),
    "mistral_head_dim": Variant(
        "Mistral", {**_LLAMA, "num_key_value_heads": 4, "head_dim": 20, "sliding_window": None}
    ),
    "mistral_long_window": Variant("Mistral", {**_LLAMA, "num_key_value_heads": 4, "sliding_window": 128}),
    "falcon_7b": _falcon(),
    "falcon_7b_untied": _falcon(tie_word_embeddings=False),
    "falcon_7b_bias": _falcon(bias=True),
    "falcon_7b_sequential": _falcon(parallel_attn=False),
    "falcon_7b_alibi": _falcon(alibi=True),
    "falcon_40b": _falcon(**_GROUPED),
    "falcon_40b_untied": _falcon(**_GROUPED, tie_word_embeddings=False),
    "falcon_40b_bias": _falcon(**_GROUPED, bias=True),
    "falcon_40b_one_kv": _falcon(new_decoder_architecture=True, num_kv_heads=1),
    "falcon_40b_all_kv": _falcon(new_decoder_architecture=True),
    "falcon_11b": _falcon(**_GROUPED, num_ln_in_parallel_attn=1, tie_word_embeddings=False, **_rope("default", 5e5)),
    "falcon_11b_ffn": _falcon(**_GROUPED, num_ln_in_parallel_attn=1, ffn_hidden_size=80),
    "falcon_rw": _falcon(**_RW),
    "falcon_rw_odd_heads": _falcon(**_RW | {"num_attention_heads": 6, "hidden_size": 48}),
    "falcon_rw_untied": _falcon(**_RW, tie_word_embeddings=False),
    "falcon_rw_rotary": _falcon(**_RW | {"alibi": False}),
    "falcon_rw_parallel": _falcon(**_RW | {"parallel_attn": True, "alibi": False}),
    "falcon_rope_linear": _falcon(**_rope("linear", factor=2.0)),
    "falcon_rope_yarn": _falcon(**_GROUPED, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "falcon_gelu_tanh": _falcon(activation="gelu_pytorch_tanh"),
}


def build(variant: Variant, seed: int = 0) -> Any:
    """A transformers model of the variant in eval mode, attention through sdpa (its eager ALiBi is wrong)."""
    import transformers

    config = getattr(transformers, f"{variant.family}Config")(**variant.fields)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{variant.family}ForCausalLM")._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(float("norm" in name or "ln_" in name) * float(name.endswith("weight")), 0.3)
    return model.eval()


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Their own `save_pretrained`."""
    model.save_pretrained(folder, **options)
    return folder


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random ids (rows, length) int64 of the variants' vocabulary."""
    return torch.randint(131, (rows, length), generator=torch.Generator().manual_seed(seed))
