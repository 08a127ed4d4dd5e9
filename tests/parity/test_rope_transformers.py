"""Positions against transformers: every stretching at the sizes of real checkpoints, partial rotary, ALiBi's slopes.

The frequencies are theirs to the last bit, but for yarn: we write its ramp the other way round (what is divided, not
what stays), and 1 - (1 - r) is one rounding away from r.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.checkpoint.llama import config_from_hf
from minillm.model.alibi import alibi_bias
from minillm.model.rope import Rotary, attention_factor, frequencies, rotate
from tests.decoders import config

transformers = pytest.importorskip("transformers", reason="the oracle; pip install minillm[test]")
pytestmark = pytest.mark.oracle

_7B = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 1}
_LONG_FACTORS = {
    "short_factor": [1.0 + 0.04 * i for i in range(48)],
    "long_factor": [1.0 + 1.3 * i for i in range(48)],
}

#: Fields of config.json as published, Phi-3's factors aside; which lengths to ask; how many ulp apart.
REAL: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    "llama_2_7b": ({**_7B, "max_position_embeddings": 4096}, (4096,), 0),
    "falcon_11b_theta": ({**_7B, "rope_theta": 500042.0, "max_position_embeddings": 8192}, (8192,), 0),
    "vicuna_7b_16k": (
        {**_7B, "max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}},
        (100, 16384),
        0,
    ),
    "dynamic": (
        {**_7B, "max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        (1, 2047, 2048, 2049, 3000, 8192),
        0,
    ),
    "llama_3.1_8b": (
        {
            **_7B,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        (8192, 131072),
        0,
    ),
    "yarn_llama_2_7b_64k": (
        {
            **_7B,
            "max_position_embeddings": 65536,
            "rope_scaling": {
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 4096,
                "finetuned": True,
            },
        },
        (4096, 65536),
        1,
    ),
    "phi_3_128k": (
        {
            "hidden_size": 3072,
            "num_attention_heads": 32,
            "num_hidden_layers": 1,
            "max_position_embeddings": 131072,
            "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4096, **_LONG_FACTORS},
        },
        (1, 4096, 4097, 131072),
        0,
    ),
}


def ulps_apart(found: Tensor, expected: Tensor) -> int:
    """Positive fp32 numbers in order are integers in order."""
    return int((found.view(torch.int32) - expected.view(torch.int32)).abs().max())


@pytest.mark.parametrize("name", REAL)
def test_frequencies_of_real_checkpoints(name: str) -> None:
    fields, lengths, ulps = REAL[name]
    theirs = transformers.LlamaConfig(**fields)
    ours = config_from_hf(theirs.to_dict(), name)
    kind = theirs.rope_parameters["rope_type"]
    for length in lengths:
        if kind == "default":
            rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
            expected, factor = rotary.compute_default_rope_parameters(theirs)
        else:
            expected, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", length)
        found = frequencies(ours, length)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert ulps_apart(found, expected) <= ulps, f"{length} tokens"
        assert attention_factor(ours) == factor


@pytest.mark.parametrize("name", [name for name, (_, _, ulps) in REAL.items() if ulps == 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cos_and_sin_bits(name: str, dtype: torch.dtype) -> None:
    """Through their module, whose state follows the lengths it has seen: short, the longest, short again."""
    fields, lengths, _ = REAL[name]
    theirs = transformers.LlamaConfig(**fields)
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    ours = Rotary(config_from_hf(theirs.to_dict(), name))
    for last in (10, max(lengths) - 1, 20):
        positions = torch.tensor([[0, 1, last // 2, last]])
        expected = module(torch.empty(0, dtype=dtype), positions)
        for found, reference in zip(ours(positions, dtype), expected, strict=True):
            assert torch.equal(found[:, 0], reference)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_partial_rotary_is_gpt_neox(share: float) -> None:
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

    theirs = transformers.GPTNeoXConfig(
        hidden_size=256,
        num_attention_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share},
    )
    shape = config(hidden_size=256, num_heads=8, num_kv_heads=8, head_size=32, rotary_size=int(32 * share))
    q, k = torch.randn(2, 2, 8, 5, 32)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 2000]])
    rotation = Rotary(shape)(positions, torch.float32)
    expected = apply_rotary_pos_emb(q, k, *GPTNeoXRotaryEmbedding(theirs)(q, positions))
    for x, reference in zip((q, k), expected, strict=True):
        assert torch.equal(rotate(x, *rotation), reference)
        assert torch.equal(rotate(x, *rotation)[..., int(32 * share) :], x[..., int(32 * share) :])


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 32, 64, 71, 112, 128])
def test_alibi_of_any_number_of_heads(heads: int) -> None:
    """Bitwise after the rounding to bf16, which both do. (Their fp32 slopes are powers of a rounded base.)"""
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    keep = torch.ones(2, 300, dtype=torch.bool)
    keep[0, :41] = False
    expected = build_alibi_tensor(keep.long(), heads, torch.float32).view(2, heads, 1, 300)
    found = alibi_bias((keep.long().cumsum(1) - 1) * keep, heads, 1, torch.float32)
    assert torch.equal(found, expected)
