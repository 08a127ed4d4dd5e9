"""Data that cannot be trained on, from the command line: one line that names file, record and reason, and exit 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from minillm.training.recipe import Interrupted, run
from scripts.sft import Sft, main
from tests import tiny_checkpoint
from tests.training.stopping import stop_at

GOOD = json.dumps({"prompt": "1 + 1 =", "completion": " 2"}) + "\n"
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
ASKED = {"messages": CHAT["messages"][:1]}
SHARED = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_checkpoint.write(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the script says as it exits with 2: one line."""
    given = ("--model", "base", "--output", "out", "--steps", "2", "--batch", "2", *arguments)
    monkeypatch.setattr(sys, "argv", ["scripts/sft.py", *given])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(main, Sft)
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith(("data: ", "model: "))]
    assert end.value.code == 2 and said.out == ""
    assert len(lines) == 1 and lines[0].startswith("error: "), said.err
    return lines[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "a.jsonl: no records in this file; fill it or leave it out"),
        ("a.json", "[]", "a.json: no records in this file"),
        ("a.csv", "prompt,completion\n", "a.csv: no records in this file"),
        ("a.jsonl", GOOD + "\n" + GOOD[:-3] + "\n" + GOOD, "a.jsonl line 3: not JSON (Unterminated string"),
        ("a.json", "[" + GOOD + ",\n" + GOOD, "a.json line 4: not JSON"),
        ("a.csv", "prompt,completion\np,c\np\n", "a.csv line 3: 1 cells for 2 columns"),
        ("a.jsonl", GOOD + "[1, 2]\n", "a.jsonl line 2: a record is an object with named fields, not list"),
        (
            "a.jsonl",
            json.dumps({"prompt": "p", "chosen": "c"}),
            "a.jsonl line 1: fields of no known format (prompt, ch",
        ),
        (
            "a.jsonl",
            json.dumps({"prompt": "p", "completion": ""}) + "\n",
            "0 of 1 records are used; 1 cannot be: a.json",
        ),
        ("a.jsonl", json.dumps({"prompt": "p", "completion": " "}) + "\n", "a.jsonl line 1: `completion` is empty"),
        ("a.jsonl", json.dumps(ASKED) + "\n", "a.jsonl line 1: no turn of the assistant to learn from"),
        ("a.jsonl", json.dumps({"prompt": "p " * 999, "completion": "c"}) + "\n", "tokens, the context is 128"),
        ("a.txt", "x" * 10_000, "a.txt line 1: "),
    ],
)
def test_data_of_no_use(
    name: str,
    content: str,
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / name).write_text(content)
    assert words in refuse(monkeypatch, capsys, "--data", name)
    assert not any((folder / "out").glob("*")), "a refused run leaves nothing"


def test_every_label_masked(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut to the context nothing of the answer is left, so there is nothing to learn."""
    row = {"prompt": "return the other thing " * 30, "completion": "c"}
    (folder / "a.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    said = refuse(monkeypatch, capsys, "--data", "a.jsonl", "--cut", "--context", "16")
    assert "nothing to learn from: 0 of 3 records are used; 3 cannot be: a.jsonl line 1: " in said
    assert "tokens, and none of the first 16 is to be taught" in said


def test_a_model_without_a_chat_template(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint.write(folder / "plain", chat_template=None)
    (folder / "a.jsonl").write_text(json.dumps(CHAT) + "\n")
    assert "the tokenizer has no chat template" in refuse(
        monkeypatch, capsys, "--data", "a.jsonl", "--model", "plain"
    )  # fmt: skip


@pytest.mark.parametrize("source", ["hub:", "hub:name", "hub:a b/c"])
def test_what_names_no_data_set(
    source: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "names no data set; it looks like hub:owner/name" in refuse(monkeypatch, capsys, "--data", source)


def test_records_that_cannot_be_used_are_counted_and_the_others_taught(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long one, an empty one, and ShareGPT's chats beside ours."""
    rows: list[dict[str, Any]] = [
        SHARED,
        {"conversations": []},
        SHARED,
        {"conversations": [SHARED["conversations"][0]]},
    ]
    rows.append({"conversations": [*SHARED["conversations"], {"from": "human", "value": "a " * 500}]})
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.jsonl").write_text(json.dumps(CHAT) + "\n")
    told = main(Sft(model="base", data=(Path("a.jsonl"), Path("b.jsonl")), output=Path("out"), steps=1, held_out=0))
    assert told["records"].startswith("3 of 6 records are used; 3 cannot be: a.jsonl line 2: no turn of the assistant")
    assert "a.jsonl line 4: no turn of the assistant" in told["records"]
    assert "a.jsonl line 5: " in told["records"] and "tokens, the context is 128" in told["records"]


def begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state of a run that was stopped after its first step."""
    (folder / "a.jsonl").write_text(GOOD * 4)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(1, patch)
        main(Sft(model="base", data=(Path("a.jsonl"),), output=Path("out"), steps=2, batch=2))
    return folder / "out" / "state.safetensors"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rank", "8"), "--resume: rank is 8, the run began with 16; give that again"),
        (("--model", "other"), "--resume: model is other, the run began with base"),
        (("--data", "b.jsonl"), "--resume: data is ['b.jsonl'], the run began with ['a.jsonl']"),
        (("--optimizer", "adamw8"), "--resume: optimizer is adamw8, the run began with adamw"),
    ],
)
def test_a_state_of_another_recipe(
    arguments: tuple[str, str],
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = begun(folder, monkeypatch).read_bytes()
    tiny_checkpoint.write(folder / "other")
    (folder / "b.jsonl").write_text(GOOD * 4)
    assert words in refuse(monkeypatch, capsys, "--data", "a.jsonl", "--resume", *arguments)
    assert (folder / "out" / "state.safetensors").read_bytes() == before


def test_a_state_of_another_shape_of_model_or_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the base now holds a larger model; then the state lost its end, or is of some other program."""
    state = begun(folder, monkeypatch)
    content = state.read_bytes()
    resume = ("--data", "a.jsonl", "--resume")
    tiny_checkpoint.write(folder / "base", ffn_size=96)
    said = refuse(monkeypatch, capsys, *resume)
    assert "out/state.safetensors: model.blocks.0.mlp." in said and "resume with the same recipe" in said
    assert state.read_bytes() == content
    tiny_checkpoint.write(folder / "base")
    state.write_bytes(content[:-100])
    assert "out/state.safetensors: is no training state" in refuse(monkeypatch, capsys, *resume)
    state.write_bytes(content)
    save_file(load_file(state), state)
    assert "out/state.safetensors: is no training state" in refuse(monkeypatch, capsys, *resume)
