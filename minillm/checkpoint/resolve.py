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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minillm.checkpoint.index import PICKLE, SAFETENSORS, formats, read_index
from minillm.errors import CheckpointError

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
    with _one_line_errors(name, commit):
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
    with _one_line_errors(name, revision):
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(file) for file in files]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


@contextmanager
def _one_line_errors(name: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError

    # The bases of the client's own error are its HTTP library's, which it has changed twice (requests, httpx, httpx2).
    network: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)
    try:
        yield
    except HFValidationError:
        raise CheckpointError(f"{name}: no such folder, and no valid hub id; an id looks like owner/name") from None
    except network as error:
        raise CheckpointError(f"{name}: {_reason(error, name, revision)}") from None


def _reason(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import constants, utils

    if isinstance(error, utils.GatedRepoError):
        return (
            f"is gated; accept its terms at {constants.ENDPOINT}/{name} and log in with `hf auth login` "
            "(or set HF_TOKEN)"
        )
    if isinstance(error, utils.RevisionNotFoundError):
        return f"has no revision {revision!r} on the hub; leave it out for the main branch"
    if isinstance(error, utils.RepositoryNotFoundError):
        return "no such folder, and no such repository on the hub (or it is private: `hf auth login`); check the name"
    # A refusal comes wrapped in "not in the cache either".
    status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"the hub refuses access ({status}); check your token with `hf auth whoami`, renew it with `hf auth login`"
        )
    if isinstance(error, utils.LocalEntryNotFoundError):
        return "the hub cannot be reached and the cache does not hold (all of) it; go online, or give a folder"
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"could not be fetched ({first_line}); try again, the files already there are kept"
