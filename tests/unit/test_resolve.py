"""An id becomes a folder through the real `huggingface_hub` client and a hub on 127.0.0.1.

The client reads HF_ENDPOINT and HF_HOME when it is imported, so each of the three situations (hub up, hub gone, told to
stay offline) is one fresh Python process that resolves a list of requests and prints what came of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from minillm.checkpoint.resolve import resolve
from minillm.checkpoint.shards import open_checkpoint
from minillm.errors import CheckpointError
from tests.unit.hub_server import HubServer, Repository

CLIENT = """
import json, sys
from minillm.checkpoint.resolve import resolve
from minillm.errors import MinillmError

assert "huggingface_hub" not in sys.modules
for arguments in json.load(sys.stdin):
    name = arguments.pop("name")
    try:
        print(json.dumps({"folder": str(resolve(name, **arguments))}), flush=True)
    except MinillmError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""

SMALL = {"config.json": b"{}", "tokenizer.json": b"[]", "README.md": b"#"}  # equal contents would be fetched once
ONE = safetensors.torch.save({"a": torch.ones(2)})
TWO = safetensors.torch.save({"b": torch.ones(3)})
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
EVERYTHING = SMALL | {
    "model.safetensors.index.json": INDEX.encode(),
    "model-00001-of-00002.safetensors": ONE,
    "model-00002-of-00002.safetensors": TWO,
    "model-00003-of-00003.safetensors": ONE,  # of another split, named by nobody
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": ONE,
    "original/consolidated.00.pth": b"pickle",
    "original/tokenizer.model": b"",
}
ESCAPE = json.dumps({"weight_map": {"a": "../../../secret.safetensors", "b": "*.safetensors"}})
REPOSITORIES = {
    "some/sharded": Repository(EVERYTHING),
    "some/later": Repository(EVERYTHING | {"config.json": b'{"n": 1}'}),
    "some/single": Repository(SMALL | {"model.safetensors": ONE, "pytorch_model.bin": b"pickle"}),
    "some/pickled": Repository(SMALL | {"pytorch_model.bin": b"pickle"}),
    "some/gguf": Repository({"model.gguf": b"GGUF"}),
    "some/empty": Repository(SMALL),
    "some/escape": Repository(SMALL | {"model.safetensors.index.json": ESCAPE.encode(), "x.safetensors": ONE}),
    "some/gated": Repository(SMALL, refusal=(401, "GatedRepo")),
    "some/forbidden": Repository(SMALL, refusal=(403, "")),
}
# What is asked while the hub is up, by the name under which the tests look for the answer.
ONLINE: dict[str, dict[str, Any]] = {
    "sharded": {"name": "some/sharded"},
    "again": {"name": "some/sharded"},
    "small": {"name": "some/later", "weights": False},
    "single": {"name": "some/single", "allow_pickle": True},
    "refused pickle": {"name": "some/pickled"},
    "pickle": {"name": "some/pickled", "allow_pickle": True},
    "gguf": {"name": "some/gguf"},
    "empty": {"name": "some/empty"},
    "escape": {"name": "some/escape"},
    "gated": {"name": "some/gated"},
    "forbidden": {"name": "some/forbidden"},
    "unknown": {"name": "some/unknown"},
    "revision": {"name": "some/sharded", "revision": "v9"},
    "commit": {"name": "some/single", "revision": REPOSITORIES["some/single"].commit},
    "invalid": {"name": "some/double--dash"},
}
OFFLINE: dict[str, dict[str, Any]] = {
    "sharded": {"name": "some/sharded"},
    "single": {"name": "some/single"},
    "small": {"name": "some/later", "weights": False},
    "uncached": {"name": "some/unknown"},
}


@dataclass
class Outcome:
    """What the three processes printed (by request), what the hub was asked, and where the cache lies."""

    online: dict[str, dict[str, str]]
    gone: dict[str, dict[str, str]]
    offline: dict[str, dict[str, str]]
    hub: HubServer
    home: Path


def ask(requests: dict[str, dict[str, Any]], home: Path, **environment: str) -> dict[str, dict[str, str]]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    result = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps(list(requests.values())),
        env=inherited | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"} | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return dict(zip(requests, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    home = tmp_path_factory.mktemp("home")
    with HubServer(REPOSITORIES) as hub:
        online = ask(ONLINE, home, HF_ENDPOINT=hub.url)
    gone = ask(OFFLINE, home, HF_ENDPOINT=hub.url)
    offline = ask(OFFLINE, home, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    yield Outcome(online, gone, offline, hub, home)


def test_only_the_needed_files_are_fetched(outcome: Outcome) -> None:
    wanted = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    folder = Path(outcome.online["sharded"]["folder"])
    assert outcome.hub.files_asked("some/sharded") == wanted | shards
    assert {file.name for file in folder.iterdir()} == wanted | shards
    assert outcome.home in folder.parents
    with open_checkpoint(folder) as files:
        assert files.keys() == ["a", "b"]
        assert torch.equal(files.read("b"), torch.ones(3))


def test_a_second_use_fetches_nothing(outcome: Outcome) -> None:
    assert outcome.online["again"] == outcome.online["sharded"]
    fetched = [line for line in outcome.hub.asked if line.startswith("GET /some/")]
    assert len(fetched) == len(set(fetched))


def test_without_weights_only_small_files_are_fetched(outcome: Outcome) -> None:
    assert outcome.hub.files_asked("some/later") == {"config.json", "tokenizer.json", "model.safetensors.index.json"}


def test_safetensors_are_preferred_whatever_is_allowed(outcome: Outcome) -> None:
    assert outcome.hub.files_asked("some/single") == {"config.json", "tokenizer.json", "model.safetensors"}


def test_a_commit_is_a_revision(outcome: Outcome) -> None:
    assert outcome.online["commit"] == outcome.online["single"]


def test_pickles_only_with_the_flag(outcome: Outcome) -> None:
    assert (
        "some/pickled: has only pickled weights (.bin); allow_pickle=True" in outcome.online["refused pickle"]["error"]
    )
    assert (Path(outcome.online["pickle"]["folder"]) / "pytorch_model.bin").read_bytes() == b"pickle"


@pytest.mark.parametrize(
    ("request_name", "message"),
    [
        ("gguf", "some/gguf: has no config.json"),
        ("empty", "some/empty: has neither model.safetensors nor model.safetensors.index.json"),
        ("escape", "'../../../secret.safetensors', which is no plain name"),
        ("gated", "some/gated: is gated; accept its terms at http://127.0.0.1"),
        ("forbidden", "some/forbidden: the hub refuses access (403)"),
        ("unknown", "some/unknown: no such folder, and no such repository on the hub"),
        ("revision", "some/sharded: has no revision 'v9'"),
        ("invalid", "some/double--dash: no such folder, and no valid hub id"),
    ],
)
def test_what_the_hub_refuses_is_one_line(outcome: Outcome, request_name: str, message: str) -> None:
    error = outcome.online[request_name]["error"]
    assert message in error
    assert "\n" not in error


def test_an_index_that_points_elsewhere_fetches_no_weights(outcome: Outcome) -> None:
    assert outcome.hub.files_asked("some/escape") == {"config.json", "tokenizer.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("situation", ["gone", "offline"])
def test_the_cache_serves_without_a_hub(outcome: Outcome, situation: str) -> None:
    answers = getattr(outcome, situation)
    for name in ("sharded", "single", "small"):
        assert answers[name] == outcome.online[name]
    assert "some/unknown: the hub cannot be reached and the cache does not hold" in answers["uncached"]["error"]
    assert "\n" not in answers["uncached"]["error"]


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="is a folder, which has no revision 'main'"):
        resolve(tmp_path, revision="main")


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["", "./absent", "/absent/model", "a/b/c", "a\\b", "owner/", "a b", "ñ/x", "\0", "x" * 5000]
)
def test_what_looks_like_no_id_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder") as error:
        resolve(name)
    assert "owner/name" in str(error.value)


def test_a_missing_path_object_is_never_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(Path("some/sharded"))


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; give the folder that holds it"):
        resolve(tmp_path / "model.safetensors")
