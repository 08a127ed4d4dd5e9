"""config.json of well-known models -> DecoderConfig, their first names and every spelling of a scaling too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minillm.checkpoint import falcon, llama
from minillm.checkpoint.families import family_of
from minillm.checkpoint.hf_config import write_rope
from minillm.config import DecoderConfig, DynamicRope, LinearRope, Llama3Rope, LongRope, RopeScaling, YarnRope
from minillm.errors import ConfigError

_COMMON = {"initializer_range": 0.02, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True}
_LLAMA_2 = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_LLAMA_3 = {
    **_LLAMA_2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_LLAMA_3_1 = {
    **_LLAMA_3,
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
_MISTRAL = {
    **_COMMON,
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_FALCON_7B = {
    **_COMMON,
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "vocab_size": 65024,
}
_FALCON_40B = {
    **_FALCON_7B,
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
_FALCON_RW_1B = {
    **_FALCON_7B,
    "alibi": True,
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 2048,
    "multi_query": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "parallel_attn": False,
    "vocab_size": 50304,
}
_FALCON_11B = {
    **_FALCON_40B,
    "activation": "gelu",
    "ff_factor": 4,
    "ffn_hidden_size": 16384,
    "hidden_size": 4096,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_ln_in_parallel_attn": 1,
    "rope_scaling": None,
    "rope_theta": 500042.0,
    "tie_word_embeddings": False,
}

_OUR_LLAMA_2 = DecoderConfig(
    vocab_size=32_000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    ffn_size=11_008,
    context=4096,
)
_OUR_LLAMA_3 = replace(
    _OUR_LLAMA_2, vocab_size=128_256, num_kv_heads=8, ffn_size=14_336, context=8192, rope_theta=500_000.0
)
_OUR_LLAMA_3_1 = replace(
    _OUR_LLAMA_3,
    context=131_072,
    rope_scaling=Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
)
_OUR_MISTRAL = replace(
    _OUR_LLAMA_2, num_kv_heads=8, ffn_size=14_336, context=32_768, rope_theta=1_000_000.0, family="mistral"
)
_OUR_FALCON_7B = DecoderConfig(
    vocab_size=65_024,
    hidden_size=4544,
    num_layers=32,
    num_heads=71,
    num_kv_heads=1,
    head_size=64,
    ffn_size=18_176,
    context=2048,
    norm="layer",
    mlp="plain",
    activation="gelu",
    block="parallel",
    tied_embeddings=True,
    family="falcon",
)
_OUR_FALCON_40B = replace(
    _OUR_FALCON_7B,
    hidden_size=8192,
    num_layers=60,
    num_heads=128,
    num_kv_heads=8,
    ffn_size=32_768,
    parallel_norms=2,
)

#: Facts of published config.json files, and what each must become.
PUBLIC: dict[str, tuple[dict[str, Any], DecoderConfig]] = {
    "Llama-2-7b": (_LLAMA_2, _OUR_LLAMA_2),
    "Llama-3-8B": (_LLAMA_3, _OUR_LLAMA_3),
    "Llama-3.1-8B": (_LLAMA_3_1, _OUR_LLAMA_3_1),
    "Llama-3.2-1B": (
        {
            **_LLAMA_3_1,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "rope_scaling": {**_LLAMA_3_1["rope_scaling"], "factor": 32.0},
            "tie_word_embeddings": True,
        },
        replace(
            _OUR_LLAMA_3_1,
            hidden_size=2048,
            num_layers=16,
            head_size=64,
            ffn_size=8192,
            rope_scaling=replace(_OUR_LLAMA_3_1.rope_scaling, factor=32.0),
            tied_embeddings=True,
        ),
    ),
    "CodeLlama-7b": (
        {**_LLAMA_2, "max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016},
        replace(_OUR_LLAMA_2, context=16_384, rope_theta=1_000_000.0, vocab_size=32_016),
    ),
    "TinyLlama-1.1B": (
        {
            **_LLAMA_2,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 2048,
            "num_hidden_layers": 22,
            "num_key_value_heads": 4,
        },
        replace(
            _OUR_LLAMA_2, hidden_size=2048, ffn_size=5632, context=2048, num_layers=22, num_kv_heads=4, head_size=64
        ),
    ),
    "vicuna-7b-v1.5-16k": (
        {
            **_LLAMA_2,
            "max_sequence_length": 16384,
            "pad_token_id": 0,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
        },
        replace(_OUR_LLAMA_2, rope_scaling=LinearRope(4.0)),
    ),
    "Mistral-7B-v0.2": (_MISTRAL, _OUR_MISTRAL),
    "Mistral-7B-v0.3": ({**_MISTRAL, "vocab_size": 32768}, replace(_OUR_MISTRAL, vocab_size=32_768)),
    "falcon-7b": (_FALCON_7B, _OUR_FALCON_7B),
    "falcon-40b": (_FALCON_40B, _OUR_FALCON_40B),
    "falcon-180B": (
        {**_FALCON_40B, "hidden_size": 14848, "num_attention_heads": 232, "num_hidden_layers": 80},
        replace(_OUR_FALCON_40B, hidden_size=14_848, num_heads=232, num_layers=80, ffn_size=59_392),
    ),
    "falcon-11B": (
        _FALCON_11B,
        replace(
            _OUR_FALCON_40B,
            hidden_size=4096,
            num_heads=32,
            head_size=128,
            ffn_size=16_384,
            context=8192,
            parallel_norms=1,
            rope_theta=500_042.0,
            tied_embeddings=False,
        ),
    ),
    "falcon-rw-1b": (
        _FALCON_RW_1B,
        replace(
            _OUR_FALCON_7B,
            vocab_size=50_304,
            hidden_size=2048,
            num_layers=24,
            num_heads=32,
            num_kv_heads=32,
            ffn_size=8192,
            position="alibi",
            block="sequential",
            attention_bias=True,
            mlp_bias=True,
            separate_bias=True,
        ),
    ),
}


def parse(raw: dict[str, Any], **options: Any) -> DecoderConfig:
    return family_of(raw["model_type"], "config.json").config_from_hf(raw, "config.json", **options)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models(name: str) -> None:
    raw, expected = PUBLIC[name]
    assert parse(raw) == expected


@pytest.mark.parametrize("name", PUBLIC)
def test_writing_and_reading_is_the_identity(name: str) -> None:
    _, config = PUBLIC[name]
    assert parse(family_of(config.family, "").config_to_hf(config)) == config


def renamed(raw: dict[str, Any], model_type: str, **names: str) -> dict[str, Any]:
    """A config.json as it was first published: fewer fields, other names."""
    kept = {names.get(key, key): value for key, value in raw.items() if key != "new_decoder_architecture"}
    return kept | {"model_type": model_type, "architectures": ["RWForCausalLM"]}


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        (
            "falcon-7b",
            renamed(_FALCON_7B, "RefinedWebModel", num_attention_heads="n_head", num_hidden_layers="n_layer"),
        ),
        (
            "falcon-rw-1b",
            renamed(_FALCON_RW_1B, "RefinedWebModel", num_attention_heads="n_head", num_hidden_layers="n_layer"),
        ),
        (
            "falcon-40b",
            renamed(
                _FALCON_40B,
                "RefinedWeb",
                num_attention_heads="n_head",
                num_hidden_layers="n_layer",
                num_kv_heads="n_head_kv",
            ),
        ),
        ("falcon-rw-1b", renamed(_FALCON_RW_1B, "falcon", hidden_size="n_embed")),
    ],
)
def test_first_names_of_falcon(name: str, raw: dict[str, Any]) -> None:
    assert parse(raw) == PUBLIC[name][1]


def test_two_names_that_disagree() -> None:
    with pytest.raises(ConfigError, match=r"config\.json: n_head 71 and num_attention_heads 70 differ"):
        parse({**_FALCON_7B, "n_head": 71, "num_attention_heads": 70})


def test_a_7b_file_lists_all_heads_as_key_value_heads() -> None:
    """transformers writes num_kv_heads = 71 into a 7B's config.json; multi_query means 1 all the same."""
    assert parse({**_FALCON_7B, "num_kv_heads": 71}) == _OUR_FALCON_7B


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"sliding_window": 4096}, 4096),  # as published
        ({"sliding_window": "absent"}, 4096),  # transformers' default
        ({"max_position_embeddings": 4097, "sliding_window": 4096}, 4096),
    ],
)
def test_mistral_v0_1_is_refused(fields: dict[str, Any], window: int) -> None:
    raw = {key: value for key, value in {**_MISTRAL, **fields}.items() if value != "absent"}
    with pytest.raises(ConfigError, match=f"sliding_window {window} is shorter than the context") as caught:
        parse(raw)
    assert f'"max_position_embeddings": {window}' in str(caught.value)
    assert parse({**raw, "sliding_window": None, "max_position_embeddings": window}).context == window


def test_mistral_with_a_window_as_long_as_its_context() -> None:
    assert parse({**_MISTRAL, "sliding_window": 32768}) == _OUR_MISTRAL


SCALINGS: list[RopeScaling] = [
    LinearRope(4.0),
    DynamicRope(2.0),
    Llama3Rope(8.0, 1.0, 4.0, 8192),
    YarnRope(16.0, 4096),
    YarnRope(16.0, 4096, 8.0, 2.0, False, 0.8, 0.7, 1.3),
    LongRope(8.0, 4096, (1.0,) * 64, (4.0,) * 64, 1.1),
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters", "type"])
def test_every_spelling_of_a_scaling(scaling: RopeScaling, spelling: str) -> None:
    """Ours; transformers 5's, theta inside; and the first one, `type` for `rope_type`."""
    written = write_rope(5e5, scaling)
    if spelling == "rope_parameters":
        written = {"rope_parameters": {**written["rope_scaling"], "rope_theta": 5e5}}
    elif spelling == "type":
        inner = dict(written["rope_scaling"])
        written["rope_scaling"] = {"type": inner.pop("rope_type"), **inner}
    raw = {key: value for key, value in _LLAMA_2.items() if key != "rope_scaling"}
    config = parse({**raw, **written})
    assert (config.rope_theta, config.rope_scaling) == (5e5, scaling)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(_OUR_LLAMA_2, block="parallel"), "no Llama"),
        (replace(_OUR_LLAMA_2, rotary_size=64), "no Llama"),
        (replace(_OUR_LLAMA_2, num_heads=33, num_kv_heads=33), "no multiple of its 33 heads"),
        (replace(_OUR_MISTRAL, attention_bias=True), "Mistral has no biases"),
        (replace(_OUR_FALCON_7B, mlp="gated"), "no Falcon"),
        (replace(_OUR_FALCON_7B, mlp_bias=True), "biases in one place only"),
        (replace(_OUR_FALCON_40B, block="sequential", parallel_norms=1), "grouped heads in sequential blocks"),
    ],
)
def test_shapes_a_family_cannot_write(config: DecoderConfig, message: str) -> None:
    family = falcon if config.family == "falcon" else llama
    with pytest.raises(ConfigError, match=message):
        family.config_to_hf(config)
