"""The safetensors format against the safetensors library: same bytes out, same tensors in, the same files refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from minillm.checkpoint.safetensors_header import DTYPES, HEADER_LIMIT
from minillm.checkpoint.shards import open_checkpoint, save_checkpoint
from minillm.errors import CheckpointError


def every_dtype() -> dict[str, torch.Tensor]:
    """One small tensor of each dtype, of random bits, under names that sort otherwise than their dtypes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (name, dtype) in enumerate(sorted(DTYPES.items())):
        high = 2 if dtype == torch.bool else 256
        bits = torch.randint(0, high, (3, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{number:02d}.{name}"] = bits.view(dtype)
    return tensors


AWKWARD = {
    "scalar": torch.tensor(1.5),
    "none": torch.empty(0, 3),
    'é"\n\u2028 name': torch.arange(5, dtype=torch.int64),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def test_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = every_dtype() | AWKWARD
    save_checkpoint(tensors, tensors.__getitem__, tmp_path)
    theirs = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}, {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == theirs


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = every_dtype() | {name: tensor.contiguous() for name, tensor in AWKWARD.items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as files:
        assert set(files.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = files.read(name)
            assert found.dtype == files.dtype(name) == tensor.dtype
            assert found.shape == files.shape(name) == tensor.shape
            assert found.is_contiguous()
            assert bits(found) == bits(tensor)
        assert files.total_bytes == sum(tensor.nbytes for tensor in tensors.values())


def file_of(header: Any, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD = {
    "nothing": (b"", "cut short inside its header"),
    "half a length": (b"\x08\x00\x00", "cut short inside its header"),
    "no header": ((100).to_bytes(8, "little") + b"{}", "cut short inside its header"),
    "huge header": ((HEADER_LIMIT + 1).to_bytes(8, "little") + b"{}", "claims a header of 100,000,001 bytes"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "list": (file_of([]), "must hold a JSON object, not list"),
    "bad JSON": (file_of(b'{"a":'), "no valid JSON"),
    "bad UTF-8": (file_of(b'{"\xff":1}'), "no valid JSON"),
    "deep": (file_of(b'{"a":' + b"[" * 100_000), "no valid JSON"),
    "long number": (file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'), ""),
    "not an object": (file_of({"w": 1}), "'w' lacks dtype"),
    "no dtype": (file_of({"w": {"shape": [4], "data_offsets": [0, 16]}}), "'w' lacks dtype"),
    "no shape": (file_of({"w": {"dtype": "F32", "data_offsets": [0, 16]}}), "'w' lacks dtype"),
    "no offsets": (file_of({"w": {"dtype": "F32", "shape": [4]}}), "'w' lacks dtype"),
    "unknown dtype": (file_of({"w": tensor(dtype="F31")}), "'w' has dtype 'F31'; minillm reads"),
    "dtype a list": (file_of({"w": tensor(dtype=["F32"])}), "'w' has dtype"),
    "negative": (file_of({"w": tensor(shape=[-4])}), "'w' has a shape or data_offsets that are not whole"),
    "two negatives": (file_of({"w": tensor(shape=[-2, -2])}), "not whole numbers"),
    "float": (file_of({"w": tensor(shape=[4.0])}), "not whole numbers"),
    "true": (file_of({"w": tensor(shape=[4, True])}), "not whole numbers"),
    "shape a number": (file_of({"w": tensor(shape=4)}), "not whole numbers"),
    "three offsets": (file_of({"w": tensor(offsets=[0, 8, 16])}), "not whole numbers"),
    "backwards": (file_of({"w": tensor(offsets=[16, 0])}), "span -16"),
    "too few bytes": (file_of({"w": tensor(shape=[5])}), "takes 20 bytes, but its data_offsets span 16"),
    "overflow": (file_of({"w": tensor(shape=[2**62, 2**62])}), "'w' has a shape too large"),
    "overflow by 0": (file_of({"w": tensor(shape=[2**62, 4, 0], offsets=[0, 0])}, b""), "'w' has a shape too large"),
    "hole first": (file_of({"w": tensor(shape=[2], offsets=[8, 16])}), "'w' leaves a hole"),
    "hole": (
        file_of({"v": tensor(shape=[1], offsets=[0, 4]), "w": tensor(shape=[1], offsets=[12, 16])}),
        "'w' leaves a hole before it",
    ),
    "overlap": (file_of({"v": tensor(), "w": tensor()}), "overlaps the tensor before it"),
    "extra bytes": (file_of({"w": tensor()}, bytes(17)), "has 1 bytes after its last tensor"),
    "metadata": (file_of({"__metadata__": {"a": 1}, "w": tensor()}), "__metadata__ must map strings to strings"),
    "metadata a list": (file_of({"__metadata__": [], "w": tensor()}), "__metadata__ must map strings to strings"),
}


def library_refuses(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return True
    return False


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_refused_by_us_and_by_the_library(tmp_path: Path, fault: str) -> None:
    data, message = BAD[fault]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert library_refuses(data)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    entry = json.dumps(tensor())
    (tmp_path / "model.safetensors").write_bytes(file_of(f'{{"w": {entry}, "w": {entry}}}'.encode()))
    with pytest.raises(CheckpointError, match="the name 'w' stands twice"):
        open_checkpoint(tmp_path)


def test_every_prefix_is_refused_and_names_the_first_tensor_that_is_cut(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(5), "c": torch.ones(0), "d": torch.ones(2)}
    whole = safetensors.torch.save(tensors)
    start = len(whole) - 40
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        cut = "header" if length < start else "'a'" if length < start + 12 else "'b'" if length < start + 32 else "'d'"
        with pytest.raises(CheckpointError, match=cut):
            open_checkpoint(tmp_path)
        assert library_refuses(whole[:length])


def test_random_damage_is_never_believed_where_the_library_does_not(tmp_path: Path) -> None:
    """Damaged headers: what the library refuses we refuse, and what both accept reads the same."""
    whole = safetensors.torch.save({"a": torch.arange(4.0), "b.c": torch.ones(2, 2, dtype=torch.bfloat16)})
    chance, path = random.Random(0), tmp_path / "model.safetensors"
    accepted = 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2))):
            damaged[chance.randrange(len(whole) - 24)] = chance.choice(b'0123456789,:"[]{}abF \x00\xff')
        path.unlink(missing_ok=True)  # writing over a file costs some filesystems a flush
        path.write_bytes(damaged)
        try:
            files = open_checkpoint(tmp_path)
        except CheckpointError:
            continue
        theirs = dict(safetensors.deserialize(bytes(damaged)))  # raises, and so fails, where the library refuses
        assert set(files.keys()) == set(theirs)
        for name in theirs:
            assert bits(files.read(name)) == bytes(theirs[name]["data"])
        files.close()
        accepted += 1
    assert 0 < accepted < 1000  # else the damage was too mild or too hard to tell anything


def test_a_dtype_the_format_lacks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    layout = {"w": torch.empty(2, dtype=torch.complex128, device="meta")}
    with pytest.raises(CheckpointError, match=r"tensor 'w' is torch\.complex128, which safetensors cannot hold"):
        save_checkpoint(layout, layout.__getitem__, tmp_path / "out")
    assert not (tmp_path / "out").exists()
