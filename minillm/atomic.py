"""Files that appear whole or not at all: write beside the target, fsync, rename.

`rename(2)` replaces a name in one step, so a reader sees the old file or the new one and never a half. Two fsyncs make
it hold over a power cut: the file's, before the rename, so that the new name cannot point at bytes that never reached
the disk; and the folder's, after it, so that the rename itself is kept.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write into; `path` becomes it when the block ends, and stays untouched if the block raises.

    The temporary lies in the same folder, because a rename is atomic only inside one file system. It is removed on
    every exception, `KeyboardInterrupt` included. A `path` that is a link is replaced, not written through: the blob
    behind a hub cache's link is never changed. The file gets the mode that `open` would give it.

    Raises `OSError` as `open` and `write` do.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            flush_to_disk(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


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


def flush_to_disk(file: BinaryIO) -> None:
    """Return only when the bytes written so far are on the disk: a full disk shows here, not after the rename."""
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders; NTFS journals its renames
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
