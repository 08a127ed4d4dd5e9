"""The Llama family: Llama 1, 2, 3, 3.1, 3.2, Code Llama, TinyLlama, Vicuna, and Mistral without a sliding window.

All are one shape: RMSNorm, rotary positions, grouped-query attention, gated MLP, sequential blocks. They differ in
sizes, rope_theta, rope scaling and tied embeddings, all of which config.json says. Loading is renames only:

    model.embed_tokens                                 embed
    model.layers.N.input_layernorm                     blocks.N.attention_norm
    model.layers.N.self_attn.{q,k,v,o}_proj            blocks.N.attention.{q,k,v,o}_proj
    model.layers.N.post_attention_layernorm            blocks.N.mlp_norm
    model.layers.N.mlp.{gate,up,down}_proj             blocks.N.mlp.{gate,up,down}_proj
    model.norm                                         norm
    lm_head                                            lm_head          (absent where tied)

Source of the names: transformers, models/llama/modeling_llama.py and models/mistral/modeling_mistral.py (5.23).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from minillm.checkpoint.hf_config import (
    Fields,
    read_activation,
    read_head,
    read_rope,
    write_activation,
    write_rope,
)
from minillm.checkpoint.weight_map import Rule, WeightMap
from minillm.config import DecoderConfig
from minillm.errors import ConfigError

#: Absent from MistralConfig files, transformers reads this; a window shorter than the context is maths we do not have.
_MISTRAL_WINDOW = 4096


def config_from_hf(raw: Mapping[str, Any], where: str, ignore: Collection[str] = ()) -> DecoderConfig:
    """config.json of a Llama or Mistral -> DecoderConfig; ConfigError on a field that asks for other maths."""
    fields = Fields(raw, where)
    mistral = fields.get("model_type") == "mistral"
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads", 32)
    kv_default = 8 if mistral and "num_key_value_heads" not in raw else heads
    context = fields.whole("max_position_embeddings", 4096 * 32 if mistral else 2048)
    rope = read_rope(fields, context)
    if rope.pop("share") != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor is not 1; Llama models turn whole heads")
    if mistral:
        _refuse_window(fields, context)
    config = DecoderConfig(
        vocab_size=fields.whole("vocab_size", 32_000),
        hidden_size=hidden,
        num_layers=fields.whole("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", kv_default),
        head_size=_head_size(fields, hidden, heads),
        ffn_size=fields.whole("intermediate_size"),
        context=context,
        norm="rms",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=read_activation(fields, "hidden_act", "silu"),
        attention_bias=False if mistral else fields.flag("attention_bias"),
        mlp_bias=False if mistral else fields.flag("mlp_bias"),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        head=read_head(fields),
        family="mistral" if mistral else "llama",
        **rope,
    )
    fields.finish(ignore)
    return config


def _head_size(fields: Fields, hidden: int, heads: int) -> int:
    if fields.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"{fields.where}: hidden_size {hidden} is no multiple of num_attention_heads {heads}; "
            "correct one of the two, or add head_dim"
        )
    return fields.whole("head_dim", hidden // heads)


def _refuse_window(fields: Fields, context: int) -> None:
    if "sliding_window" in fields.raw and fields.get("sliding_window") is None:
        return
    window = fields.whole("sliding_window", _MISTRAL_WINDOW)
    if window < context:
        raise ConfigError(
            f"{fields.where}: sliding_window {window} is shorter than the context {context}; minillm attends to all: "
            f'set "sliding_window": null and "max_position_embeddings": {window} to use it up to {window} tokens'
        )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> the config.json that transformers reads; ConfigError where no Llama has such a shape."""
    fits = (config.norm, config.position, config.mlp, config.block) == ("rms", "rotary", "gated", "sequential")
    if not fits or config.rotary_dim != config.head_size or config.separate_bias:
        raise ConfigError(
            "this model is no Llama (RMSNorm, rotary, gated, sequential); set family to the format it has"
        )
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"transformers refuses a Llama whose hidden_size {config.hidden_size} is no multiple of its "
            f"{config.num_heads} heads; choose another number of heads"
        )
    mistral = config.family == "mistral"
    if mistral and (config.attention_bias or config.mlp_bias):
        raise ConfigError("Mistral has no biases; set family='llama' to save this model")
    stem = "Mistral" if mistral else "Llama"
    written = {
        "architectures": [f"{stem}For{'CausalLM' if config.head == 'lm' else 'SequenceClassification'}"],
        "model_type": stem.lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": write_activation(config.activation),
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        **write_rope(config.rope_theta, config.rope_scaling),
    }
    if config.head == "scalar":
        written |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if mistral:
        return written | {"sliding_window": None}
    return written | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def weight_map(config: DecoderConfig) -> WeightMap:
    """The table of the module's docstring, written out for every layer."""
    return WeightMap(
        rules=tuple(_rules(config)),
        prefix="model.",
        dropped=(
            r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
            *((r"lm_head\.weight",) if config.tied_embeddings or config.head == "scalar" else ()),
        ),
    )


def _rules(config: DecoderConfig) -> Iterator[Rule]:
    yield Rule("model.embed_tokens.weight", ("embed.weight",))
    for n in range(config.num_layers):
        theirs, ours = f"model.layers.{n}", f"blocks.{n}"
        yield Rule(f"{theirs}.input_layernorm.weight", (f"{ours}.attention_norm.weight",))
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield Rule(f"{theirs}.self_attn.{name}.{kind}", (f"{ours}.attention.{name}.{kind}",))
        yield Rule(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.mlp_norm.weight",))
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            for name in ("gate_proj", "up_proj", "down_proj"):
                yield Rule(f"{theirs}.mlp.{name}.{kind}", (f"{ours}.mlp.{name}.{kind}",))
    yield Rule("model.norm.weight", ("norm.weight",))
    if config.head == "scalar":
        yield Rule("score.weight", ("lm_head.score.weight",))
    elif not config.tied_embeddings:
        yield Rule("lm_head.weight", ("lm_head.weight",))
