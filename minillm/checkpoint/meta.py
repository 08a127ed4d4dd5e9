"""Meta's own Llama checkpoints: `params.json` beside `consolidated.00.pth`, `consolidated.01.pth`, ...

Each .pth is one rank of a model-parallel run, so every matrix arrives in slices:

    wq, wk, wv, w1, w3, output    slices of the rows       joined along dim 0
    wo, w2                        slices of the columns    joined along dim 1
    tok_embeddings                columns (Llama 1, 2) or rows (Llama 3): a slice as wide as the model is rows
    norms                         the same in every rank   rank 0 is taken

Meta turns the pairs (2i, 2i+1) of a head, Hugging Face and minillm the pairs (i, i + E/2). The rows of q and k are
reordered for that, k with its *own* number of heads: with q's, a grouped-query model speaks for some twenty tokens and
then falls apart, without any error.

    rows (heads, E/2, 2)  ->  rows (heads, 2, E/2)

Feed-forward width: F = multiple_of * ceil(int(ffn_dim_multiplier * int(8 D / 3)) / multiple_of). It is read off w1
instead and only checked against that by the shapes.

params.json does not say how long a context the model knows. It is told apart by what distinguishes the releases:
scaled rope 131072 (3.1), rope_theta 500000: 8192 (3), 1000000: 16384 (Code Llama), norm_eps 1e-6: 2048 (1), else
4096 (2).
Scaled rope uses factor 8, as Meta's own code does unless params.json gives `rope_scaling_factor`; transformers' files
of Llama 3.2 say 32.

Source: transformers' convert_llama_weights_to_hf.py (v4.57), Meta's llama model.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.checkpoint.families import read_json
from minillm.checkpoint.hf_config import Fields, naming
from minillm.checkpoint.tensor_file import PickleFile
from minillm.checkpoint.weight_map import Rule, WeightMap
from minillm.config import DecoderConfig, Llama3Rope
from minillm.errors import CheckpointError, ConfigError
from minillm.memory import Empty, empty

_ROWS = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")
_COLUMNS = ("wo.weight", "w2.weight")
_EMBEDDING, _GATE, _OUT = "tok_embeddings.weight", "layers.0.feed_forward.w1.weight", "layers.0.attention.wo.weight"


def is_meta_folder(folder: Path) -> bool:
    """Whether the folder holds Meta's format and no Hugging Face config.json."""
    return (folder / "params.json").is_file() and not (folder / "config.json").is_file()


class MetaFiles:
    """The ranks of one checkpoint as whole tensors, with the reading interface of `minillm.checkpoint.shards`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob("consolidated.*.pth"))
        expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(paths))]
        if not paths or [path.name for path in paths] != expected:
            found = ", ".join(path.name for path in paths) or "none"
            raise CheckpointError(f"{folder}: expected consolidated.00.pth, .01.pth, ... without gaps, found {found}")
        self._ranks = [PickleFile(path).layout for path in paths]
        keys = set(self._ranks[0])
        for path, rank in zip(paths, self._ranks, strict=True):
            if set(rank) != keys:
                odd = sorted(set(rank) ^ keys)[0]
                raise CheckpointError(f"{path}: {odd} is in some ranks only; the files are not of one checkpoint")
            flat = [key for key in keys if key.endswith((*_ROWS, *_COLUMNS, _EMBEDDING)) and rank[key].ndim != 2]
            if flat:
                raise CheckpointError(f"{path}: tensor {flat[0]} is no matrix; the file is not Meta's Llama format")

    def keys(self) -> list[str]:
        return list(self._ranks[0])

    def shape(self, key: str) -> tuple[int, ...]:
        dim, shape = self._joined_along(key), list(self._ranks[0][key].shape)
        if dim is not None:
            shape[dim] = sum(rank[key].shape[dim] for rank in self._ranks)
        return tuple(shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._ranks[0][key].dtype

    def read(self, key: str, room: Empty = empty) -> Tensor:
        dim = self._joined_along(key)
        if dim is None:
            return self._ranks[0][key].clone()
        return torch.cat([rank[key] for rank in self._ranks], dim=dim)

    def close(self) -> None:
        self._ranks = []

    def __enter__(self) -> MetaFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _joined_along(self, key: str) -> int | None:
        if key.endswith(_ROWS):
            return 0
        if key.endswith(_COLUMNS):
            return 1
        if key == _EMBEDDING:
            width = self._ranks[0]["norm.weight"].numel()
            return 0 if self._ranks[0][key].shape[1] == width else 1
        return None


def config_from_params(folder: Path, files: MetaFiles) -> DecoderConfig:
    """params.json and the tensors' shapes -> DecoderConfig."""
    present = set(files.keys())
    for key in (_EMBEDDING, _GATE, _OUT, "norm.weight"):
        if key not in present:
            raise CheckpointError(f"{folder}: tensor {key} is missing; the .pth files are not Meta's Llama format")
    path = folder / "params.json"
    raw = read_json(path)
    if not isinstance(raw.get("model", raw), dict):
        raise CheckpointError(f"{path}: field model is no JSON object; get the file again")
    with naming(path):
        config = _config(Fields(raw.get("model", raw), str(path)), files, tied="output.weight" not in present)
    held, needed = files.shape(_OUT)[1], config.num_heads * config.head_size
    if held < needed:
        raise CheckpointError(
            f"{folder}: its .pth files hold {held} of the {needed} columns of {_OUT}; "
            "the consolidated.NN.pth of some rank is missing, get it"
        )
    return config


def _config(fields: Fields, files: MetaFiles, *, tied: bool) -> DecoderConfig:
    width, heads = fields.whole("dim"), fields.whole("n_heads")
    if width % heads and fields.get("head_dim") is None:
        raise ConfigError(f"{fields.where}: dim {width} is no multiple of n_heads {heads}; one of the two is wrong")
    for name in ("multiple_of", "ffn_dim_multiplier", "vocab_size", "max_batch_size"):
        fields.get(name)  # what these say, the shapes say too
    theta, eps = fields.number("rope_theta", 10_000.0), fields.number("norm_eps", 1e-5)
    scaled = fields.flag("use_scaled_rope")
    scaling = Llama3Rope(
        factor=fields.number("rope_scaling_factor", 8.0),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context=8192,
    )
    config = DecoderConfig(
        vocab_size=files.shape(_EMBEDDING)[0],
        hidden_size=width,
        num_layers=fields.whole("n_layers"),
        num_heads=heads,
        num_kv_heads=fields.whole("n_kv_heads", heads),
        head_size=fields.whole("head_dim", width // heads),
        ffn_size=files.shape(_GATE)[0],
        context=fields.whole("max_seq_len", _context(scaled, theta, eps)),
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling if scaled else None,
        tied_embeddings=tied,
    )
    fields.finish()
    return config


def _context(scaled: bool, theta: float, eps: float) -> int:
    if scaled:
        return 131_072
    by_theta: Mapping[float, int] = {500_000.0: 8192, 1_000_000.0: 16_384}
    return by_theta.get(theta, 2048 if eps == 1e-6 else 4096)


def to_half_split(weight: Tensor, *, heads: int) -> Sequence[Tensor]:
    """Rows in Meta's order (pairs 2i, 2i+1 of each head) -> half-split order (pairs i, i + E/2): (heads E, D) -> same.

    >>> to_half_split(torch.arange(4.)[:, None], heads=1)[0].flatten().tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    rows, width = weight.shape
    return (weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width),)


def to_interleaved(weights: Sequence[Tensor], *, heads: int) -> Tensor:
    """The inverse of `to_half_split`."""
    rows, width = weights[0].shape
    return weights[0].view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def weight_map(config: DecoderConfig) -> WeightMap:
    """Meta's names -> ours; `rope.freqs` is recomputed."""
    return WeightMap(rules=tuple(_rules(config)), prefix="layers.", dropped=(r"rope\.freqs",))


def _rules(config: DecoderConfig) -> Iterator[Rule]:
    yield Rule("tok_embeddings.weight", ("embed.weight",))
    renamed = {
        "attention_norm": "attention_norm",
        "attention.wv": "attention.v_proj",
        "attention.wo": "attention.o_proj",
        "ffn_norm": "mlp_norm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    }
    turned = {"wq": ("q_proj", config.num_heads), "wk": ("k_proj", config.num_kv_heads)}
    for n in range(config.num_layers):
        for theirs, ours in renamed.items():
            yield Rule(f"layers.{n}.{theirs}.weight", (f"blocks.{n}.{ours}.weight",))
        for theirs, (ours, heads) in turned.items():
            yield Rule(
                f"layers.{n}.attention.{theirs}.weight",
                (f"blocks.{n}.attention.{ours}.weight",),
                split=partial(to_half_split, heads=heads),
                join=partial(to_interleaved, heads=heads),
            )
    yield Rule("norm.weight", ("norm.weight",))
    if not config.tied_embeddings:
        yield Rule("output.weight", ("lm_head.weight",))


def generation_defaults(config: DecoderConfig) -> dict[str, Any]:
    """The token ids that Meta's tokenizers fix: Llama 3's vocabulary is the only one above 100,000."""
    if config.vocab_size > 100_000:
        return {"bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009]}
    return {"bos_token_id": 1, "eos_token_id": 2}
