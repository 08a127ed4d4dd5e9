"""Bad config.json files, bad weights: each is one line that names the file, the field or the tensor, and the mend.

Good checkpoints are in the parity tests; safetensors headers, shards and indexes in test_safetensors_header and
test_shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import minillm
from minillm.checkpoint.families import family_of, read_json
from minillm.checkpoint.shards import TensorFiles
from minillm.config import DecoderConfig
from minillm.errors import CheckpointError, ConfigError, MinillmError
from tests.unit.test_hf_config import PUBLIC, parse

LLAMA_2, MISTRAL, FALCON_7B, FALCON_40B, FALCON_11B = (
    PUBLIC[name][0] for name in ("Llama-2-7b", "Mistral-7B-v0.2", "falcon-7b", "falcon-40b", "falcon-11B")
)

#: Fields of real families that describe maths we do not have: (base, field, value).
UNKNOWN = [
    (LLAMA_2, "sliding_window", 4096),
    (LLAMA_2, "num_local_experts", 8),
    (LLAMA_2, "num_experts_per_tok", 2),
    (LLAMA_2, "layer_types", ["full_attention", "sliding_attention"]),
    (LLAMA_2, "attention_multiplier", 0.015625),
    (LLAMA_2, "residual_multiplier", 0.22),
    (LLAMA_2, "embedding_multiplier", 12.0),
    (LLAMA_2, "logits_scaling", 8.0),
    (LLAMA_2, "final_logit_softcapping", 30.0),
    (LLAMA_2, "query_pre_attn_scalar", 256),
    (LLAMA_2, "use_qk_norm", True),
    (LLAMA_2, "no_rope_layers", [1, 0]),
    (LLAMA_2, "clip_qkv", 8.0),
    (MISTRAL, "attention_bias", True),
    (FALCON_7B, "sliding_window", 1024),
    (FALCON_7B, "apply_residual_connection_post_layernorm", True),
]


@pytest.mark.parametrize(("base", "field", "value"), UNKNOWN)
def test_fields_that_may_change_the_maths(base: dict[str, Any], field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({**base, field: value})
    assert str(caught.value).startswith(f"config.json: field {field} = ")
    assert f"ignore=['{field}']" in str(caught.value) and "\n" not in str(caught.value)
    assert parse({**base, field: value}, ignore=[field]) == parse(base)
    assert parse({**base, field: None}) == parse(base), "a field that is off changes nothing"


def test_a_mistyped_field_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="nearest: rope_theta"):
        parse({**LLAMA_2, "rope_thet": 10_000.0})


#: (base, fields, what the message must say)
REFUSED = [
    (LLAMA_2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
    (
        LLAMA_2,
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is not 1",
    ),
    (FALCON_7B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
    (LLAMA_2, {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is unknown"),
    (LLAMA_2, {"hidden_act": ["silu"]}, "field hidden_act is ['silu']; it must be a string"),
    (FALCON_7B, {"activation": "xielu"}, "activation 'xielu' is unknown"),
    (LLAMA_2, {"quantization_config": {"quant_method": "gptq"}}, "already quantised (gptq)"),
    (LLAMA_2, {"quantization_config": "gptq"}, "already quantised (unknown)"),
    (LLAMA_2, {"hidden_size": "4096"}, "field hidden_size is '4096'; it must be a whole number"),
    (LLAMA_2, {"hidden_size": 4096.0}, "field hidden_size is 4096.0"),
    (LLAMA_2, {"hidden_size": None}, "field hidden_size is missing"),
    (LLAMA_2, {"num_hidden_layers": True}, "field num_hidden_layers is True"),
    (LLAMA_2, {"num_hidden_layers": -1}, "field num_hidden_layers is -1"),
    (LLAMA_2, {"vocab_size": 0}, "field vocab_size is 0"),
    (LLAMA_2, {"head_dim": [128]}, "field head_dim is [128]"),
    (LLAMA_2, {"rms_norm_eps": float("nan")}, "field rms_norm_eps is nan; it must be a number"),
    (LLAMA_2, {"rms_norm_eps": float("inf")}, "field rms_norm_eps is inf"),
    (LLAMA_2, {"rms_norm_eps": "1e-5"}, "field rms_norm_eps is '1e-5'"),
    (LLAMA_2, {"rope_theta": float("nan")}, "field rope_theta is nan"),
    (LLAMA_2, {"rope_theta": 10**400}, "field rope_theta is 1000000000"),
    (LLAMA_2, {"tie_word_embeddings": "yes"}, "field tie_word_embeddings is 'yes'; it must be true or false"),
    (LLAMA_2, {"attention_bias": 1}, "field attention_bias is 1"),
    (LLAMA_2, {"num_attention_heads": 33}, "hidden_size 4096 is no multiple of num_attention_heads 33"),
    (FALCON_7B, {"num_attention_heads": 70}, "hidden_size 4544 is no multiple of 70 heads"),
    (MISTRAL, {"sliding_window": "4096"}, "field sliding_window is '4096'"),
    (FALCON_40B, {"parallel_attn": False}, "new_decoder_architecture is always parallel"),
    (FALCON_7B, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2 needs new_decoder_architecture"),
    (FALCON_11B, {"ff_factor": 3}, "ff_factor 3 x hidden_size 4096 is not ffn_hidden_size 16384"),
    (LLAMA_2, {"architectures": ["LlamaForSequenceClassification"]}, "classifier of 2 labels"),
    (LLAMA_2, {"architectures": ["LlamaForSequenceClassification"], "id2label": 3}, "classifier of 2 labels"),
    (LLAMA_2, {"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be a dictionary"),
    (LLAMA_2, {"original_max_position_embeddings": "x"}, "field original_max_position_embeddings is 'x'"),
]
ROPES: list[tuple[dict[str, Any], str]] = [
    ({"type": "mrope"}, "type 'mrope' is unknown"),
    ({"rope_type": ["linear"]}, "field rope_type is ['linear']; it must be a string"),
    ({"type": "linear"}, "linear needs factor"),
    ({"type": "linear", "factor": "4"}, "field factor is '4'; it must be a number"),
    ({"type": "linear", "factor": float("nan")}, "field factor is nan"),
    ({"type": "linear", "factor": 2.0, "beta_fast": 32}, "field beta_fast is unknown for linear"),
    ({"type": "linear", "factr": 2.0}, "field factr is unknown for linear (nearest: factor)"),
    ({"type": "default", "mrope_section": [16, 24, 24]}, "field mrope_section is unknown for default"),
    ({"full_attention": {"rope_type": "yarn"}}, "field full_attention is unknown for default"),
    (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0},
        "field original_max_position_embeddings is 0",
    ),
    ({"type": "yarn", "factor": 4.0, "truncate": "no"}, "field truncate is 'no'; it must be true or false"),
    ({"type": "longrope", "short_factor": 1.0, "long_factor": [1.0]}, "field short_factor is 1.0; it must be a list"),
    ({"type": "longrope", "short_factor": ["a"], "long_factor": [1.0]}, "field short_factor is ['a']"),
    ({"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "llama3 needs high_freq_factor"),
]


@pytest.mark.parametrize(("base", "fields", "message"), REFUSED)
def test_values_that_are_refused(base: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({**base, **fields})
    text = str(caught.value)
    assert text.startswith("config.json: ") and message in text and "\n" not in text


@pytest.mark.parametrize(("scaling", "message"), ROPES)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_scalings_that_are_refused(scaling: dict[str, Any], message: str, spelling: str) -> None:
    raw = {key: value for key, value in LLAMA_2.items() if key != "rope_scaling"}
    with pytest.raises(ConfigError) as caught:
        parse({**raw, spelling: scaling})
    assert str(caught.value).startswith("config.json, rope_scaling: ") and message in str(caught.value)


@pytest.mark.parametrize("model_type", [None, "lama", ["llama"], "gpt2", 3])
def test_model_types_that_are_refused(model_type: object) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: model_type .* is not supported") as caught:
        family_of(model_type, "config.json")
    for supported in ("llama", "mistral", "falcon", "RefinedWeb", "RefinedWebModel"):
        assert supported in str(caught.value)
    assert model_type != "lama" or "nearest: llama" in str(caught.value)


CONFIG = DecoderConfig(
    vocab_size=19,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    ffn_size=24,
    context=32,
)
Spoil = Callable[[dict[str, torch.Tensor]], object]
K_PROJ, EMBEDDING = "model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good tiny checkpoint, to be spoiled."""
    torch.manual_seed(0)
    minillm.save(minillm.Decoder(CONFIG), tmp_path / "model")
    return tmp_path / "model"


def spoil_weights(folder: Path, spoil: Spoil) -> None:
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder: Path, kind: type[MinillmError] = CheckpointError) -> str:
    """The error's one line, without the folder's own path."""
    with pytest.raises(kind) as caught:
        minillm.load_model(folder)
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text and str(Path(__file__).parent) not in text
    return text.replace(str(folder), "FOLDER")


def test_the_good_checkpoint_is_good(folder: Path) -> None:
    assert minillm.load_model(folder).config == CONFIG


BAD_WEIGHTS: dict[str, tuple[Spoil, str]] = {
    "transposed": (
        lambda t: t.update({K_PROJ: t[K_PROJ].T.contiguous()}),
        f"FOLDER: tensor {K_PROJ} has shape (16, 8), but the config asks for (8, 16); ",
    ),
    "flattened": (lambda t: t.update({K_PROJ: t[K_PROJ].flatten()}), f"tensor {K_PROJ} has shape (128,), "),
    "missing": (
        lambda t: t.pop(K_PROJ),
        f"FOLDER: the checkpoint lacks {K_PROJ}; ",
    ),
    "extra": (
        lambda t: t.update({"model.layers.1.self_attn.k_proj.scale": torch.ones(1)}),
        "FOLDER: the checkpoint holds model.layers.1.self_attn.k_proj.scale, which the config has no place for",
    ),
    "misspelt": (
        lambda t: t.update({K_PROJ.replace("k_proj", "k_porj"): t.pop(K_PROJ)}),
        f"lacks {K_PROJ} (nearest: {K_PROJ.replace('k_proj', 'k_porj')}); it holds",
    ),
    "one layer too many": (
        lambda t: t.update({k.replace(".1.", ".2."): v.clone() for k, v in list(t.items()) if ".1." in k}),
        "holds model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
        "model.layers.2.mlp.gate_proj.weight and 6 more",
    ),
    "whole numbers": (
        lambda t: t.update({EMBEDDING: t[EMBEDDING].to(torch.int8)}),
        f"FOLDER: tensor {EMBEDDING} is torch.int8; minillm loads ",
    ),
    "eight-bit floats": (
        lambda t: t.update({K_PROJ: t[K_PROJ].to(torch.float8_e4m3fn)}),
        f"FOLDER: tensor {K_PROJ} is torch.float8_e4m3fn; minillm loads ",
    ),
    "no head": (lambda t: t.pop("lm_head.weight"), "the checkpoint lacks lm_head.weight; "),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_do_not_fit(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, shapes and dtypes of all tensors are compared before any is read."""

    def read(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorFiles, "read", read)
    spoil, message = BAD_WEIGHTS[name]
    spoil_weights(folder, spoil)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "FOLDER/config.json: missing; "),
        ("", "FOLDER/config.json: not valid JSON ("),
        ('{"model_type": "llama",', "FOLDER/config.json: not valid JSON ("),
        ("[1, 2]", "FOLDER/config.json: holds a list, not a JSON object; "),
        ('"llama"', "FOLDER/config.json: holds a str, not a JSON object; "),
        (b"\xff\xfe{}", "FOLDER/config.json: not valid JSON ("),
        ("[" * 200_000, "FOLDER/config.json: not valid JSON ("),
        ('{"hidden_size": ' + "9" * 5000 + "}", "FOLDER/config.json: not valid JSON ("),
    ],
    ids=["missing", "empty", "cut", "list", "string", "UTF-16", "deep", "digits"],
)
def test_config_files_that_are_none(folder: Path, content: str | bytes | None, message: str) -> None:
    path = folder / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(folder)


def test_a_config_that_is_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "FOLDER/config.json: cannot be read (Is a directory)" in refusal(folder)


def test_a_broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")
    assert "FOLDER/generation_config.json: holds a list" in refusal(folder)


def test_read_json_gives_what_is_there(folder: Path) -> None:
    assert read_json(folder / "config.json")["model_type"] == "llama"


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("vocab_size", "vocab_size"),
        ("num_hidden_layers", "num_layers"),
        ("intermediate_size", "ffn_size"),
        ("head_dim", "num_heads * head_size"),
        ("hidden_size", "vocab_size"),
    ],
)
@pytest.mark.parametrize("size", [10**12, 10**25])
def test_absurd_sizes_cost_nothing(folder: Path, field: str, name: str, size: int) -> None:
    """A model of that size is never begun: its layers alone would take for ever, its frequencies the memory."""
    spoil_config(folder, **{field: size})
    text = refusal(folder)
    assert text.startswith(f"FOLDER: the config's {name} is ") and "0" * 12 in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "FOLDER/config.json: field rms_norm_eps is nan"),
        ({"rms_norm_eps": 0.0}, "FOLDER/config.json: norm_eps is 0.0; it must lie between 0 and 1"),
        ({"num_key_value_heads": 3}, "FOLDER/config.json: 4 query heads cannot share 3 key/value heads"),
        ({"rope_theta": -1}, "FOLDER/config.json: rope_theta is -1.0"),
        ({"head_dim": 5}, "FOLDER/config.json: rotary_size is 5; it must be even"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "FOLDER/config.json: rope scaling factor is 0.5"),
        ({"sliding_window": 16}, "FOLDER/config.json: field sliding_window = 16 is unknown and may change the maths"),
        ({"model_type": "mixtral"}, "FOLDER/config.json: model_type 'mixtral' is not supported (nearest: mistral)"),
    ],
)
def test_config_errors_name_the_file(folder: Path, fields: dict[str, Any], message: str) -> None:
    """Also those that `DecoderConfig` raises, which knows no file."""
    spoil_config(folder, **fields)
    assert re.sub(r"\s+", " ", refusal(folder, ConfigError)).startswith(message)


def test_an_ignored_field_is_ignored(folder: Path) -> None:
    spoil_config(folder, harmless=16)
    assert minillm.load_model(folder, ignore=["harmless"]).config == CONFIG


def test_a_model_that_is_no_plain_float_model_is_not_saved(folder: Path, tmp_path: Path) -> None:
    model = minillm.load_model(folder)
    model.blocks[0].attention.q_proj.extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(CheckpointError, match=r"parameter blocks\.0\.attention\.q_proj\.extra has no place"):
        minillm.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shape_its_family_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Llama"):
        minillm.save(minillm.Decoder(replace(CONFIG, block="parallel")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
