"""Folders of weights: which files are read, what is refused, and what a save leaves behind."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from minillm.checkpoint import tensor_file
from minillm.checkpoint.shards import open_checkpoint, save_checkpoint
from minillm.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (8, 4), "0.wq": (4, 4), "0.wk": (2, 4), "0.norm": (4,), "1.wq": (4, 4), "head": (8, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def read_all(folder: Path, **options: bool) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder, **options) as files:
        keys = files.keys()
        return {key: files.read(key) for key in keys}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def write_two_shards(folder: Path, change: Callable[[dict[str, Any]], None] = lambda index: None) -> None:
    """Shards {a, b} and {c} with their index, which `change` may spoil."""
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / SHARDS[0])
    safetensors.torch.save_file({"c": torch.ones(4)}, folder / SHARDS[1])
    index = {"metadata": {"total_size": 36}, "weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}}
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder: Path, **options: bool) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder, **options)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


# --- reading ---------------------------------------------------------------------------------------------------------


def test_two_shards_read_as_one(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    with open_checkpoint(tmp_path) as files:
        assert files.keys() == ["a", "b", "c"]
        assert files.file_of("c") == tmp_path / SHARDS[1]
        assert files.shape("b") == (3,)
        assert files.total_bytes == 36
        assert torch.equal(files.read("c"), torch.ones(4))
        with pytest.raises(CheckpointError, match="no tensor is called 'd'"):
            files.read("d")


def test_the_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    safetensors.torch.save_file({"single": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(read_all(tmp_path)) == ["single"]


def test_a_tensor_outlives_its_file(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.arange(5000.0)}, tmp_path / "model.safetensors")
    tensor = read_all(tmp_path)["w"]
    os.truncate(tmp_path / "model.safetensors", 0)  # a mapped tensor would end the process at its next use
    assert torch.equal(tensor, torch.arange(5000.0))
    tensor.add_(1)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 100])
def test_threads_read_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, size: int) -> None:
    monkeypatch.setattr(tensor_file, "_WORTH_THREADS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensors = {"before": torch.zeros(3, dtype=torch.uint8), "w": torch.arange(size, dtype=torch.uint8)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert_same(read_all(tmp_path), tensors)


def test_reads_without_preadv_as_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    safetensors.torch.save_file(some_tensors(), tmp_path / "model.safetensors")
    assert_same(read_all(tmp_path), some_tensors())


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(tensor_file, "_WORTH_THREADS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    safetensors.torch.save_file({"a": torch.ones(4), "w": torch.ones(5000)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as files:
        os.truncate(tmp_path / "model.safetensors", 9000)
        with pytest.raises(CheckpointError, match="changed while tensor 'w' was read"):
            files.read("w")


def test_a_file_rewritten_in_place_is_an_error_and_a_replaced_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones(4)}, path)
    os.utime(path, ns=(0, 0))  # so that the rewriting shows whatever the clock's grain
    with open_checkpoint(tmp_path) as files:
        save_checkpoint({"w": torch.zeros(4)}, lambda key: torch.zeros(4), tmp_path)
        assert torch.equal(files.read("w"), torch.ones(4))
    with open_checkpoint(tmp_path) as files:
        os.utime(path, ns=(0, 0))
        with pytest.raises(CheckpointError, match="changed while tensor 'w' was read"):
            files.read("w")


# --- what an index may not say ---------------------------------------------------------------------------------------


def spoil(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].__setitem__(key, value)


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\x.safetensors", "a\0.safetensors"),
        *("c:x.safetensors", "..", "", "x.bin", "x.pth", "x\n.safetensors", 3, None, ["x.safetensors"]),
    ],
)
def test_an_index_names_plain_files_only(tmp_path: Path, name: Any) -> None:
    safetensors.torch.save_file({"c": torch.ones(4)}, tmp_path.parent / "x.safetensors")  # to be found, if followed
    write_two_shards(tmp_path, spoil("c", name))
    message = refused(tmp_path)
    assert f"tensor 'c' lies in {name!r}, which is no plain name" in message


def test_a_missing_shard_is_named_with_what_is_lost(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    (tmp_path / SHARDS[0]).unlink()
    assert f"names {SHARDS[0]}, not in the folder: 2 of 3 tensors are missing" in refused(tmp_path)


def test_a_tensor_that_its_shard_does_not_hold(tmp_path: Path) -> None:
    write_two_shards(tmp_path, spoil("d", SHARDS[1]))
    assert f"places tensor 'd' in {SHARDS[1]}, which does not hold it" in refused(tmp_path)


def test_a_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    write_two_shards(tmp_path, lambda index: index["weight_map"].pop("b"))
    assert "holds tensor 'b', but the index does not name it" in refused(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    safetensors.torch.save_file({"c": torch.ones(4), "a": torch.zeros(2)}, tmp_path / SHARDS[1])
    assert f"holds tensor 'a', but the index places it in {SHARDS[0]}" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the name 'a' stands twice"),
    ],
)
def test_a_malformed_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text)
    found = refused(tmp_path)
    assert message in found
    assert INDEX in found


# --- links -----------------------------------------------------------------------------------------------------------


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(4)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../secret.safetensors")
    assert "is a link to" in refused(folder)
    (folder / "model.safetensors").unlink()
    write_two_shards(folder)
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to(tmp_path / "secret.safetensors")
    assert f"{SHARDS[1]}: is a link to" in refused(folder)
    (folder / INDEX).rename(tmp_path / INDEX)
    (folder / INDEX).symlink_to(tmp_path / INDEX)
    assert f"{INDEX}: is a link to" in refused(folder)


def test_links_inside_the_folder_are_followed_and_so_is_a_link_to_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file({"w": torch.ones(4)}, folder / "real.safetensors")
    (folder / "model.safetensors").symlink_to("real.safetensors")
    (tmp_path / "alias").symlink_to("model")
    assert list(read_all(tmp_path / "alias")) == ["w"]


def test_a_hub_cache_may_link_to_its_blobs_and_no_further(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123"
    for folder in (snapshot, repository / "blobs", tmp_path / "blobs" / "ab", tmp_path / "models--other--x" / "blobs"):
        folder.mkdir(parents=True)
    link = snapshot / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones(4)}, repository / "blobs" / "hash")
    link.symlink_to("../../blobs/hash")
    assert list(read_all(snapshot)) == ["w"]
    # the cache's store of blobs that several repositories share
    (repository / "blobs" / "hash").rename(tmp_path / "blobs" / "ab" / "hash")
    (repository / "blobs" / "hash").symlink_to("../../blobs/ab/hash")
    assert list(read_all(snapshot)) == ["w"]
    # another repository's blob
    (tmp_path / "blobs" / "ab" / "hash").rename(tmp_path / "models--other--x" / "blobs" / "hash")
    (repository / "blobs" / "hash").unlink()
    (repository / "blobs" / "hash").symlink_to("../../models--other--x/blobs/hash")
    assert "is a link to" in refused(snapshot)


def test_broken_links_and_pipes_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")  # a circle
    assert "broken link" in refused(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert "no regular file" in refused(tmp_path)


# --- pickles and nothing at all --------------------------------------------------------------------------------------


class Trap:
    """A pickle of this makes a folder when it is loaded without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    assert f"looked for model.safetensors or {INDEX}" in refused(tmp_path)
    assert "pytorch_model.bin.index.json" in refused(tmp_path, allow_pickle=True)
    assert "no weights" in refused(tmp_path / "absent")
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / SHARDS[0])
    assert f"{SHARDS[0]} is there without an index" in refused(tmp_path)


def test_a_pickle_needs_the_flag_and_safetensors_go_first(tmp_path: Path) -> None:
    torch.save({"p": torch.ones(4)}, tmp_path / "pytorch_model.bin")
    assert "allow_pickle=True" in refused(tmp_path)
    assert list(read_all(tmp_path, allow_pickle=True)) == ["p"]
    safetensors.torch.save_file({"s": torch.ones(4)}, tmp_path / "model.safetensors")
    assert list(read_all(tmp_path, allow_pickle=True)) == ["s"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_reads_as_tensors_of_their_own(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"t": base.T, "tied": base}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = read_all(tmp_path, allow_pickle=True)
    assert_same(found, {"t": base.T, "tied": base})
    assert all(tensor.is_contiguous() for tensor in found.values())
    found["t"].zero_()
    assert torch.equal(found["tied"], base)


def test_pickled_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {key: f"pytorch_model-0000{n}-of-00002.bin" for n, key in enumerate("ab", 1)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert list(read_all(tmp_path, allow_pickle=True)) == ["a", "b"]


def test_a_hostile_or_damaged_pickle_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": Trap(tmp_path / "trapped")}, path)
    message = refused(tmp_path, allow_pickle=True)
    assert "weights_only=True) refuses it" in message
    assert not (tmp_path / "trapped").exists()
    torch.save({"w": torch.ones(100)}, path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "refuses it" in refused(tmp_path, allow_pickle=True)


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)],
        {"model": {"w": torch.ones(1)}},
        {1: torch.ones(1)},
        {"n": 3},
        {"sparse": torch.sparse_coo_tensor([[0]], [1.0], (4,), check_invariants=True)},
    ],
)
def test_a_pickle_of_anything_but_named_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert "convert" in refused(tmp_path, allow_pickle=True)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 64, 100, 128, 200, 300, 10**9])
def test_split_and_names_are_those_of_transformers(tmp_path: Path, limit: int) -> None:
    tensors = some_tensors()
    save_checkpoint(tensors, tensors.__getitem__, tmp_path, max_shard_bytes=limit)
    theirs = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    names = sorted(theirs.filename_to_tensors)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, *([INDEX] if len(names) > 1 else [])])
    for name, keys in theirs.filename_to_tensors.items():
        assert_same(safetensors.torch.load_file(tmp_path / name), {key: tensors[key] for key in keys})
    if len(names) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}
    assert_same(read_all(tmp_path), tensors)


def test_one_tensor_at_a_time_is_alive(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def produce(key: str) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = torch.ones(4, 4)
        alive.append(weakref.ref(tensor))
        return tensor

    layout = {f"w{n}": torch.empty(4, 4, device="meta") for n in range(8)}
    save_checkpoint(layout, produce, tmp_path, max_shard_bytes=128)
    assert most == 0  # while one is being made, none before it is left


@pytest.mark.parametrize(("before", "after"), [(10**9, 100), (100, 10**9), (100, 200), (100, 100)])
def test_saving_over_the_folder_it_comes_from(tmp_path: Path, before: int, after: int) -> None:
    tensors = some_tensors()
    save_checkpoint(tensors, tensors.__getitem__, tmp_path, max_shard_bytes=before)
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as files:
        keys = files.keys()
        layout = {key: torch.empty(files.shape(key), dtype=files.dtype(key), device="meta") for key in keys}
        save_checkpoint(layout, files.read, tmp_path, max_shard_bytes=after)
    assert_same(read_all(tmp_path), tensors)
    names = [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]
    assert ("model.safetensors" in names) == (after == 10**9)
    assert len({name[-17:] for name in names}) == 1  # one count in "-of-0000n.safetensors": no stale shard
    assert (tmp_path / INDEX).exists() == (after != 10**9)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_broken_save_leaves_the_earlier_one_and_nothing_else(tmp_path: Path, fault: type[BaseException]) -> None:
    tensors = some_tensors()
    save_checkpoint(tensors, tensors.__getitem__, tmp_path, max_shard_bytes=200)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def produce(key: str) -> torch.Tensor:
        if key == "head":
            raise fault
        return torch.zeros_like(tensors[key])

    for limit in (100, 200, 10**9):
        with pytest.raises(fault):
            save_checkpoint(tensors, produce, tmp_path, max_shard_bytes=limit)
        assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_the_index_appears_last_and_old_files_go_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = some_tensors()
    save_checkpoint(tensors, tensors.__getitem__, tmp_path)
    appeared: list[str] = []
    replace = os.replace

    def watch(source: str, target: Path) -> None:
        assert (tmp_path / "model.safetensors").exists()
        replace(source, target)
        appeared.append(target.name)

    monkeypatch.setattr(os, "replace", watch)
    save_checkpoint(tensors, tensors.__getitem__, tmp_path, max_shard_bytes=200)
    assert appeared[-1] == INDEX
    assert sorted(appeared) == sorted(os.listdir(tmp_path))


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        save_checkpoint({"w": torch.ones(1)}, lambda key: torch.ones(1), tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint({"w": torch.ones(1)}, lambda key: torch.ones(1), tmp_path / "file")


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.ones(2, dtype=torch.float16)])
def test_a_tensor_that_is_not_what_the_layout_promised(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="tensor 'w' came as"):
        save_checkpoint({"w": torch.ones(2)}, lambda key: tensor, tmp_path)
    assert os.listdir(tmp_path) == []


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensors to save"):
        save_checkpoint({}, {}.__getitem__, tmp_path)
