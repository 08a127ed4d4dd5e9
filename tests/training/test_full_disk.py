"""A disk that is full while a run saves: one line, exit 2, nothing half-written, and the checkpoint before is whole.

Twice: on a file system of a few kilobytes of our own (where the system lets a user make one), and with a limit on the
size of files, which fails a write in the same place with another reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import minillm
from minillm.errors import CheckpointError
from tests import decoders, tiny_checkpoint
from tests.training.forks import STATE, WEIGHTS, Ended, Forks, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield Runs(forks, tmp_path_factory.mktemp("runs"))


def refused(ended: Ended, path: Path, reason: str = "File too large") -> None:
    assert ended.status == 2, ended.said
    assert "Traceback" not in ended.said
    assert ended.said.splitlines()[-1] == f"error: {path}: cannot be written ({reason}); free space or choose another"


def is_clean(folder: Path) -> bool:
    """Nothing half-written, and nothing that would be taken for a finished run."""
    return not [name for name in os.listdir(folder) if name.startswith((".", "adapter", "model", "config"))]


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_a_state_that_does_not_fit_leaves_the_one_before(runs: Runs) -> None:
    begun = runs.killed_after_saving(3)
    state = (begun / STATE).read_bytes()
    refused(runs.into(begun, "--resume", largest_file=len(state) - 1), begun / STATE)
    assert is_clean(begun)
    assert (begun / STATE).read_bytes() == state
    runs.finish(begun)
    runs.check(begun)


def test_an_adapter_that_does_not_fit_leaves_the_state(runs: Runs) -> None:
    begun = runs.killed_after_saving(40)
    limit = (runs.straight / WEIGHTS).stat().st_size - 1
    assert max(len(content) for name, content in files(runs.straight).items() if "token" in name) < limit
    before = (begun / STATE).read_bytes()
    refused(runs.into(begun, "--resume", largest_file=limit), begun / WEIGHTS)
    assert (begun / STATE).read_bytes() == before
    assert is_clean(begun)
    runs.finish(begun)
    runs.check(begun)


def test_a_model_that_does_not_fit_leaves_nothing(runs: Runs) -> None:
    output = runs.fresh()
    limit = (runs.folder / "base" / "model.safetensors").stat().st_size - 1
    full = ("--method", "full", "--save-minutes", "99", "--steps", "2")
    refused(runs.into(output, *full, largest_file=limit), output / "model.safetensors")
    assert is_clean(output)


FULL = 'mkdir -p "$1" && mount -t tmpfs -o size=$2 tmpfs "$1" && shift 2 && exec "$@"'


@pytest.fixture
def small(tmp_path: Path, runs: Runs) -> Iterator[tuple[Forks, Path, Path]]:
    """A server that sees an empty disk for one state and a half; the disk as it sees it, and as we see it."""
    size = (runs.killed_after_saving(40) / STATE).stat().st_size * 3 // 2 // 4096 * 4096
    disk = tmp_path / "disk"
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", FULL, "sh", str(disk), str(size))
    try:
        made = subprocess.run([*prefix, "true"], capture_output=True, timeout=60, check=False).returncode == 0
    except OSError:
        made = False
    if not made:
        pytest.skip("no user namespaces here, so no file system of one's own")
    with Forks(tmp_path, prefix) as forks:
        yield forks, disk, Path(f"/proc/{forks.pid}/root{disk}")


def test_a_disk_with_room_for_one_state_keeps_the_first(small: tuple[Forks, Path, Path], runs: Runs) -> None:
    """And what is there can be gone on with elsewhere, as long as the recipe is the same."""
    forks, disk, seen = small
    refused(forks.run(*runs.arguments(disk / "run")), disk / "run" / STATE, "No space left on device")
    assert STATE in os.listdir(seen / "run") and is_clean(seen / "run")
    output = runs.fresh()
    shutil.copytree(seen / "run", output)
    runs.finish(output)
    runs.check(output)


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_saving_over_a_model_keeps_it_where_the_new_one_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    """ENOSPC at the first sync, the last, and in between."""
    folder = tiny_checkpoint.write(tmp_path / "model")
    before, plain = files(folder), os.fsync
    torch.manual_seed(1)
    model = minillm.Decoder(decoders.config(vocab_size=300, context=128))
    for fails in range(4):
        seen = 0

        def fsync(descriptor: int, fails: int = fails) -> None:
            nonlocal seen
            seen += 1
            if seen > fails:
                raise OSError(28, "No space left on device")
            plain(descriptor)

        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"No space left on device\); free"):
            patch.setattr(os, "fsync", fsync)
            minillm.save(model, folder, max_shard_bytes=shard_bytes)
        left = files(folder)
        assert not [name for name in left if name.startswith(".")]
        if "config.json" in left:
            assert left == before
