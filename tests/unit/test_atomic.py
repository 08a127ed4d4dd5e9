"""Files appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from minillm.atomic import atomic_file, remove_abandoned, write_atomically
from minillm.errors import CheckpointError

fcntl = pytest.importorskip("fcntl", reason="locks are POSIX's")
ROOT = Path(__file__).parents[2]


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
    with pytest.raises(CheckpointError, match=r"a: cannot be written \(No space left on device\); free space"):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("where", ["absent/a", "file/a", "x" * 250])
def test_where_nothing_can_be_written_is_one_line(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        write_atomically(tmp_path / where, b"new")
    assert "\n" not in str(caught.value)


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    """The lock of a process dies with it; that of a living one, and files of other programs, are left alone."""
    code = (
        "import os, sys; from minillm.atomic import atomic_file\n"
        "with atomic_file(sys.argv[1]) as file: print(flush=True), sys.stdin.read()\n"
    )
    others = {".a.00000000.tmp", ".a.12345678.minillm.txt", "a.12345678.minillm"}
    for name in others:
        (tmp_path / name).write_bytes(b"")
    command = [sys.executable, "-c", code, str(tmp_path / "state")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"\n"
        (temporary,) = set(os.listdir(tmp_path)) - others
        write_atomically(tmp_path / "adapter", b"")
        assert set(os.listdir(tmp_path)) == {*others, "adapter", temporary}, "a living writer lost its file"
        writer.kill()
    write_atomically(tmp_path / "adapter", b"")
    assert set(os.listdir(tmp_path)) == {*others, "adapter"}


def test_writers_side_by_side_leave_each_other_alone(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a") as first, atomic_file(tmp_path / "a") as second:
        remove_abandoned(tmp_path)
        first.write(b"1"), second.write(b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["a"]


def test_a_temporary_taken_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, taken = fcntl.flock, []

    def flock(file: BinaryIO, operation: int) -> None:
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)
        plain(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    write_atomically(tmp_path / "a", b"x")
    assert taken and os.listdir(tmp_path) == ["a"]


def test_a_temporary_that_is_being_taken_is_not_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer's `remove_abandoned` has locked it, before this one could, and unlinks it a moment later."""
    plain, takers = fcntl.flock, []

    def flock(file: BinaryIO, operation: int) -> None:
        if not takers:
            other = open(file.name, "r+b")  # noqa: SIM115  # closed by the taker
            plain(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            takers.append(threading.Timer(0.2, lambda: (os.unlink(other.name), other.close())))
            takers[0].start()
        plain(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic_file(tmp_path / "a") as file:
        takers[0].join()
        file.write(b"x")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"x"


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
