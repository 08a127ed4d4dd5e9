"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minillm.atomic import atomic_file, write_atomically


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "config.json"
    write_atomically(target, b"old")
    write_atomically(target, "ñ\n")
    assert target.read_bytes() == "ñ\n".encode()
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_broken_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, fault: type[BaseException]) -> None:
    target = tmp_path / "config.json"
    target.write_bytes(b"old")
    with pytest.raises(fault), atomic_file(target) as file:
        file.write(b"half")
        assert target.read_bytes() == b"old"
        raise fault
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_the_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("fsync"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), replace(a, b)))
    write_atomically(tmp_path / "a", b"x")
    assert steps == ["fsync", "rename", "fsync"]  # the file, its name, the folder


def test_a_full_disk_shows_before_the_old_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"shared")
    (tmp_path / "name").symlink_to("blob")
    write_atomically(tmp_path / "name", b"own")
    assert (tmp_path / "blob").read_bytes() == b"shared"
    assert (tmp_path / "name").read_bytes() == b"own"
    assert not (tmp_path / "name").is_symlink()


def test_the_mode_is_the_one_open_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
