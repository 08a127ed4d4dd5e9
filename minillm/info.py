"""What a checkpoint is and what it costs, from its config alone: no weight is read.

parameters    counted on the meta device: shapes without memory
memory        parameters x bytes of the number format
cache         2 · layers · G · E numbers a token; full multi-head attention would keep H instead of G heads
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from minillm.checkpoint import meta
from minillm.checkpoint.families import read_config
from minillm.checkpoint.load import without_memory
from minillm.config import DecoderConfig
from minillm.errors import CheckpointError

_FORMATS = {"float32": 4, "bfloat16, float16": 2}


def describe(folder: Path, name: str, allow_pickle: bool = False, ignore: Collection[str] = ()) -> Table:
    """A table for people: shape, parameters, memory by number format, cache."""
    config = _config(folder, allow_pickle, ignore)
    total, embedding = count_parameters(config)
    table = Table(title=Text(name), show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="cyan")
    table.add_column()
    table.add_row("family", config.family)
    table.add_row("shape", _shape(config))
    table.add_row("attention", _attention(config))
    table.add_row("positions", _positions(config))
    table.add_row("parameters", f"{total:,}  ({embedding:,} of them embedding{_tied(config)})")
    table.add_section()
    for label, size in _FORMATS.items():
        table.add_row(f"weights in {label}", _bytes(total * size))
    table.add_section()
    for label, size in _FORMATS.items():
        each = config.cache_bytes_per_token(size)
        table.add_row(
            f"cache in {label}", f"{_bytes(each)} a token, {_bytes(each * config.longest)} at {config.longest:,}"
        )
    table.add_row(
        "cache, against full multi-head",
        f"{config.heads_per_group} times smaller" if config.heads_per_group > 1 else "the same",
    )
    return table


def count_parameters(config: DecoderConfig) -> tuple[int, int]:
    """(all parameters, those of the embedding): one layer is built without memory, and counts as many times as it must.

    >>> count_parameters(DecoderConfig(vocab_size=9, hidden_size=8, num_layers=3, num_heads=2, num_kv_heads=1,
    ...                                head_size=4, ffn_size=16, context=32, tied_embeddings=True))
    (1856, 72)
    """
    model = without_memory(replace(config, num_layers=1))
    block, whole = (sum(p.numel() for p in part.parameters()) for part in (model.blocks, model))
    return whole + block * (config.num_layers - 1), model.embed.weight.numel()


def _config(folder: Path, allow_pickle: bool, ignore: Collection[str]) -> DecoderConfig:
    if not meta.is_meta_folder(folder):
        return read_config(folder, ignore)
    if not allow_pickle:
        raise CheckpointError(f"{folder}: Meta's format says some sizes in .pth files only; pass --allow-pickle")
    with meta.MetaFiles(folder) as files:
        return meta.config_from_params(folder, files)


def _shape(config: DecoderConfig) -> str:
    return (
        f"{config.num_layers} {config.block} layers of width {config.hidden_size:,}, "
        f"{config.mlp} feed-forward of {config.ffn_size:,}, vocabulary {config.vocab_size:,}"
    )


def _attention(config: DecoderConfig) -> str:
    kinds = {1: "multi-query", config.num_heads: "multi-head"}
    kind = kinds.get(config.num_kv_heads, "grouped-query")
    return f"{kind}: {config.num_heads} query heads on {config.num_kv_heads} key/value heads of size {config.head_size}"


def _positions(config: DecoderConfig) -> str:
    if config.position == "alibi":
        return f"ALiBi, context {config.context:,}"
    scaling = (
        ""
        if config.rope_scaling is None
        else f", {type(config.rope_scaling).__name__} x {config.rope_scaling.factor:g}"
    )
    return f"rotary, theta {config.rope_theta:,.0f}{scaling}, context {config.longest:,}"


def _tied(config: DecoderConfig) -> str:
    return ", tied to the head" if config.tied_embeddings else ""


def _bytes(count: int) -> str:
    """Bytes as people say them, in powers of 1000.

    >>> _bytes(2_200_000_000), _bytes(90_112)
    ('2.20 GB', '90.1 kB')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size >= 10 else f"{count / size:.2f} {unit}"
    return f"{count} bytes"
