"""An id or a folder -> a folder on this machine, with only the files that are needed.

A folder is itself. An id (`owner/name`) is fetched by the `huggingface_hub` client into its own cache: first the small
files, then exactly the weight files that the checkpoint consists of. Never both formats, never a repository's second
copy of the weights (`original/*.pth`, `consolidated.safetensors`: half of the bytes of many a repository). What is in
the cache is used without a network.

The client is imported only when an id is resolved: `import minillm` stays cheap and touches no environment.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from minillm.checkpoint.index import PICKLE, SAFETENSORS, formats, read_index
from minillm.errors import CheckpointError
from minillm.hub import one_line_errors

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def resolve(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    weights: bool = True,
    allow_pickle: bool = False,
) -> Path:
    """The folder of a checkpoint, fetched from the hub if it is an id and not in the cache.

    revision: branch, tag or commit of an id. weights=False: the small files only (config, tokenizer). allow_pickle:
    where a repository has no safetensors, fetch its `.bin` files.

    >>> str(resolve("."))
    '.'

    Raises `CheckpointError` for a folder that does not exist, an id that the hub does not have or does not give, no
    network and nothing in the cache, and a repository with nothing but pickled weights without allow_pickle.
    """
    folder = Path(os.path.expanduser(name_or_folder))  # leaves ~nobody as it is, where Path.expanduser raises
    if name_or_folder and os.path.isdir(folder):
        if revision is not None:
            raise CheckpointError(f"{folder}: is a folder, which has no revision {revision!r}; leave revision out")
        return folder
    if name_or_folder and os.path.exists(folder):
        raise CheckpointError(f"{folder}: is a file; give the folder that holds it")
    name = os.fspath(name_or_folder)
    if not isinstance(name_or_folder, str) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        raise CheckpointError(f"{name!r:.200}: no such folder (and no hub id, which looks like owner/name)")
    folder = _fetch(name, revision, SMALL_FILES + tuple(kind.index for kind in formats(allow_pickle)))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name}: has no config.json, so it is no model that minillm can load; try another id")
    if weights:
        _fetch_weights(name, folder, allow_pickle)
    return folder


def _fetch_weights(name: str, folder: Path, allow_pickle: bool) -> None:
    commit = folder.name  # not the branch: a push in between would mix two checkpoints
    for kind in formats(allow_pickle):
        # config.json is there already; it keeps the client from warning where the other name does not exist
        _fetch(name, commit, ["config.json", kind.single])
        if (folder / kind.single).exists():
            return
        if (folder / kind.index).exists():
            _fetch(name, commit, sorted(set(read_index(folder, kind).values())))
            return
    with one_line_errors(name, commit, CheckpointError):
        from huggingface_hub import HfApi

        files = HfApi().list_repo_files(name, revision=commit)
    if PICKLE.single in files or PICKLE.index in files:
        raise CheckpointError(
            f"{name}: has only pickled weights ({PICKLE.suffix}); allow_pickle=True fetches them and reads them with "
            "torch.load(weights_only=True)"
        )
    raise CheckpointError(f"{name}: has neither {SAFETENSORS.single} nor {SAFETENSORS.index}; try another id")


def _fetch(name: str, revision: str | None, files: Iterable[str]) -> Path:
    """The snapshot folder, with those of the files in it that the repository has. The client shows its progress."""
    with one_line_errors(name, revision, CheckpointError):
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(file) for file in files]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
