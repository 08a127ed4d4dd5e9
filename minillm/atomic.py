"""Files that appear whole or not at all: write beside the target, fsync, rename.

`rename(2)` replaces a name in one step, so a reader sees the old file or the new one and never a half. Two fsyncs make
it hold over a power cut: the file's, before the rename, so that the new name cannot point at bytes that never reached
the disk; and the folder's, after it, so that the rename itself is kept.

A process that is killed leaves its temporary file behind, gigabytes perhaps. The next write into the folder takes it
away: a temporary that nobody holds locked has no writer any more, since the system gives a dead process's locks back.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from minillm.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open, and so needs no lock
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.minillm")  # a suffix of our own: no other program's file is ever removed


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write into; `path` becomes it when the block ends, and stays untouched if the block raises.

    The temporary lies in the same folder, because a rename is atomic only inside one file system. It is removed on
    every exception, `KeyboardInterrupt` included. A `path` that is a link is replaced, not written through: the blob
    behind a hub cache's link is never changed. The file gets the mode that `open` would give it.

    Raises `CheckpointError`, one line with the system's reason, where the disk is full or the folder not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.minillm")
    try:
        remove_abandoned(path.parent)
        with _created(temporary) as file:
            yield file
            flush_to_disk(file)
            if fcntl is not None:
                os.replace(temporary, path)  # while it is locked
        if fcntl is None:
            os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise CheckpointError(f"{path}: cannot be written ({reason}); free space or choose another") from error
        raise


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Make `path` hold `data` (text as UTF-8, line ends as they are), atomically.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder, "config.json"), "{}")
    ...     [file.name for file in Path(folder).iterdir()]
    ['config.json']
    """
    with atomic_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left in `folder`; where there is no way to tell (no locks), nothing is removed."""
    with contextlib.suppress(OSError):
        for name in [each for each in os.listdir(folder) if _TEMPORARY.fullmatch(each)]:
            with contextlib.suppress(OSError), contextlib.ExitStack() as held:
                if fcntl is not None:  # raises where the writer lives; r+, as NFS locks only what may be written
                    _lock(held.enter_context(open(folder / name, "r+b")))
                os.unlink(folder / name)


def flush_to_disk(file: BinaryIO) -> None:
    """Return only when the bytes written so far are on the disk: a full disk shows here, not after the rename."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    """A new file, locked for as long as it is open."""
    while True:
        with open(path, "xb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                _lock(file, wait=True)  # for a `remove_abandoned` that has it, and is about to unlink it
            if path.exists():  # else another writer's `remove_abandoned` came between the two
                yield file
                return


def _lock(file: IO[bytes], *, wait: bool = False) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders; NTFS journals its renames
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
