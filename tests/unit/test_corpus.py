"""Text in, batches out: what is read, what is held out, and that every token is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from minillm.data.bpe import END_OF_TEXT, bytes_per_token, encode, train_bpe
from minillm.data.corpus import Document, Windows, fingerprint, read_folder, split
from minillm.errors import InputError

TEXTS = ["def add(a, b):\n    return a + b\n", "naïve café — ‘quoted’ 🙂\n", "x = 1\n" * 20]
DOCUMENTS = [Document(f"{index}.py", text) for index, text in enumerate(TEXTS)]


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_reads_text_and_nothing_else(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "b.py": b"\xef\xbb\xbfb = 1",  # a byte-order mark, which is no Python
        "a/z.py": "z = 1",
        "a/notes.md": "# no",
        "test/c.py": "c = 1",
        "a/test/d.py": "d = 1",
        ".git/e.py": "e = 1",
        "empty.py": " \n",
        "latin.py": "ä".encode("latin-1"),
        "binary.py": b"a\0b",
    }
    write(tmp_path, files)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(tmp_path / "pipe.py")  # reading it would wait for ever
    documents = read_folder(tmp_path, suffixes=[".py"], leave_out=["test"])
    assert documents == [Document("a/z.py", "z = 1"), Document("b.py", "b = 1")]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no text in 0 files"),
        ({"a.txt": "hello"}, "no text in 1 files, 0 of them ending in .py"),
        ({"a.py": ""}, "no text"),
    ],
)
def test_a_folder_without_text_is_named(tmp_path: Path, files: dict[str, str | bytes], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        read_folder(write(tmp_path, files), suffixes=[".py"])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_folder(tmp_path / "absent", suffixes=[".py"])


def test_the_split_is_by_path_alone() -> None:
    many = [Document(f"package/module_{index}.py", str(index)) for index in range(2000)]
    training, held = split(many, 0.1)
    assert not {document.path for document in training} & {document.path for document in held}
    assert sorted(training + held) == sorted(many)
    assert 140 < len(held) < 260  # 200 expected, 13 is the standard deviation of 2000 draws at 0.1
    again = split([Document(document.path, "other text") for document in reversed(many)][:1000], 0.1)[1]
    assert {document.path for document in again} == {d.path for d in held if d in many[1000:]}


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_both_sides_of_the_split_need_a_file(fraction: float) -> None:
    with pytest.raises(InputError, match="both sides need at least one"):
        split(DOCUMENTS, fraction)


def test_the_vocabulary_gives_back_every_text() -> None:
    pipeline = train_bpe(TEXTS[:1], 300)
    assert pipeline.to_str() == train_bpe(TEXTS[:1], 300).to_str(), "the same text, another vocabulary"
    for text in [*TEXTS, "\r\n\t  \x00 \u2028", " leading"]:
        assert pipeline.decode(pipeline.encode(text).ids) == text


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    assert train_bpe(TEXTS, 257).get_vocab_size() == 257
    with pytest.raises(InputError, match="256"):
        train_bpe(TEXTS, 256)


def test_the_stream_is_the_documents_with_joints_between() -> None:
    pipeline = train_bpe(TEXTS, 300)
    stream = encode(pipeline, TEXTS)
    end = pipeline.token_to_id(END_OF_TEXT)
    joints = (stream == end).nonzero().flatten().tolist()
    assert len(joints) == 3 and joints[0] == 0
    pieces = [stream[a + 1 : b].tolist() for a, b in zip(joints, [*joints[1:], len(stream)], strict=True)]
    assert [pipeline.decode(piece) for piece in pieces] == TEXTS
    assert fingerprint(stream) == fingerprint(encode(pipeline, TEXTS))
    assert fingerprint(stream) != fingerprint(encode(pipeline, TEXTS[:2]))


def test_a_spelled_out_joint_stays_text() -> None:
    pipeline = train_bpe(TEXTS, 300)
    text = f"the token {END_OF_TEXT} ends a text"
    stream = encode(pipeline, [text])
    assert (stream == pipeline.token_to_id(END_OF_TEXT)).sum() == 1
    assert pipeline.decode(stream[1:].tolist()) == text


def test_bytes_of_tokens_add_up_to_the_text() -> None:
    pipeline = train_bpe(TEXTS, 300)
    sizes = bytes_per_token(pipeline)
    assert sizes[encode(pipeline, TEXTS).long()].sum() == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("length", [8, 9, 50, 57, 58])
def test_an_epoch_predicts_every_token(length: int) -> None:
    windows = Windows(torch.arange(length, dtype=torch.int32), context=8, seed=0)
    epoch = torch.cat([windows.batch(step, 1) for step in range(len(windows))])
    assert epoch.dtype == torch.int64
    targets = epoch[:, 1:].flatten().tolist()
    assert set(targets) == set(range(1, length))
    assert len(targets) - len(set(targets)) < 7, "more than the last window repeats"
    assert bool((epoch.diff(dim=1) == 1).all()), "a window is not one stretch of text"


def test_batches_are_a_function_of_seed_and_step() -> None:
    stream = torch.arange(400)
    one, other = (Windows(stream, context=8, seed=5) for _ in range(2))
    run = [one.batch(step, 3) for step in range(60)]
    for step in (59, 0, 31, 30):  # in any order, as after a resume
        assert torch.equal(other.batch(step, 3), run[step])
    epochs = [torch.cat(run).split(len(one))[index].tolist() for index in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1], "epochs repeat the text in a new order"
    assert not torch.equal(Windows(stream, context=8, seed=6).batch(0, 3), run[0])


@pytest.mark.parametrize(
    ("length", "context", "expected"), [(7, 8, "7 tokens"), (9, 1, "takes 2 tokens"), (0, 2, "0 tokens")]
)
def test_windows_that_cannot_be(length: int, context: int, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Windows(torch.zeros(length), context=context, seed=0)
