"""A data set of the hub -> its files on this machine, fetched once into the client's own cache.

    hub:owner/name                   the split `train`, or the only one
    hub:owner/name/validation        another split
    hub:owner/name/folder            what lies below a folder, by the same rule; folder/split too
    hub:owner/name/data/a.jsonl      one file
    hub:owner/name@revision/...      of a branch, tag, commit, refs/convert/parquet or refs/pr/1

A file's split is what the hub's own names say: `train` of `data/train-00000-of-00002-a09b.parquet`, of `train.jsonl`
and of `default/train/0000.parquet`. Where more than one split, folder or kind of file could be meant, none is guessed:
the error lists them. The `datasets` library is not needed, and no code of a repository is run.

What is in the cache is read without a network. It may be less than there is, a download having been stopped or another
split fetched: parts that their names count must then all be there, and what is named for a test is no "only one".
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from minillm.errors import InputError, nearest
from minillm.hub import network_errors, one_line_errors

PREFIX = "hub:"

_REVISION = r"refs/(?:convert|pr)/[\w-]+|\w[\w.-]*"  # of the names with a slash, only the hub's own
_SOURCE = re.compile(rf"(\w[\w.-]*/\w[\w.-]*)(?:@({_REVISION}))?(?:/(.+?))?/*", re.ASCII)  # id, revision, the rest
_PART = re.compile(r"(?:(.+?)[-_])?\d+(-of-\d+)?(-[0-9a-f]+)?")  # the name of one part of several -> the split's
_COUNTED = re.compile(r".*?(\d+)-of-(\d+).*")  # one part of so many
_FOR_TESTS = ("test", "validation", "valid", "val", "dev", "eval")
_SMALL = (".gitattributes", "README.md")
_NO_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # what the hub writes beside


def fetch(source: str, suffixes: Sequence[str]) -> list[Path]:
    """The files that `source` names, in order of path; the client shows its progress.

    suffixes: endings of the files that can be read. Raises InputError for a repository that the hub does not have or
    does not give, for no network and nothing in the cache, and where no file, or more than one set of files, fits.
    """
    found = _SOURCE.fullmatch(source.removeprefix(PREFIX))
    if found is None:
        raise InputError(f"{source!r:.200}: names no data set; it looks like hub:owner/name or hub:owner/name/split")
    name, revision, rest = found.groups()
    with one_line_errors(f"datasets/{name}", revision, InputError):
        folder = _fetch(name, revision, _SMALL)  # notes in the cache which commit the branch is at
        names, are_all = _listed(name, folder)
        chosen = choose(names, rest or "", suffixes=suffixes, source=source)
        if not are_all and chosen != [rest]:
            _check_cached(chosen, rest or "", source)
        _fetch(name, folder.name, chosen)  # not the branch: a push in between would mix two versions
    return [folder / each for each in chosen]


def _fetch(name: str, revision: str | None, files: Sequence[str]) -> Path:
    """The snapshot folder, whose name is the commit, with those of the files that the repository has."""
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(each) for each in files]
    return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))


def _listed(name: str, folder: Path) -> tuple[list[str], bool]:
    """The names of all files of the repository, True; without a network, of those that are in the cache, False."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError

    try:
        # not list_repo_files, which tries for half a minute where there is no network
        return [each.rfilename for each in HfApi().dataset_info(name, revision=folder.name).siblings or ()], True
    except HfHubHTTPError:
        raise
    except network_errors():
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()], False


def _check_cached(chosen: Sequence[str], rest: str, source: str) -> None:
    """InputError where what was chosen out of the cache alone may not be what the repository would have given."""
    split = split_of(chosen[0])
    if split in _FOR_TESTS and PurePosixPath(rest).name != split:
        raise InputError(
            f"{source}: the hub cannot be reached and the cache holds {split!r} alone; go online, or name it"
        )
    parts = {found.groups() for found in map(_COUNTED.fullmatch, chosen) if found}  # (number, of how many)
    for _, count in sorted(parts):
        have = sum(count == other for _, other in parts)
        if have < int(count):
            raise InputError(
                f"{source}: the hub cannot be reached and the cache holds {have} of {int(count)} parts; go online"
            )


def choose(names: Sequence[str], rest: str, *, suffixes: Sequence[str], source: str) -> list[str]:
    """Which files of a repository `rest` (a file, a folder, a split, folder/split, or nothing) means.

    >>> choose(["README.md", "test.jsonl", "train.jsonl"], "", suffixes=[".jsonl"], source="hub:owner/name")
    ['train.jsonl']
    """
    data = [each for each in sorted(names) if each.endswith(tuple(suffixes)) and _is_plain(each)]
    if rest in data:
        return [rest]
    data = [each for each in data if not each.endswith(".txt") and PurePosixPath(each).name not in _NO_DATA]
    found = [each for each in data if not rest or each.startswith(f"{rest}/")]
    if found:
        found = [each for each in found if split_of(each) == "train"] or found
    else:
        folder, _, split = rest.rpartition("/")
        found = [each for each in data if split_of(each) == split and each.startswith(f"{folder}/" if folder else "")]
    sets = {(PurePosixPath(each).parent, split_of(each), PurePosixPath(each).suffix) for each in found}
    if len(sets) == 1:
        return found
    among = found or data
    shown = ", ".join(among[:5]) + (f" and {len(among) - 5} more" if len(among) > 5 else "")
    if not found:
        like = nearest(rest, {split_of(each) for each in data})
        what = f"holds no file, folder or split {rest!r}{like}" if rest else f"holds no {', '.join(suffixes)}"
        raise InputError(f"{source}: {what}; it has {shown or 'no data file'}")
    raise InputError(f"{source}: more than one set of files could be meant; add /split, /folder or /file: {shown}")


def split_of(name: str) -> str:
    """The split that a file's name states.

    >>> [split_of(x) for x in ("data/train_sft-00000-of-00003-a1b2.parquet", "dev.jsonl.gz", "all/test/part_3.json")]
    ['train_sft', 'dev', 'test']
    """
    path = PurePosixPath(name)
    stem = path.name.partition(".")[0]
    part = _PART.fullmatch(stem)
    split = part[1] if part else stem
    return path.parent.name if split in (None, "part") else split


def _is_plain(name: str) -> bool:
    """Below the repository, and not hidden."""
    return not any(part.startswith((".", "/")) for part in PurePosixPath(name).parts)
