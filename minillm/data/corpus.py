"""A folder of text -> documents -> one long stream of ids -> batches.

    folder ─read─▶ documents ─split by path─▶ training · held out ─encode─▶ | eot doc eot doc eot doc ... | ─▶ (B, T)

Whole files are held out, not lines: neighbouring lines share names and idioms, and a model that has seen one is
not surprised by the other. Which file goes where is decided by a hash of its path, so that it depends neither on
the other files nor on the order in which the system lists them.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer as Pipeline
from torch import Tensor

from minillm.data.bpe import encode, train_bpe
from minillm.data.seeded import drawn
from minillm.errors import InputError

#: Folders of Python's standard library that are no good prose: tests, tables, grammars, a large application, others'.
STDLIB_LEAVE_OUT = (
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo"),
    *("encodings", "pydoc_data", "lib2to3", "distutils", "__phello__"),
)


def standard_library() -> Path:
    """Folder of the running Python's own library."""
    return Path(sysconfig.get_path("stdlib"))


class Document(NamedTuple):
    """One file: its path below the folder, with forward slashes on every system, and its text."""

    path: str
    text: str


def read_folder(folder: Path, *, suffixes: Collection[str], leave_out: Collection[str] = ()) -> list[Document]:
    """Every UTF-8 file, byte-order mark or not, below `folder` whose name ends in one of `suffixes`, in order of path.

    leave_out: names of folders, at any depth, that are not entered; hidden ones never are. Links to folders are not
    followed. Empty files, and those that are not UTF-8 text, are passed over. Raises InputError where nothing is left.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that holds text")
    paths = sorted(_files(folder, leave_out), key=lambda path: path.relative_to(folder).as_posix())
    wanted = [path for path in paths if path.name.endswith(tuple(suffixes)) and path.is_file()]
    read = [Document(path.relative_to(folder).as_posix(), _text(path)) for path in wanted]
    documents = [document for document in read if document.text.strip()]
    if not documents:
        raise InputError(
            f"{folder}: no text in {len(paths)} files, {len(wanted)} of them ending in {', '.join(suffixes)}; "
            "give another folder, or other suffixes"
        )
    return documents


def _files(folder: Path, leave_out: Collection[str]) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in leave_out and not name.startswith(".")]
        yield from (Path(here, name) for name in names)


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return ""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend it or leave its folder out") from error
    return "" if "\0" in text else text


def split(documents: Sequence[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """(training, held out): a document is held out where sha256(path) / 2^256 < held_out.

    Raises InputError where either side would be empty.
    """
    training: list[Document] = []
    held: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(document.path.encode("utf-8", "surrogateescape")).digest()
        (held if int.from_bytes(digest, "big") < held_out * 2**256 else training).append(document)
    if not training or not held:
        raise InputError(
            f"of {len(documents)} files {len(held)} would be held out at held_out={held_out}; "
            "both sides need at least one: add files or change the fraction"
        )
    return training, held


class Text(NamedTuple):
    """A folder as ids: what is trained on, and what is not."""

    source: str  # in words
    pipeline: Pipeline
    training: Tensor  # (N,) int32
    held_out: Tensor


def read_text(
    folder: Path | None,
    *,
    suffixes: Collection[str] = (".py",),
    leave_out: Collection[str] = STDLIB_LEAVE_OUT,
    held_out: float = 0.05,
    vocabulary: int | Pipeline = 4096,
) -> Text:
    """Read, split and encode a folder, or without one Python's own standard library as installed here.

    vocabulary: the size of one to make from the training part, or one made before.
    """
    folder = folder or standard_library()
    training, held = split(read_folder(folder, suffixes=suffixes, leave_out=leave_out), held_out)
    sides = [[document.text for document in side] for side in (training, held)]
    pipeline = train_bpe(sides[0], vocabulary) if isinstance(vocabulary, int) else vocabulary
    source = f"{len(training)} + {len(held)} files of {folder}"
    return Text(source, pipeline, *(encode(pipeline, side) for side in sides))


def fingerprint(*streams: Tensor) -> str:
    """64 characters that are the same for the same ids, and for no others."""
    digest = hashlib.sha256()
    for stream in streams:
        digest.update(len(stream).to_bytes(8, "little") + stream.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Windows:
    """Batches of `context` neighbouring tokens out of a stream (N,), in an order that is a function of the step.

    Window i begins at i (context - 1): the last token of one is the first of the next, so that in every epoch each
    token but the first is predicted, once; the last window is moved left to fit, and repeats a few. Each epoch is a
    new permutation, drawn from (seed, epoch). A resumed run therefore needs to remember nothing but its step.
    """

    def __init__(self, stream: Tensor, *, context: int, seed: int) -> None:
        if context < 2:
            raise InputError(f"context is {context}; it takes 2 tokens to predict one from the other")
        if len(stream) < context:
            raise InputError(f"the text has {len(stream)} tokens, a window {context}; add text or shorten the context")
        self._stream, self._context, self._seed = stream, context, seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # (epoch, permutation)

    def __len__(self) -> int:
        """Windows in an epoch."""
        return -(-(len(self._stream) - 1) // (self._context - 1))

    def batch(self, step: int, size: int) -> Tensor:
        """The batch of one step: (size, context) int64. Epochs follow each other without a gap, even inside a batch."""
        return torch.stack([self.window(self._index(step * size + row)) for row in range(size)])

    def window(self, index: int) -> Tensor:
        """Window `index` in the order of the text: (context,) int64."""
        begin = min(index * (self._context - 1), len(self._stream) - self._context)
        return self._stream[begin : begin + self._context].long()

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        if self._order[0] != epoch:
            self._order = (epoch, drawn(len(self), self._seed, epoch))
        return int(self._order[1][place])
