"""Published config.json files: transformers' reading of them, written out in full, is ours.

transformers fills in every default and respells the rotary fields (`rope_parameters`). Reading that back must give the
`DecoderConfig` that the file itself gives, and its attributes must be our fields.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minillm.config import DecoderConfig, Llama3Rope
from minillm.model.rope import frequencies
from tests import tiny
from tests.unit.test_hf_config import PUBLIC, parse

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

#: Attribute of their config -> ours. FalconConfig has no attribute that says its key/value heads: see the test below.
LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_size",
    "intermediate_size": "ffn_size",
    "max_position_embeddings": "context",
    "rms_norm_eps": "norm_eps",
    "hidden_act": "activation",
    "tie_word_embeddings": "tied_embeddings",
}
FALCON_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "head_size",
    "ffn_hidden_size": "ffn_size",
    "max_position_embeddings": "context",
    "layer_norm_epsilon": "norm_eps",
    "activation": "activation",
    "bias": "mlp_bias",
    "tie_word_embeddings": "tied_embeddings",
}


def their_reading(raw: dict[str, Any]) -> Any:
    return transformers.AutoConfig.for_model(**raw)


def assert_same_fields(theirs: Any, ours: DecoderConfig) -> None:
    for name, field in (FALCON_FIELDS if ours.family == "falcon" else LLAMA_FIELDS).items():
        value = getattr(theirs, name, None)
        if name == "head_dim" and value is None:  # Mistral leaves it out
            continue
        assert {"gelu_pytorch_tanh": "gelu_tanh"}.get(value, value) == getattr(ours, field), name
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models(name: str) -> None:
    raw, expected = PUBLIC[name]
    theirs = their_reading(raw)
    assert_same_fields(theirs, expected)
    assert parse({**theirs.to_dict(), "ff_factor": None}) == expected


@pytest.mark.parametrize("name", ["falcon-7b", "falcon-40b", "falcon-11B", "falcon-rw-1b"])
def test_falcon_attention(name: str) -> None:
    """Key/value heads, norms and biases as their layers have them, at a width that can be built."""
    raw, expected = PUBLIC[name]
    heads = 4 * expected.num_kv_heads if expected.heads_per_group > 1 else 8
    small = {**raw, "hidden_size": 8 * heads, "num_attention_heads": heads, "num_hidden_layers": 1}
    small |= {"vocab_size": 11, "ffn_hidden_size": 32 * heads}
    layer = transformers.FalconForCausalLM(their_reading(small)).transformer.h[0]
    ours = parse({**small, "ff_factor": None})
    rows = (ours.num_heads + 2 * ours.num_kv_heads) * ours.head_size
    assert tuple(layer.self_attention.query_key_value.weight.shape) == (rows, ours.hidden_size)
    assert (layer.self_attention.query_key_value.bias is not None) == ours.attention_bias
    assert hasattr(layer, "ln_mlp") == (ours.parallel_norms == 2)
    assert hasattr(layer, "post_attention_layernorm") == (ours.block == "sequential")


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_saved_and_respelt_configs(name: str) -> None:
    """What transformers writes for every variant, in its full and in its short form."""
    variant = tiny.VARIANTS[name]
    theirs = getattr(transformers, f"{variant.family}Config")(**variant.fields)
    full, short = parse(theirs.to_dict()), parse(theirs.to_diff_dict())
    assert full == short
    assert_same_fields(theirs, full)


def test_the_outer_trained_length_counts() -> None:
    """`original_max_position_embeddings` stands inside the scaling, or beside it (Phi-3): the outer one wins.

    Not yet in their config, but in the model built from it.
    """
    raw = {**tiny.VARIANTS["llama_rope_llama3"].fields, "model_type": "llama", "original_max_position_embeddings": 16}
    ours = parse(raw)
    assert isinstance(ours.rope_scaling, Llama3Rope) and ours.rope_scaling.original_context == 16
    theirs = transformers.LlamaForCausalLM(their_reading(raw))
    assert torch.equal(theirs.model.rotary_emb.inv_freq, frequencies(ours, ours.context))


def test_defaults_are_theirs() -> None:
    """A config.json that says nothing but its type (and the sizes we insist on) means their class's defaults."""
    for family in ("Llama", "Mistral", "Falcon"):
        theirs = getattr(transformers, f"{family}Config")()
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
        bare = {"model_type": theirs.model_type} | {
            size: getattr(theirs, size) for size in sizes if hasattr(theirs, size)
        }
        if family == "Mistral":
            bare["sliding_window"] = None  # their default, 4096, is refused
            theirs.sliding_window = None
        assert parse(bare) == parse(theirs.to_dict()), family
