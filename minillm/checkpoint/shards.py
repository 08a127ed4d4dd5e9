"""The tensors of a checkpoint folder by name, whatever files they lie in; and such a folder written.

    with open_checkpoint(folder) as files:
        for key in files.keys():
            tensor = files.read(key)          # memory of its own, nothing mapped

    save_checkpoint(tensors, tensors.__getitem__, folder)

Opening checks everything that can be checked without reading weights (headers, sizes, the index against the shards), so
that a bad file is named before a minute of loading, and holds every file open, so that replacing the folder's files
while it is read does no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from minillm.atomic import atomic_file, flush_to_disk
from minillm.checkpoint.index import PICKLE, SAFETENSORS, WeightFormat, confined, formats, read_index
from minillm.checkpoint.safetensors_header import ShapeAndDtype, count_bytes, write_header
from minillm.checkpoint.tensor_file import PickleFile, SafetensorsFile, TensorFile, as_bytes
from minillm.errors import CheckpointError, nearest
from minillm.memory import Empty, empty


class TensorFiles:
    """Named tensors out of one or more files, read one at a time. A context manager; `close` lets the files go."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        self._files = list(files)
        self._holder = {key: file for file in self._files for key in file.layout}

    def keys(self) -> list[str]:
        """Every name, in the order of the bytes: reading in this order reads the disk forwards."""
        return list(self._holder)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file(key).layout[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._file(key).layout[key].dtype

    def file_of(self, key: str) -> Path:
        return self._file(key).path

    def read(self, key: str, room: Empty = empty) -> torch.Tensor:
        """The tensor on the CPU, contiguous, in memory that `room` gives: by default its own.

        Raises `CheckpointError` for an unknown name, and for a file that was cut or rewritten since it was opened.
        """
        return self._file(key).read(key, room)

    @property
    def total_bytes(self) -> int:
        return sum(count_bytes(spec) for file in self._files for spec in file.layout.values())

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, key: str) -> TensorFile:
        if key not in self._holder:
            raise CheckpointError(f"no tensor is called {key!r} in this checkpoint{nearest(key, self._holder)}")
        return self._holder[key]


def open_checkpoint(folder: str | os.PathLike[str], *, allow_pickle: bool = False) -> TensorFiles:
    """Open the weights of a folder: `model.safetensors`, or the shards of `model.safetensors.index.json`.

    allow_pickle: where there are neither, also `pytorch_model.bin` and its index, through
    `torch.load(weights_only=True)`.

    Raises `CheckpointError` for a folder without weights, a file that is missing, cut, malformed or outside the folder,
    and an index that does not say exactly what the shards hold.
    """
    folder = Path(folder)
    for kind in formats(allow_pickle):
        if os.path.lexists(folder / kind.single):
            return TensorFiles([_open_file(folder, kind.single, kind)])
        if os.path.lexists(folder / kind.index):
            return _open_shards(folder, kind)
    raise CheckpointError(_no_weights(folder, allow_pickle))


def _open_file(folder: Path, name: str, kind: WeightFormat) -> TensorFile:
    confined(folder, name)
    return SafetensorsFile(folder / name) if kind is SAFETENSORS else PickleFile(folder / name)


def _open_shards(folder: Path, kind: WeightFormat) -> TensorFiles:
    weight_map = read_index(folder, kind)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not os.path.lexists(folder / name)]
    if missing:
        lost = sum(name in missing for name in weight_map.values())
        raise CheckpointError(
            f"{folder / kind.index}: names {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}, not in the "
            f"folder: {lost} of {len(weight_map)} tensors are missing; get the checkpoint again"
        )
    with contextlib.ExitStack() as on_failure:
        files = []
        for name in names:
            files.append(_open_file(folder, name, kind))
            on_failure.callback(files[-1].close)
            _check_same_names(folder / kind.index, weight_map, name, files[-1].layout)
        on_failure.pop_all()
    return TensorFiles(files)


def _check_same_names(index: Path, weight_map: Mapping[str, str], name: str, held: Mapping[str, object]) -> None:
    named = {key for key, file in weight_map.items() if file == name}
    for key in sorted(named - held.keys()):
        raise CheckpointError(
            f"{index}: places tensor {key!r:.120} in {name}, which does not hold it{nearest(key, held)}; "
            "index and shards are of different checkpoints"
        )
    for key in sorted(held.keys() - named):
        elsewhere = f"places it in {weight_map[key]}" if key in weight_map else "does not name it"
        raise CheckpointError(
            f"{index.parent / name}: holds tensor {key!r:.120}, but the index {elsewhere}; "
            "index and shards are of different checkpoints"
        )


def _no_weights(folder: Path, allow_pickle: bool) -> str:
    looked_for = " or ".join(f"{kind.single} or {kind.index}" for kind in formats(allow_pickle))
    present = sorted(os.listdir(folder)) if folder.is_dir() else []
    if not allow_pickle and (PICKLE.single in present or PICKLE.index in present):
        mend = f"only pickled weights ({PICKLE.suffix}) are there, which allow_pickle=True reads"
    elif others := [name for name in present if name.endswith(SAFETENSORS.suffix)]:
        mend = f"{', '.join(others[:3])} is there without an index"
    else:
        mend = "get the weights, or give another folder"
    return f"{folder}: no weights; looked for {looked_for}; {mend}"


def save_checkpoint(
    layout: Mapping[str, ShapeAndDtype],
    produce: Callable[[str], torch.Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 10**9,
    beside: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write tensors as `model.safetensors`, or as numbered shards and their index where one file would be too large.

    layout: name -> anything with a shape and a dtype (meta tensors will do).
    produce: name -> that tensor, on any device, asked for when its turn comes: one at a time is in memory.
    beside: name -> text of small files that belong to these weights (config.json).
    Names, split and bytes are those of transformers and the safetensors library; tensors are filled into shards in the
    order of `layout`, a larger one gets a shard to itself.

    Everything is written and on the disk under temporary names before the first file appears. Then older files of
    `beside` go, the shards appear, the index, and last those of `beside`: stopped in between, the folder lacks its
    config.json rather than mixing two models. On any exception nothing new stays.
    Raises `CheckpointError` for a dtype the format lacks and for a disk that does not take it, ValueError for a tensor
    that is not what `layout` promised.
    """
    folder = Path(folder)
    shards = _split(layout, max_shard_bytes)
    headers = {
        name: write_header({key: layout[key] for key in keys}, {"format": "pt"}) for name, keys in shards.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as unnamed:  # unwinds in reverse: what is entered first is renamed last
            for name, text in beside.items():
                unnamed.enter_context(atomic_file(folder / name)).write(text.encode())
            if len(shards) > 1:
                index = unnamed.enter_context(atomic_file(folder / SAFETENSORS.index))
                index.write(_index_text(layout, shards).encode())
            for name, (header, order) in headers.items():
                file = unnamed.enter_context(atomic_file(folder / name))
                file.write(header)
                for key in order:
                    file.write(_bytes_of(key, produce(key), layout[key]))
                flush_to_disk(file)
            for name in beside:
                (folder / name).unlink(missing_ok=True)
        _remove_stale(folder, {*shards, *([SAFETENSORS.index] if len(shards) > 1 else [])})
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error.strerror}); free space or choose another"
        ) from error


def _split(layout: Mapping[str, ShapeAndDtype], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names."""
    if not layout:
        raise CheckpointError("there are no tensors to save; give a model with parameters")
    shards: list[list[str]] = [[]]  # the last is the one being filled
    filled = 0
    for key, spec in layout.items():
        size = count_bytes(spec)
        if size > max_shard_bytes:
            shards.insert(-1, [key])
            continue
        if filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    shards = [keys for keys in shards if keys]
    if len(shards) == 1:
        return {SAFETENSORS.single: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": keys for n, keys in enumerate(shards, 1)}


def _index_text(layout: Mapping[str, ShapeAndDtype], shards: Mapping[str, list[str]]) -> str:
    total = sum(count_bytes(spec) for spec in layout.values())
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def _bytes_of(key: str, tensor: torch.Tensor, spec: ShapeAndDtype) -> memoryview:
    if tuple(tensor.shape) != tuple(spec.shape) or tensor.dtype != spec.dtype:
        raise ValueError(
            f"tensor {key!r} came as {tuple(tensor.shape)} {tensor.dtype}, "
            f"announced as {tuple(spec.shape)} {spec.dtype}"
        )
    return as_bytes(tensor.detach().to("cpu").contiguous())


def _remove_stale(folder: Path, written: set[str]) -> None:
    for name in os.listdir(folder):
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", name) and name not in written:
            (folder / name).unlink()
