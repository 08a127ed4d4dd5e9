"""A Hugging Face checkpoint -> the file formats of the peers that do not read it.

    python convert.py bf16.gguf FOLDER OUT      also q8_0.gguf, q4_0.gguf (from OUT/bf16.gguf), ct2-int8

GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is written by hand, matrices as they are and vectors as
fp32: a header of typed fields, then the tensors. llama.cpp turns neighbouring numbers of a head, Hugging Face's Llama
number i with i + E/2, so the rows of q and k are re-ordered; Falcon turns halves in both. There is no tokenizer: token
ids go in and out. Quantised by llama.cpp's own function with its defaults (Q4_0: the head becomes Q6_K).
CTranslate2 converts through its TransformersConverter, as the command ct2-transformers-converter does; only the
tokenizer, which a random checkpoint lacks, is one of ids written out.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

#: Pattern of Hugging Face's name -> llama.cpp's.
NAMES = {
    "llama": {
        r"model\.embed_tokens": "token_embd",
        r"model\.norm": "output_norm",
        r"lm_head": "output",
        r"model\.layers\.(\d+)\.input_layernorm": r"blk.\1.attn_norm",
        r"model\.layers\.(\d+)\.post_attention_layernorm": r"blk.\1.ffn_norm",
        r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj": r"blk.\1.attn_\2",
        r"model\.layers\.(\d+)\.self_attn\.o_proj": r"blk.\1.attn_output",
        r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj": r"blk.\1.ffn_\2",
    },
    "falcon": {
        r"transformer\.word_embeddings": "token_embd",
        r"transformer\.ln_f": "output_norm",
        r"lm_head": "output",
        r"transformer\.h\.(\d+)\.input_layernorm": r"blk.\1.attn_norm",
        r"transformer\.h\.(\d+)\.self_attention\.query_key_value": r"blk.\1.attn_qkv",
        r"transformer\.h\.(\d+)\.self_attention\.dense": r"blk.\1.attn_output",
        r"transformer\.h\.(\d+)\.mlp\.dense_h_to_4h": r"blk.\1.ffn_up",
        r"transformer\.h\.(\d+)\.mlp\.dense_4h_to_h": r"blk.\1.ffn_down",
    },
}


def write_gguf(folder: Path, file: Path) -> None:
    """A Llama or a Falcon of the 7B kind, bf16 matrices and fp32 vectors; ValueError for others."""
    import gguf
    import numpy as np
    import torch

    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    if kind not in NAMES or config.get("new_decoder_architecture") or config.get("rope_scaling"):
        raise ValueError(f"no GGUF is written for {kind} with this config; have Llama, and Falcon as the 7B is")
    writer = gguf.GGUFWriter(file, kind)
    heads, kv_heads = _heads(config)
    _write_fields(writer, config, heads, kv_heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, tensor in _tensors(folder):
        shape = tuple(tensor.get_shape())
        new, matrix, numbers = _name(kind, name), len(shape) > 1, math.prod(shape)
        if matrix:  # the writer counts raw formats in bytes
            raw = (*shape[:-1], 2 * shape[-1])
            writer.add_tensor_info(new, raw, np.dtype(np.uint8), 2 * numbers, gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor_info(new, shape, np.dtype(np.float32), 4 * numbers, gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in _tensors(folder):
        values = tensor[:]
        if kind == "llama" and re.search(r"[qk]_proj", name):
            values = interleaved(values, heads if "q_proj" in name else kv_heads)
        if values.ndim > 1:
            writer.write_tensor_data(values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy())
        else:
            writer.write_tensor_data(values.float().numpy())
    writer.close()


def interleaved(weight: Any, heads: int) -> Any:
    """Rows of each head (E, D) in the order 0, E/2, 1, E/2 + 1, ...: pairs that turn together become neighbours."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _heads(config: dict[str, Any]) -> tuple[int, int]:
    heads = config["num_attention_heads"]
    if config["model_type"] == "falcon":
        return heads, 1 if config.get("multi_query", True) else heads
    return heads, config.get("num_key_value_heads") or heads


def _name(kind: str, name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    for pattern, theirs in NAMES[kind].items():
        if found := re.fullmatch(pattern, stem):
            return f"{found.expand(theirs)}.{leaf}"
    raise ValueError(f"tensor {name} has no name in GGUF")


def _write_fields(writer: Any, config: dict[str, Any], heads: int, kv_heads: int) -> None:
    width = config["hidden_size"]
    head_size = config.get("head_dim") or width // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config.get("max_position_embeddings", 2048))
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config.get("intermediate_size") or config.get("ffn_hidden_size") or 4 * width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta", 10_000.0)))
    if config["model_type"] == "llama":
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("no_vocab")


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and lazy slice of every tensor."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (no dict)
                yield name, shard.get_slice(name)


def quantise_gguf(file: Path, out: Path, kind: str) -> None:
    """By llama.cpp itself; kind: q8_0 or q4_0."""
    import llama_cpp as lib

    options = lib.llama_model_quantize_default_params()
    options.ftype = {"q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    if lib.llama_model_quantize(str(file).encode(), str(out).encode(), options):
        raise RuntimeError(f"llama.cpp does not quantise {file.name}")


def to_ctranslate2(folder: Path, out: Path) -> None:
    """int8 weights."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
            size = json.loads((folder / "config.json").read_text())["vocab_size"]
            ids = {str(token): token for token in range(size)}
            return SimpleNamespace(get_vocab=lambda: ids, bos_token="0", eos_token="1", unk_token="2")

    Converter(str(folder), low_cpu_mem_usage=True).convert(str(out), quantization="int8")


def main(what: str, folder: str, out: str) -> None:
    """Make OUT/WHAT, whole or not at all."""
    target = Path(out) / what
    part = target.with_name(f"part-{what}")
    if what == "ct2-int8":
        to_ctranslate2(Path(folder), part)
    elif what == "bf16.gguf":
        write_gguf(Path(folder), part)
    else:
        quantise_gguf(Path(out) / "bf16.gguf", part, what.removesuffix(".gguf"))
    part.rename(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
