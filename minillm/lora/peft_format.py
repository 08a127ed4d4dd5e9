"""Adapters on disk as peft writes them, both ways.

    adapter_config.json          minillm.lora.peft_config
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (R, K), .lora_B.weight (N, R), .lora_B.bias,
                                 .lora_embedding_A, .lora_embedding_B, .lora_magnitude_vector (N,);
                                 base_model.model.<module>.weight ... of retrained modules

<module> is the name in the checkpoint's format, so the weight map that loads the model also loads its adapters; fused
weights: `minillm.lora.fused`. How many rows of a fused A belong to whom is noted in the file's metadata, which peft
does not read.

Reading is strict, where peft would leave a key that fits nothing at random A and zero B: each tensor of the file has
its place, and the other way round. Source: peft/utils/save_and_load.py, tuners/lora/layer.py (0.21).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.atomic import write_atomically
from minillm.checkpoint.families import read_json
from minillm.checkpoint.tensor_file import SafetensorsFile
from minillm.errors import CheckpointError, InputError, nearest
from minillm.lora.config import LoraConfig
from minillm.lora.fused import Factors, factors, join, split
from minillm.lora.inject import adapters, add, check_decoder, config_of, or_as_before
from minillm.lora.layer import Adapter, LoraEmbedding, shape_of
from minillm.lora.peft_config import from_peft, to_peft
from minillm.lora.sites import PREFIX, Site, sites, slots
from minillm.model import Decoder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_RANKS = "minillm.ranks"  # metadata: module -> rows of A of each linear that is fused in it
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_DEFAULT_TARGETS = {"falcon": ("query_key_value",)}


def save(model: Decoder, folder: str | os.PathLike[str], *, name: str = "default", base: str = "") -> None:
    """Write an adapter as a folder that peft loads; base: the id or folder of the model it belongs to.

    Raises CheckpointError where the folder is a file or cannot be written.
    """
    check_decoder(model)
    config, folder = config_of(model, name), Path(folder)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, float]] = {}  # module -> rank, alpha
    ranks: dict[str, list[int]] = {}
    for site in sites(model, name):
        parts = [None if each is None else factors(each) for each in site.adapters]
        whole, shared_out = join(site.rule, parts, site.layers)
        tensors |= {key: getattr(whole, part) for part, key in site.keys().items()}
        rank = len(whole.a)
        shapes[site.module] = rank, whole.scale * (math.sqrt(rank) if config.rslora else rank)
        ranks |= {site.module: shared_out} if shared_out else {}
    anew = slots(model, name)
    for key, slot in anew.items():
        tensors[key] = slot.rule.join([own[part].detach() for own, part in slot.places])
    retrain = sorted(key.removeprefix(PREFIX).removesuffix(".weight") for key in anew if key.endswith(".weight"))
    task = "CAUSAL_LM" if model.config.head == "lm" else "SEQ_CLS"
    settings = to_peft(config, shapes, retrain, base=base, task=task)
    metadata = {"format": "pt"} | ({_RANKS: json.dumps(ranks)} if ranks else {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); choose another") from error
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    from safetensors.torch import save as safetensors_bytes  # here, as importing minillm shall cost little

    write_atomically(folder / WEIGHTS, safetensors_bytes(plain, metadata))
    write_atomically(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load(
    model: Decoder, folder: str | os.PathLike[str], *, name: str = "default", trainable: bool = False
) -> list[str]:
    """Put an adapter that peft or `save` wrote onto the model, active; returns the names of the adapted modules.

    trainable: go on training it; else all is frozen. Raises CheckpointError naming fields, keys and shapes that do not
    fit, InputError for targets and patterns that do not; the model is then what it was.
    """
    path, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    config = from_peft(read_json(path), str(path), _DEFAULT_TARGETS.get(model.config.family, ("q_proj", "v_proj")))
    if not weights.is_file():
        raise CheckpointError(f"{folder}: has no {WEIGHTS}; save the adapter as safetensors")
    found, ranks = read(weights)
    _check_rank(config, found, str(weights))
    if name in adapters(model):
        raise InputError(f"the model has an adapter {name!r} already; give another name or remove it first")
    with or_as_before(model, name):
        chosen = add(model, config, name=name)
        _fill(model, name, found, ranks, str(weights))
    if not trainable:
        model.requires_grad_(False)
    return chosen


def _check_rank(config: LoraConfig, found: Mapping[str, Tensor], where: str) -> None:
    """Before memory is taken for it: no rank is larger than the largest side of any tensor."""
    most = max((size for x in found.values() for size in x.shape), default=0)
    rank = max([config.rank, *config.rank_pattern.values()])
    if rank > most:
        raise CheckpointError(f"{where}: has no tensor of rank {rank}; it and {CONFIG} do not belong together")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """All tensors, and the ranks of fused parts; CheckpointError for numbers that no adapter has.

    DoRA's magnitudes may have any sign: they are trained freely, and a row that is turned round is still one.
    """
    file = SafetensorsFile(path)  # checks the header
    try:
        found = {key: file.read(key) for key in file.layout}
    finally:
        file.close()
    for key, value in found.items():
        if value.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {key} is {value.dtype}; adapters are in 16 bits or more, save it again")
        if not value.numel():
            raise CheckpointError(f"{path}: {key} has no numbers; the adapter is broken, get or save it again")
        if not bool(value.float().isfinite().all()):
            raise CheckpointError(f"{path}: {key} holds a NaN or infinity; the training that made it went wrong")
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        text = (opened.metadata() or {}).get(_RANKS, "{}")
    try:
        ranks = {str(key): [int(each) for each in value] for key, value in json.loads(text).items()}
        if any(each < 0 for value in ranks.values() for each in value):
            raise ValueError
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(f"{path}: its metadata {_RANKS} are broken; save the adapter again") from None
    return found, ranks


def _fill(
    model: Decoder, name: str, found: Mapping[str, Tensor], ranks: Mapping[str, Sequence[int]], where: str
) -> None:
    """Give every part of the adapter its tensor; nothing may be left over on either side."""
    here, anew = sites(model, name), slots(model, name)
    wanted = [key for site in here for key in site.keys().values()] + list(anew)
    left = [key for key in found if key not in wanted and not _is_table(key, found[key], here, where)]
    missing = [key for key in wanted if key not in found]
    if missing or left:
        some = missing or left
        raise CheckpointError(
            f"{where}: {'lacks' if missing else 'holds'} {', '.join(some[:3])}{' ...' if len(some) > 3 else ''}"
            f"{nearest(some[0], left if missing else wanted)}; adapter, its {CONFIG} and the model must belong together"
        )
    for site in here:
        whole = Factors(**{part: found[key] for part, key in site.keys().items()}, scale=1.0)
        _check(site, whole, ranks.get(site.module), where)
        for adapter, part in zip(site.adapters, split(site.rule, whole, ranks.get(site.module)), strict=True):
            if adapter is not None:
                _place(adapter, part, is_shared=site.module not in ranks)
    for key, slot in anew.items():
        if not slot.is_whole:
            raise CheckpointError(f"{where}: {key} is of more than its {CONFIG} retrains; name the whole there")
        expected = [tuple(own[leaf].shape) for own, leaf in slot.places]
        whole_shape = (sum(shape[0] for shape in expected), *expected[0][1:])
        if tuple(found[key].shape) != whole_shape:
            raise CheckpointError(f"{where}: {key} has shape {tuple(found[key].shape)}; it is of another model")
        for (own, leaf), piece in zip(slot.places, slot.rule.split(found[key]), strict=True):
            own[leaf] = nn.Parameter(piece.to(own[leaf].dtype).clone())


def _check(site: Site, whole: Factors, ranks: Sequence[int] | None, where: str) -> None:
    """Shapes of the file against the model's."""
    first = next(each for each in site.adapters if each is not None)
    if ranks is not None and len(ranks) != len(site.layers):
        raise CheckpointError(f"{where}: its metadata {_RANKS} are broken; save the adapter again")
    rank = first.rank if ranks is None else sum(ranks)
    rows = (
        sum(shape_of(each)[0] for each in site.layers)
        if not isinstance(site.layers[0], LoraEmbedding)
        else first.b.shape[0]
    )
    expected = {"a": (rank, first.a.shape[1]), "b": (rows, rank), "bias": (rows,), "magnitude": (rows,)}
    for part, key in site.keys().items():
        shape = tuple(getattr(whole, part).shape)
        if shape != expected[part]:
            raise CheckpointError(
                f"{where}: {key} has shape {shape}, and the model asks for {expected[part]}; "
                "the adapter belongs to another base model or rank"
            )


def _place(adapter: Adapter, part: Factors, *, is_shared: bool) -> None:
    """Into the parameters that are there, as parts may share their A; else into parameters of their own."""
    for attribute in ("a", "b", "bias", "magnitude"):
        value, old = getattr(part, attribute), getattr(adapter, attribute)
        if value is not None and is_shared:
            with torch.no_grad():
                old.copy_(value)
        elif value is not None:
            setattr(adapter, attribute, nn.Parameter(value.to(old).contiguous().clone()))


def _is_table(key: str, value: Tensor, here: Sequence[Site], where: str) -> bool:
    """peft writes the base's own table beside an adapter on an embedding or the head; only an equal one is passed
    over."""
    for site in here:
        layer: Any = site.layers[0]
        is_table = site.rule.ours[0] in ("embed.weight", "lm_head.weight")
        if is_table and key == f"{PREFIX}{site.module}.base_layer.weight":
            if value.shape != layer.weight.shape or not bool((value.to(layer.weight) == layer.weight).all()):
                raise CheckpointError(
                    f"{where}: {key} is another table than the model's; the adapter belongs to another base model"
                )
            return True
    return False
