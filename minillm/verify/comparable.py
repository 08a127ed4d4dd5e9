"""What cannot be verified, said before it is tried: too large, not finite, or not alike."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

import torch

from minillm.checkpoint import meta
from minillm.checkpoint.families import family_of, read_config
from minillm.checkpoint.shards import open_checkpoint
from minillm.config import DecoderConfig, DynamicRope, LongRope
from minillm.data.tokenizer import Tokenizer
from minillm.errors import CheckpointError, InputError, TokenizerError
from minillm.model import Decoder
from minillm.placement import available_memory
from minillm.verify.trace import Trace


def read_settings(folder: Path, *, allow_pickle: bool, ignore: Collection[str]) -> DecoderConfig:
    """The config of a folder in Hugging Face's or Meta's format."""
    if not meta.is_meta_folder(folder):
        return read_config(folder, ignore)
    with meta.MetaFiles(folder) as files:
        return meta.config_from_params(folder, files)


def check_memory(
    folder: Path, config: DecoderConfig, dtype: torch.dtype | None, tokens: int, *, gradients: bool, allow_pickle: bool
) -> None:
    """Room for one model, both traces and a weight in float64, or InputError says how much. Reads headers only.

    Gradients: those of each side's weights, of its tensors, and a dozen float64 copies of the largest weight, which is
    what pulling back through it and comparing take (measured, 1.1 B parameters in bf16: 13.1 GB).
    """
    if meta.is_meta_folder(folder):
        return
    with open_checkpoint(folder, allow_pickle=allow_pickle) as files:
        shapes = [(math.prod(files.shape(key)), files.dtype(key)) for key in files.keys()]  # noqa: SIM118
    weights = sum(count * (dtype or kind).itemsize for count, kind in shapes)
    need = int(1.1 * weights) + trace_bytes(config, tokens) + 500_000_000
    if gradients:
        need += 2 * weights + 2 * trace_bytes(config, tokens) + 12 * 8 * max(count for count, _ in shapes)
    available = available_memory()
    if available is not None and need > available:
        part = "" if config.num_layers == 1 else ", or verify some of its layers: --layers 0:2"
        raise InputError(
            f"{folder}: verifying needs about {need / 1e9:.1f} GB of memory ({weights / 1e9:.1f} GB of weights), "
            f"{available / 1e9:.1f} GB are free; give fewer --tokens, --dtype bfloat16{part}"
        )


def trace_bytes(config: DecoderConfig, tokens: int, rows: int = 2) -> int:
    """About what two traces take: streams and projections in fp32, scores and weights in float64."""
    heads = config.num_heads * config.head_size
    numbers = rows * tokens * (7 * config.hidden_size + 3 * config.ffn_size + 5 * heads)
    square = 2 * rows * config.num_heads * tokens**2
    return 2 * (config.num_layers * (4 * numbers + 8 * square) + 8 * rows * tokens * config.vocab_size)


def check_finite(model: Decoder, folder: Path) -> None:
    """CheckpointError names the first tensor with a NaN or infinity, by the checkpoint's name and ours."""
    for name, parameter in model.named_parameters():
        if not math.isfinite(sum(map(float, parameter.detach().aminmax()))):  # NaN wins in both; one pass, no copy
            where = int((~parameter.isfinite()).flatten().nonzero()[0])
            raise CheckpointError(
                f"{folder}: tensor {_their_name(model.config, name)} (our {name}) holds a NaN or infinity in "
                f"{str(parameter.dtype)[6:]}, first at number {where:,}; get the file again, or give another --dtype"
            )


def _their_name(config: DecoderConfig, ours: str) -> str:
    rules = family_of(config.family, "").weight_map(config).rules
    return next((rule.theirs for rule in rules if ours in rule.ours), ours)


_SHAPE = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffn_size", "norm", "position",
    "mlp", "block", "parallel_norms", "head",
)  # fmt: skip


def check_same_shape(ours: DecoderConfig, theirs: DecoderConfig, names: tuple[str, str]) -> None:
    """InputError lists the fields in which two models are built differently."""
    apart = [
        f.name for f in fields(DecoderConfig) if f.name in _SHAPE and getattr(ours, f.name) != getattr(theirs, f.name)
    ]
    if apart:
        said = ", ".join(f"{name} {getattr(ours, name)!r} and {getattr(theirs, name)!r}" for name in apart)
        raise InputError(f"{names[0]} and {names[1]} are built differently ({said}); compare like with like")


def check_head(config: DecoderConfig, folder: Path, *, gradients: bool, alone: bool) -> None:
    """InputError for what a scalar head (of a reward model) does not have. alone: to compare with transformers."""
    if config.head == "lm" or not (gradients or alone):
        return
    if alone:
        raise InputError(
            f"{folder}: has a scalar head, and what transformers loads to compare has none; give --against"
        )
    raise InputError(f"{folder}: has a scalar head, and --gradients are those of predicting tokens; leave them out")


def check_trace(recorded: Trace, config: DecoderConfig, names: tuple[str, str]) -> None:
    """InputError where a saved trace is not of one whole forward of a model of this shape."""
    if recorded.tokens is None or recorded.keep is None or "embed" not in recorded or "logits" not in recorded:
        raise InputError(f"{names[1]}: holds no whole forward; save one with `minillm verify --save-trace`")
    layers = {name.split(".")[1] for name in recorded if name.startswith("blocks.")}
    found = (recorded["embed"].shape[-1], *recorded["logits"].shape[2:], len(layers))
    right = (config.hidden_size, *([config.vocab_size] if config.head == "lm" else []), config.num_layers)
    if found != right:
        raise InputError(
            f"{names[1]} is of a model of width, vocabulary and layers {found}, {names[0]} has {right}; "
            "compare like with like"
        )


def check_same_vocabulary(first: Path, second: Path) -> None:
    """Where both folders have a tokenizer, the same ids must mean the same tokens."""
    try:
        a, b = Tokenizer.load(first), Tokenizer.load(second)
    except TokenizerError:
        return  # random tokens need none
    if len(a) != len(b) or any(a.token(i) != b.token(i) for i in range(len(a))):
        raise InputError(
            f"{first} and {second} have different tokenizers: their ids are other text; compare like with like"
        )


def not_reached(config: DecoderConfig, tokens: int) -> list[str]:
    """What so short a text leaves untried, as remarks."""
    scaling = config.rope_scaling
    limit = scaling.original_context if isinstance(scaling, LongRope) else config.context
    if isinstance(scaling, DynamicRope | LongRope) and tokens <= limit:
        kind = type(scaling).__name__.removesuffix("Rope").lower()
        return [f"{kind} rope scaling changes beyond {limit} tokens; --tokens {limit + 8} reaches that"]
    if config.position == "alibi" and tokens <= 256:
        return ["ALiBi's rounding to bfloat16 shows beyond position 256; --tokens 300 reaches that"]
    return []
