"""Which files a checkpoint is made of, and the proof that each lies where it may.

    model.safetensors                     one file, or
    model.safetensors.index.json          {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}
    model-00001-of-00003.safetensors ...  and the shards that the index names

An index comes with the download and is not to be trusted: `weight_map` may say "../../other/model.safetensors", and a
file may be a link to anywhere. Names must be single path components; files, links resolved, must lie inside the folder,
except that a hub cache keeps a repository's files as blobs beside its snapshots and links to them:

    models--owner--name/snapshots/<commit>/model.safetensors -> ../../blobs/<hash>
    models--owner--name/blobs/<hash>                         -> ../../blobs/<prefix>/<hash>   shared by repositories

Where we differ: transformers joins the names to the folder unchecked (its issue 46097). Like transformers we take the
single file where a folder holds it and an index, because its `save_pretrained` leaves the other one behind.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minillm.checkpoint.safetensors_header import HEADER_LIMIT, parse_json_object
from minillm.errors import CheckpointError


@dataclass(frozen=True)
class WeightFormat:
    """The names that one kind of weight file goes by."""

    single: str
    suffix: str

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"


SAFETENSORS = WeightFormat("model.safetensors", ".safetensors")
PICKLE = WeightFormat("pytorch_model.bin", ".bin")


def formats(allow_pickle: bool) -> Iterator[WeightFormat]:
    """The kinds of weight file to look for, best first."""
    yield SAFETENSORS
    if allow_pickle:
        yield PICKLE


def read_index(folder: Path, kind: WeightFormat) -> dict[str, str]:
    """`weight_map` of the index in a folder: tensor name -> file name, every file name a single path component.

    Raises `CheckpointError` for what is no such JSON object, or names a file outside the folder.
    """
    path = folder / kind.index
    real = confined(folder, kind.index)
    if real.stat().st_size > HEADER_LIMIT:
        raise CheckpointError(f"{path}: is larger than {HEADER_LIMIT:,} bytes; this is no index of a checkpoint")
    weight_map = parse_json_object(real.read_bytes(), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map of tensor names to files; get the file again")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _is_component(name, kind.suffix):
            raise CheckpointError(
                f"{path}: tensor {key!r:.120} lies in {name!r:.120}, which is no plain name of a *{kind.suffix} file "
                "in the same folder; do not trust this checkpoint"
            )
    return weight_map


def confined(folder: Path, name: str) -> Path:
    """The real path of a regular file of the folder. Raises `CheckpointError` if it is missing or a link leads out."""
    root, real = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    if not any(allowed in real.parents for allowed in _allowed_roots(root)):
        raise CheckpointError(
            f"{folder / name}: is a link to {real}, outside its folder; copy the file there if you trust it"
        )
    if not real.is_file():  # also refuses a pipe, which would block for ever
        raise CheckpointError(f"{folder / name}: is missing, a broken link or no regular file; get the file again")
    return real


def _allowed_roots(root: Path) -> list[Path]:
    repository = root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [root, repository / "blobs", repository.parent / "blobs"]
    return [root]


def _is_component(name: str, suffix: str) -> bool:
    return re.fullmatch(r"[^/\\:\x00-\x1f]{1,255}", name) is not None and name.endswith(suffix)
