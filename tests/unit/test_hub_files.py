"""`hub:owner/name` becomes files through the real `huggingface_hub` client and a hub on 127.0.0.1.

The client reads HF_ENDPOINT and HF_HOME when it is imported, so each situation is a fresh process (as in test_resolve).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minillm.data.hub_files import choose
from minillm.data.records import SUFFIXES, read_records
from minillm.errors import InputError
from tests.unit.hub_server import HubServer, Repository

CLIENT = """
import json, sys
from pathlib import Path
from minillm.data.records import read_records
from minillm.errors import MinillmError

assert "huggingface_hub" not in sys.modules
for source in json.load(sys.stdin):
    try:
        found = read_records(Path(source))
        print(json.dumps([[each.fields["text"], Path(each.file).name, each.line] for each in found]))
    except MinillmError as error:
        print(json.dumps(str(error)))
"""


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


SPLITS = {
    "README.md": b"#",
    "dataset_infos.json": b"{}",
    "data/train-00000-of-00002-0a1b.jsonl": lines("a", "b"),
    "data/train-00001-of-00002-0a1b.jsonl": lines("c"),
    "data/test-00000-of-00001-0a1b.jsonl": lines("d"),
}
REPOSITORIES = {
    "some/splits": Repository(SPLITS, is_dataset=True),
    "some/one": Repository({"README.md": b"#", "alpaca_data.json": b'[{"text": "e"}]'}, is_dataset=True),
    "some/odd": Repository({"x.jsonl": lines("f"), "y.jsonl": lines("g"), "notes.txt": b"h"}, is_dataset=True),
    "some/halves": Repository({f"train-{i}-of-2.jsonl": lines("kl"[i]) for i in range(2)}, is_dataset=True),
    "some/tested": Repository({"test.jsonl": lines("m"), "train.jsonl": lines("n")}, is_dataset=True),
    "some/model": Repository({"train.jsonl": lines("i")}),
    "some/gated": Repository({"train.jsonl": lines("j")}, refusal=(401, "GatedRepo"), is_dataset=True),
    "some/broken": Repository({"train.jsonl": b"{\n"}, is_dataset=True),
    "some/none": Repository({"README.md": b"#", "a.arrow": b""}, is_dataset=True),
}
A, B, C = (["a", "train-00000-of-00002-0a1b.jsonl", 1], ["b", "train-00000-of-00002-0a1b.jsonl", 2],
           ["c", "train-00001-of-00002-0a1b.jsonl", 1])  # fmt: skip
D = ["d", "test-00000-of-00001-0a1b.jsonl", 1]
ONLINE: dict[str, Any] = {
    "hub:some/splits": [A, B, C],
    "hub:some/splits/": [A, B, C],
    "hub:some/splits/test": [D],
    "hub:some/splits/data/test": [D],
    "hub:some/splits/data": [A, B, C],
    "hub:some/splits/data/train-00001-of-00002-0a1b.jsonl": [C],
    f"hub:some/splits@{REPOSITORIES['some/splits'].commit}/test": [D],
    "hub:some/one": [["e", "alpaca_data.json", 1]],
    "hub:some/odd/y": [["g", "y.jsonl", 1]],
    "hub:some/odd/notes.txt": [["h", "notes.txt", 1]],
    "hub:some/odd": "hub:some/odd: more than one set of files could be meant; add /split, /folder or /file: x.jsonl, y",
    "hub:some/splits/tset": "some/splits/tset: holds no file, folder or split 'tset' (nearest: test); it has data/",
    "hub:some/halves/train-0-of-2.jsonl": [["k", "train-0-of-2.jsonl", 1]],
    "hub:some/tested/test": [["m", "test.jsonl", 1]],
    "hub:some/none": "hub:some/none: holds no .json, .jsonl",
    "hub:some/model": "datasets/some/model: no such folder, and no such repository on the hub",
    "hub:some/splits@refs/convert/parquet/test": [D],
    "hub:some/splits@v9": "datasets/some/splits: has no revision 'v9'",
    "hub:some/gated": "datasets/some/gated: is gated; accept its terms at http://127.0.0.1",
    "hub:some/broken": "train.jsonl line 1: not JSON",
    "hub:some": "'hub:some': names no data set; it looks like hub:owner/name",
    "hub:some/double--dash": "no valid hub id",
}
OFFLINE = {
    "hub:some/splits": [A, B, C],
    "hub:some/one": [["e", "alpaca_data.json", 1]],
    "hub:some/halves/train-0-of-2.jsonl": [["k", "train-0-of-2.jsonl", 1]],
    "hub:some/halves": "some/halves: the hub cannot be reached and the cache holds 1 of 2 parts; go online",
    "hub:some/tested/test": [["m", "test.jsonl", 1]],
    "hub:some/tested": "some/tested: the hub cannot be reached and the cache holds 'test' alone; go online, or name it",
    "hub:some/uncached": "datasets/some/uncached: the hub cannot be reached and the cache does not hold",
}


def ask(sources: list[str], home: Path, **environment: str) -> dict[str, Any]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    result = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps(sources),
        env=inherited | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"} | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    return dict(zip(sources, map(json.loads, result.stdout.splitlines()), strict=True))


Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Answers, HubServer]]:
    home = tmp_path_factory.mktemp("home")
    with HubServer(REPOSITORIES) as hub:
        online = ask(list(ONLINE), home, HF_ENDPOINT=hub.url)
    gone = ask(list(OFFLINE), home, HF_ENDPOINT=hub.url)
    offline = ask(list(OFFLINE), home, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    yield {"online": online, "gone": gone, "offline": offline}, hub


def check(answer: Any, expected: Any) -> None:
    if isinstance(expected, str):
        assert isinstance(answer, str) and expected in answer and "\n" not in answer
    else:
        assert answer == expected


@pytest.mark.parametrize("source", ONLINE)
def test_a_data_set_is_its_files(answers: tuple[Answers, HubServer], source: str) -> None:
    check(answers[0]["online"][source], ONLINE[source])


@pytest.mark.parametrize("situation", ["gone", "offline"])
@pytest.mark.parametrize("source", OFFLINE)
def test_the_cache_serves_without_a_hub(answers: tuple[Answers, HubServer], situation: str, source: str) -> None:
    check(answers[0][situation][source], OFFLINE[source])


def test_only_what_is_meant_is_fetched(answers: tuple[Answers, HubServer]) -> None:
    hub = answers[1]
    assert hub.files_asked("some/one") == {"README.md", "alpaca_data.json"}
    assert hub.files_asked("some/splits") == set(SPLITS) - {"dataset_infos.json"}
    fetched = [line for line in hub.asked if line.startswith("GET /datasets/")]
    assert len(fetched) == len(set(fetched))


def test_a_folder_or_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hub:some").mkdir()
    Path("hub:some/name.jsonl").write_bytes(lines("here"))
    assert read_records("hub:some/name.jsonl")[0].fields == {"text": "here"}
    assert read_records("hub:some")[0].fields == {"text": "here"}


@pytest.mark.parametrize(
    ("names", "rest", "expected"),
    [
        (["a/train/0000.parquet", "a/train/0001.parquet", "a/test/0000.parquet"], "", ["a/train/0000.parquet"]),
        (["a/train/0.parquet", "b/train/0.parquet"], "b", ["b/train/0.parquet"]),
        (["train_sft-0-of-1.parquet", "train_gen-0-of-1.parquet"], "train_gen", ["train_gen-0-of-1.parquet"]),
        (["v1.json", "dataset_infos.json", ".cache/v1.json", "README.txt"], "", ["v1.json"]),
        (["../../secret.jsonl", "/etc/secret.jsonl", "a.jsonl"], "", ["a.jsonl"]),
    ],
)
def test_names_say_what_is_meant(names: list[str], rest: str, expected: list[str]) -> None:
    found = choose(names, rest, suffixes=SUFFIXES, source="hub:o/n")
    assert found[: len(expected)] == expected and not set(found) - set(names)
    assert all("test" not in name and "secret" not in name for name in found)


@pytest.mark.parametrize("names", [
    ["a/train/0.parquet", "b/train/0.parquet"], ["train.jsonl", "train.parquet"], ["x.json", "y.json"],
    ["train_sft-0-of-1.parquet", "train_gen-0-of-1.parquet"],
])  # fmt: skip
def test_nothing_is_guessed(names: list[str]) -> None:
    with pytest.raises(InputError, match="more than one set of files could be meant; add /split"):
        choose(names, "", suffixes=SUFFIXES, source="hub:o/n")


def test_a_path_out_of_the_repository_names_nothing() -> None:
    with pytest.raises(InputError, match="holds no file, folder or split"):
        choose(["../a.jsonl"], "../a.jsonl", suffixes=SUFFIXES, source="hub:o/n")
