"""A checkpoint folder -> a `Decoder`, and back.

    folder ── config.json ──▶ DecoderConfig ──▶ Decoder on the meta device (shapes, no memory; linears swapped)
       └──── *.safetensors ─▶ lazy tensors ─▶ WeightMap ─▶ cast ─▶ parameters, one at a time

The model is built without memory and filled tensor by tensor, so that the peak is the model plus the tensor in hand.
Shapes are compared before anything is read; a mismatch names both and costs nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minillm.checkpoint import meta
from minillm.checkpoint.families import family_of, read_config, read_json
from minillm.checkpoint.quantised import QuantisedTensors, stored_quantisation
from minillm.checkpoint.resolve import resolve
from minillm.checkpoint.shards import open_checkpoint
from minillm.checkpoint.tensors import Tensors
from minillm.checkpoint.weight_map import Rule, WeightMap
from minillm.config import DecoderConfig
from minillm.data.tokenizer import Tokenizer
from minillm.errors import CheckpointError, InputError
from minillm.memory import Room, empty
from minillm.model import Decoder
from minillm.placement import DTYPES, as_device, as_dtype
from minillm.quant.convert import QUANTISED, Quantisation, as_quantisation, float_shapes, quantize_linears, swap

Report = Callable[[int, int], None]  # (bytes read so far, bytes in all)


def load(name_or_folder: str | os.PathLike[str], **options: Any) -> tuple[Decoder, Tokenizer]:
    """A Hugging Face id or folder -> model and tokenizer; options as in `load_model`.

    The tokenizer comes first, so that a folder without one fails before any weight is read.
    """
    folder = resolve(
        name_or_folder, revision=options.pop("revision", None), allow_pickle=options.get("allow_pickle", False)
    )
    tokenizer = Tokenizer.load(folder)
    return load_model(folder, **options), tokenizer


def load_model(  # noqa: PLR0913  # the options that a user has, all but one by keyword
    name_or_folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    quantize: Quantisation | str | None = None,
    allow_pickle: bool = False,
    ignore: Collection[str] = (),
    report: Report | None = None,
) -> Decoder:
    """A Hugging Face id or folder, or a folder in Meta's format -> the model, in eval mode.

    dtype: of all parameters; None is the checkpoint's own, the one that config.json names.
    quantize: "int8", "nf4" or a Quantisation rounds the linears but the head while they are read, tensor by tensor; a
    checkpoint that is quantised already says so itself.
    allow_pickle: also read `.bin` and `.pth` files, with torch's restricted unpickler; safetensors need no trust.
    ignore: config fields known to leave the maths alone.
    report: called with (bytes read, bytes in all) after each tensor.
    Raises CheckpointError or ConfigError, naming file, tensor or field.
    """
    wanted, device = as_dtype(dtype), as_device(device)
    folder = resolve(name_or_folder, revision=revision, allow_pickle=allow_pickle)
    config, files, weight_map_of, defaults = _open(folder, allow_pickle, ignore)
    try:
        _check_sizes(config, files, folder)
        config = _untie_if_different(config, files, weight_map_of(config))
        model = without_memory(config)
        dtype = wanted or _own_dtype(folder, files, weight_map_of(config))
        read = _quantise(model, files, weight_map_of(config), folder, as_quantisation(quantize))
        fill(model, read, weight_map_of(config), where=str(folder), dtype=dtype, device=device, report=report)
    finally:
        files.close()
    model.generation_defaults = defaults
    return model.eval()


def _open(
    folder: Path, allow_pickle: bool, ignore: Collection[str]
) -> tuple[DecoderConfig, Tensors, Callable[[DecoderConfig], WeightMap], Mapping[str, Any]]:
    if meta.is_meta_folder(folder):
        if not allow_pickle:
            raise CheckpointError(
                f"{folder}: Meta's format keeps weights in .pth files; pass allow_pickle=True to read them "
                "(restricted unpickler: no code is run)"
            )
        files = meta.MetaFiles(folder)
        config = meta.config_from_params(folder, files)
        return config, files, meta.weight_map, meta.generation_defaults(config)
    config = read_config(folder, ignore)
    weight_map_of, defaults = family_of(config.family, str(folder)).weight_map, generation_defaults(folder)
    return config, open_checkpoint(folder, allow_pickle=allow_pickle), weight_map_of, defaults


def without_memory(config: DecoderConfig) -> Decoder:
    """The model on the meta device: names, shapes and dtypes of all parameters, no values."""
    with torch.device("meta"), _Uninitialised():
        return Decoder(config)


class _Uninitialised(TorchFunctionMode):
    """Skips `torch.nn.init`. On the meta device it sets nothing, but its first random fill imports 800 modules of torch
    that work out shapes in Python: 1.4 s and 75 MB, more than a small model itself takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def fill(
    model: Decoder,
    files: Tensors,
    weight_map: WeightMap,
    *,
    where: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> None:
    """Give every meta parameter of the model its tensor: read, split, cast, place, one checkpoint tensor at a time.

    Names, shapes and dtypes are compared before the first byte is read; `where` stands in front of those errors.
    """
    parameters = float_shapes(model)
    matched = weight_map.match(files.keys(), parameters, where=where)
    for key, rule in matched.items():
        _check_tensor(f"{where}: tensor {key}", files, key, rule, parameters)
    sizes = {key: math.prod(files.shape(key)) * files.dtype(key).itemsize for key in matched}
    done, total, room = 0, sum(sizes.values()), Room()
    for key, rule in matched.items():
        if isinstance(files, QuantisedTensors) and key in files.quantised:
            files.give(model, key, rule, device)
        else:
            passing = all(_is_quantised(model, name) for name in rule.ours)
            for name, tensor in zip(rule.ours, rule.split(files.read(key, room if passing else empty)), strict=True):
                _place(model, name, tensor.to(device), dtype, f"{where}: tensor {key}")
        done += sizes[key]
        if report is not None:
            report(done, total)


def _quantise(model: Decoder, files: Tensors, weight_map: WeightMap, folder: Path, how: Quantisation | None) -> Tensors:
    """Swap the linears that shall be, or in the file are, quantised; returns the files as `fill` reads them."""
    path = folder / "config.json"
    stored = stored_quantisation(read_json(path), str(path)) if path.is_file() else None
    if stored is None:
        if how is not None:
            quantize_linears(model, how)
        return files
    if how is not None and replace(how, skip=stored.skip) != stored:
        raise CheckpointError(f"{folder}: is quantised already ({stored.kind}); load it without quantize")
    found = QuantisedTensors(files, str(folder))
    matched = weight_map.match(found.keys(), dict(model.named_parameters()), where=str(folder))
    layers = [name for key, rule in matched.items() if key in found.quantised for name in rule.ours]
    for name in layers:
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear):
            raise CheckpointError(f"{folder}: {name} is quantised and no linear's weight; get the checkpoint again")
    swap(model, (name.removesuffix(".weight") for name in layers), stored)
    return found


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_tensor(what: str, files: Tensors, key: str, rule: Rule, parameters: Mapping[str, Tensor]) -> None:
    expected = tuple(rule.join([parameters[name] for name in rule.ours]).shape)
    shape, dtype = files.shape(key), files.dtype(key)
    if shape != expected:
        raise CheckpointError(
            f"{what} has shape {shape}, but the config asks for {expected}; both must come from the same model"
        )
    if dtype not in _FLOATS and not (isinstance(files, QuantisedTensors) and key in files.quantised):
        raise CheckpointError(
            f"{what} is {dtype}; minillm loads {', '.join(map(str, _FLOATS))}: get the checkpoint in one of these"
        )


def _check_sizes(config: DecoderConfig, files: Tensors, folder: Path) -> None:
    """No weight holds more numbers than all files do: told before a model of absurd sizes is built."""
    shapes = list(map(files.shape, files.keys()))
    held, width = sum(map(math.prod, shapes)), config.hidden_size
    heads = config.num_heads * config.head_size
    for name, size, most in (
        ("num_layers", config.num_layers, len(shapes)),
        ("vocab_size", config.vocab_size, held // width),
        ("num_heads * head_size", heads, held // width),
        ("ffn_size", config.ffn_size, held // width),
    ):
        if size > most:
            raise CheckpointError(
                f"{folder}: the config's {name} is {size} at hidden_size {width}, more than the {held:,} numbers in "
                f"{len(shapes)} tensors of the weights can fill; both must come from the same model"
            )


def _place(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None, what: str) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(module, QUANTISED) and leaf == "weight":
        try:
            module.take_weight(tensor.contiguous())
        except InputError as error:
            raise CheckpointError(f"{what}: {error}") from error
    else:
        trains = not isinstance(module, QUANTISED)
        setattr(module, leaf, nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=trains))


def _is_quantised(model: nn.Module, name: str) -> bool:
    """Whether the parameter is a weight that is rounded as it comes in, so that its float form is soon let go."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(parent), QUANTISED)


def _untie_if_different(config: DecoderConfig, files: Tensors, weight_map: WeightMap) -> DecoderConfig:
    """Where config.json ties the head to the embedding but the file holds both and they differ, the file is right."""
    embedding = next(rule.theirs for rule in weight_map.rules if rule.ours == ("embed.weight",))
    head, keys = "lm_head.weight", set(files.keys())
    if not config.tied_embeddings or config.head != "lm" or not {head, embedding} <= keys:
        return config
    equal = torch.equal(files.read(head), files.read(embedding))
    return config if equal else replace(config, tied_embeddings=False)


def _own_dtype(folder: Path, files: Tensors, weight_map: WeightMap) -> torch.dtype | None:
    """One dtype for all parameters, as transformers has it: config.json's, else the embedding's."""
    path = folder / "config.json"
    raw = read_json(path) if path.is_file() else {}
    named = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    if named in DTYPES:
        return DTYPES[named]
    embedding = next(rule.theirs for rule in weight_map.rules if rule.ours == ("embed.weight",))
    keys = {embedding, embedding.removeprefix(weight_map.prefix)} & set(files.keys())
    return files.dtype(keys.pop()) if keys else None


def generation_defaults(folder: Path) -> dict[str, Any]:
    """generation_config.json, with the token ids of config.json where it names none."""
    path = folder / "generation_config.json"
    defaults = read_json(path) if path.is_file() else {}
    config = read_json(folder / "config.json")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if defaults.get(name) is None and config.get(name) is not None:
            defaults[name] = config[name]
    return defaults
