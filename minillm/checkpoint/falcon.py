"""The Falcon family: 7B, 40B, 180B, 11B, RW-1B, RW-7B, and their first names RefinedWebModel and RefinedWeb.

    model       new_decoder_architecture   multi_query   parallel_attn   norms in parallel   alibi   bias    G
    RW-1B, 7B   no                         no            no              -                   yes     yes     H
    7B          no                         yes           yes             1                   no      no      1
    40B, 180B   yes                        -             yes             2                   no      no      8
    11B         yes                        -             yes             1                   no      no      8

Every one fuses q, k and v into one weight `query_key_value`. transformers describes three layouts of its rows
(`FalconAttention._split_heads`), but they are one. For each key/value head g, its H/G query heads, then k, then v:

    rows (G, H/G + 2, E)    [q_0 .. q_(H/G-1), k, v]       40B: G = 8      7B: G = 1      RW: G = H, so [q, k, v] a head

`num_kv_heads` in a 7B's config.json is H by default and must not be read: multi_query means 1.

    transformer.word_embeddings                   embed
    transformer.h.N.input_layernorm               blocks.N.attention_norm      (sequential, or one norm in parallel)
    transformer.h.N.ln_attn, ln_mlp               blocks.N.attention_norm, mlp_norm         (two norms in parallel)
    transformer.h.N.post_attention_layernorm      blocks.N.mlp_norm                                    (sequential)
    transformer.h.N.self_attention.query_key_value   blocks.N.attention.{q,k,v}_proj
    transformer.h.N.self_attention.dense          blocks.N.attention.o_proj
    transformer.h.N.mlp.dense_h_to_4h, dense_4h_to_h   blocks.N.mlp.up_proj, down_proj
    transformer.ln_f                              norm
    lm_head                                       lm_head                                       (absent where tied)

Source of the names: transformers, models/falcon/modeling_falcon.py (5.23).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

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

_LEGACY_NAMES = {
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}


def config_from_hf(raw: Mapping[str, Any], where: str, ignore: Collection[str] = ()) -> DecoderConfig:
    """config.json of a Falcon -> DecoderConfig; ConfigError on a field that asks for other maths."""
    fields = Fields(_modern(raw, where), where)
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    if hidden % heads:
        raise ConfigError(f"{where}: hidden_size {hidden} is no multiple of {heads} heads; one of the two is wrong")
    grouped, multi_query = fields.flag("new_decoder_architecture"), fields.flag("multi_query", True)
    parallel = fields.flag("parallel_attn", True)
    if grouped and not parallel:
        raise ConfigError(f"{where}: new_decoder_architecture is always parallel; remove parallel_attn = false")
    listed_kv_heads = fields.whole("num_kv_heads", heads)
    norms = fields.whole("num_ln_in_parallel_attn", 2 if grouped else 1)
    if norms > 1 and not grouped:
        raise ConfigError(f"{where}: num_ln_in_parallel_attn {norms} needs new_decoder_architecture")
    context = fields.whole("max_position_embeddings", 2048)
    rope = read_rope(fields, context)
    if rope.pop("share") != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor is not 1; Falcon models turn whole heads")
    bias, alibi = fields.flag("bias"), fields.flag("alibi")
    config = DecoderConfig(
        vocab_size=fields.whole("vocab_size", 65_024),
        hidden_size=hidden,
        num_layers=fields.whole("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=listed_kv_heads if grouped else (1 if multi_query else heads),
        head_size=hidden // heads,
        ffn_size=_ffn_size(fields, hidden),
        context=context,
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        position="alibi" if alibi else "rotary",
        mlp="plain",
        activation=read_activation(fields, "activation", "gelu"),
        block="parallel" if parallel else "sequential",
        parallel_norms=norms,  # type: ignore[arg-type]  # checked by DecoderConfig
        attention_bias=bias,
        mlp_bias=bias,
        separate_bias=bias,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        head=read_head(fields),
        family="falcon",
        **rope,
    )
    fields.finish(ignore)
    return config


def _ffn_size(fields: Fields, hidden: int) -> int:
    """`ffn_hidden_size`; the 11B says the same once more as `ff_factor`, a multiple of the width."""
    size = fields.whole("ffn_hidden_size", 4 * hidden)
    factor = fields.get("ff_factor")
    if factor is not None and factor * hidden != size:
        raise ConfigError(f"{fields.where}: ff_factor {factor!r} x hidden_size {hidden} is not ffn_hidden_size {size}")
    return size


def _modern(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The field names of RefinedWeb and RefinedWebModel files, renamed; n_head_kv means the 40B's architecture."""
    for legacy, name in _LEGACY_NAMES.items():
        if legacy in raw and name in raw and raw[legacy] != raw[name]:
            raise ConfigError(
                f"{where}: {legacy} {raw[legacy]!r} and {name} {raw[name]!r} differ; remove the wrong one"
            )
    modern = {_LEGACY_NAMES.get(name, name): value for name, value in raw.items()}
    if "n_head_kv" in raw:
        modern.setdefault("new_decoder_architecture", True)
    return modern


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> the config.json that transformers reads; ConfigError where no Falcon has such a shape."""
    two_norms = config.block == "parallel" and config.parallel_norms == 2
    grouped = two_norms or config.num_kv_heads not in (1, config.num_heads)
    if (config.norm, config.mlp) != ("layer", "plain") or config.hidden_size != config.num_heads * config.head_size:
        raise ConfigError("this model is no Falcon (LayerNorm, plain MLP, H * E = D); set family to the format it has")
    if config.rotary_dim != config.head_size or config.separate_bias != config.attention_bias:
        raise ConfigError("a Falcon turns whole heads and rounds before it adds a bias; this model does not")
    if config.attention_bias != config.mlp_bias or (grouped and config.block == "sequential"):
        raise ConfigError("no Falcon has biases in one place only, or grouped heads in sequential blocks")
    written: dict[str, Any] = {
        "architectures": ["FalconForCausalLM" if config.head == "lm" else "FalconForSequenceClassification"],
        "model_type": "falcon",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "new_decoder_architecture": grouped,
        "multi_query": config.num_kv_heads == 1,
        "parallel_attn": config.block == "parallel",
        "alibi": config.position == "alibi",
        "bias": config.attention_bias,
        "activation": write_activation(config.activation),
        "max_position_embeddings": config.context,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        **write_rope(config.rope_theta, config.rope_scaling),
    }
    if grouped:
        written["num_ln_in_parallel_attn"] = config.parallel_norms
    if config.head == "scalar":
        written |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return written


def split_qkv(fused: Tensor, *, config: DecoderConfig) -> Sequence[Tensor]:
    """Rows of `query_key_value` ((H + 2G) E, ...) -> q (H E, ...), k (G E, ...), v (G E, ...), each its own memory."""
    each, groups, size = config.heads_per_group, config.num_kv_heads, config.head_size
    rows = fused.view(groups, each + 2, size, *fused.shape[1:])
    q, k, v = rows[:, :each], rows[:, each], rows[:, each + 1]
    return [part.clone(memory_format=torch.contiguous_format).view(-1, *fused.shape[1:]) for part in (q, k, v)]


def join_qkv(parts: Sequence[Tensor], *, config: DecoderConfig) -> Tensor:
    """The inverse of `split_qkv`."""
    each, groups, size = config.heads_per_group, config.num_kv_heads, config.head_size
    q, k, v = parts
    tail = q.shape[1:]
    rows = q.new_empty(groups, each + 2, size, *tail)  # torch.cat would import 800 modules if all are meta tensors
    rows[:, :each] = q.view(groups, each, size, *tail)
    rows[:, each] = k.view(groups, size, *tail)
    rows[:, each + 1] = v.view(groups, size, *tail)
    return rows.view(-1, *tail)


def weight_map(config: DecoderConfig) -> WeightMap:
    """The table of the module's docstring, written out for every layer."""
    return WeightMap(
        rules=tuple(_rules(config)),
        prefix="transformer.",
        dropped=(
            r"(transformer\.)?(h\.\d+\.self_attention\.)?(maybe_rotary|rotary_emb)\.inv_freq",
            r"(transformer\.)?h\.\d+\.self_attention\.(bias|masked_bias)",
            *((r"lm_head\.weight",) if config.tied_embeddings or config.head == "scalar" else ()),
        ),
    )


def _rules(config: DecoderConfig) -> Iterator[Rule]:
    yield Rule("transformer.word_embeddings.weight", ("embed.weight",))
    for n in range(config.num_layers):
        yield from _block_rules(config, f"transformer.h.{n}", f"blocks.{n}")
    for kind in ("weight", "bias"):
        yield Rule(f"transformer.ln_f.{kind}", (f"norm.{kind}",))
    if config.head == "scalar":
        yield Rule("score.weight", ("lm_head.score.weight",))
    elif not config.tied_embeddings:
        yield Rule("lm_head.weight", ("lm_head.weight",))


def _block_rules(config: DecoderConfig, theirs: str, ours: str) -> Iterator[Rule]:
    for norm, name in _norm_names(config).items():
        for kind in ("weight", "bias"):
            yield Rule(f"{theirs}.{norm}.{kind}", (f"{ours}.{name}.{kind}",))
    split, join = partial(split_qkv, config=config), partial(join_qkv, config=config)
    for kind in ("weight", "bias") if config.attention_bias else ("weight",):
        parts = tuple(f"{ours}.attention.{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj"))
        yield Rule(f"{theirs}.self_attention.query_key_value.{kind}", parts, split, join)
        yield Rule(f"{theirs}.self_attention.dense.{kind}", (f"{ours}.attention.o_proj.{kind}",))
        yield Rule(f"{theirs}.mlp.dense_h_to_4h.{kind}", (f"{ours}.mlp.up_proj.{kind}",))
        yield Rule(f"{theirs}.mlp.dense_4h_to_h.{kind}", (f"{ours}.mlp.down_proj.{kind}",))


def _norm_names(config: DecoderConfig) -> dict[str, str]:
    if config.block == "sequential":
        return {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.parallel_norms == 2:
        return {"ln_attn": "attention_norm", "ln_mlp": "mlp_norm"}
    return {"input_layernorm": "attention_norm"}
