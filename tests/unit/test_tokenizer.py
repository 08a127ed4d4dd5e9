"""One tokenizer from each kind of folder: BOS, special tokens, saving, and the errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Pipeline
from tokenizers import models

from minillm.data import sentencepiece_model, tiktoken_model
from minillm.data.tokenizer import Tokenizer
from minillm.errors import CheckpointError, InputError, TokenizerError
from tests import texts

CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
HELLO = [{"role": "user", "content": "Hello world"}]


def folder_of(folder: Path, kind: str = "llama3", **config: Any) -> Path:
    names = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "lstrip": False}, "pad_token": "<|pad|>"}
    if kind == "falcon":
        names = {"eos_token": "<|endoftext|>"}
    texts.byte_level(kind).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **config}))
    return folder


def sentencepiece_folder(folder: Path, **config: Any) -> Path:
    pytest.importorskip("sentencepiece")
    (folder / "tokenizer.model").write_bytes(texts.sentencepiece_bytes())
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_names_and_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    assert len(tokenizer) == tokenizer.vocab_size == 420
    assert [tokenizer.token(i) for i in (0, 1, 2)] == ["<|begin|>", "<|end|>", "<|pad|>"]
    assert tokenizer.encode("a<|end|>") == [0, *tokenizer.encode("a", bos=False), 1]


@pytest.mark.parametrize("kind", ["llama3", "falcon"])
def test_round_trip(tmp_path: Path, kind: str) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, kind))
    for text in texts.NASTY:
        assert tokenizer.decode(tokenizer.encode(text)) == text


# T11: exactly one BOS, in the plain and in the chat path


@pytest.mark.parametrize(
    ("config", "count"),
    [({}, 1), ({"add_bos_token": True}, 1), ({"add_bos_token": False}, 0)],
    ids=["post-processor", "true", "false"],
)
def test_the_config_decides_about_bos(tmp_path: Path, config: dict[str, bool], count: int) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, **config))
    assert tokenizer.encode("Hello").count(0) == count
    assert tokenizer.encode("Hello", bos=True).count(0) == 1
    assert tokenizer.encode("Hello", bos=False).count(0) == 0
    assert tokenizer.encode("").count(0) == count


@pytest.mark.parametrize("bos", [None, True, False])
def test_a_text_that_starts_with_bos_gets_no_second(tmp_path: Path, bos: bool | None) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path))
    ids = tokenizer.encode("<|begin|>Hello", bos=bos)
    assert ids == tokenizer.encode("Hello", bos=True)


def test_eos_is_added_where_the_config_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, add_eos_token=True))
    assert tokenizer.encode("Hello")[0] == 0
    assert tokenizer.encode("Hello")[-1] == 1


def test_chat_has_one_bos_and_two_are_an_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, chat_template=CHAT))
    ids = tokenizer.chat(HELLO)
    assert ids.count(0) == 1
    assert ids == tokenizer.encode("<|begin|>[user]Hello world<|end|>")
    assert tokenizer.encode(tokenizer.render_chat(HELLO)) == ids  # text rendered first and encoded later: one as well
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    with pytest.raises(TokenizerError, match="two BOS tokens"):
        tokenizer.chat(HELLO)


def test_chat_adds_no_bos_of_its_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, chat_template=CHAT.replace("{{ bos_token }}", "")))
    assert tokenizer.chat(HELLO).count(0) == 0


def test_chat_passes_names_and_variables(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, chat_template="{{ pad_token }}{{ thinking }}{{ tools | length }}"))
    assert tokenizer.render_chat(HELLO, tools=[{"name": "f"}], thinking=False) == "<|pad|>False1"


def test_no_chat_template_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="plain `generate`"):
        Tokenizer.load(folder_of(tmp_path)).chat(HELLO)


def test_chat_template_sources(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Tokenizer.load(folder_of(tmp_path, chat_template="C")).chat_template == "C"
    assert Tokenizer.load(folder_of(tmp_path, chat_template=several)).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert Tokenizer.load(tmp_path).chat_template == "F"


# The special tokens of the side files


def test_special_tokens_map_and_added_tokens_json(tmp_path: Path) -> None:
    folder_of(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|begin|>"}, "pad_token": "<|new|>"}')
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 420, "<|new|>": 421}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, None, 421)
    assert tokenizer.encode("a<tool>", bos=False)[-1] == 420
    assert 420 not in tokenizer.special_ids
    assert 421 in tokenizer.special_ids
    assert tokenizer.decode([420, 421]) == "<tool>"


def test_an_added_token_with_another_id_is_an_error(tmp_path: Path) -> None:
    folder_of(tmp_path, added_tokens_decoder={"999": {"content": "<tool>"}})
    with pytest.raises(TokenizerError, match=r"'<tool>' should have id 999.*420"):
        Tokenizer.load(tmp_path)


def test_padding_and_truncation_left_on_in_the_file_are_off(tmp_path: Path) -> None:
    pipeline = texts.byte_level()
    pipeline.enable_padding(length=50)
    pipeline.enable_truncation(3)
    pipeline.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("Hello world, 12") == Tokenizer.from_tokenizers(texts.byte_level()).encode(
        "Hello world, 12"
    )


# tokenizer.model


def test_sentencepiece_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(sentencepiece_folder(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.encode("Hello")[0] == 1
    assert tokenizer.encode("x</s>")[-1] == 2  # unlike sentencepiece, which spells it out
    for text in texts.NASTY:
        if "\u2581" not in text and "<" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.byte_ids == frozenset(range(3, 259))


def test_sentencepiece_dummy_space(tmp_path: Path) -> None:
    """legacy, or nothing said: every stretch of text gets one, whatever it starts with; not legacy: only the first."""
    always = Tokenizer.load(sentencepiece_folder(tmp_path))
    first = Tokenizer.load(sentencepiece_folder(tmp_path, legacy=False))
    was, bare = always.encode("was", bos=False), first.encode("</s>was", bos=False)[1:]
    assert always.token(was[0]).startswith("\u2581")
    assert not first.token(bare[0]).startswith("\u2581")
    assert always.encode("</s>was", bos=False)[1:] == was == first.encode("was", bos=False)
    assert always.decode(always.encode(" was")) == " was"


def test_sentencepiece_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    data = sentencepiece_folder(tmp_path) and path.read_bytes()
    for broken in (data[:1000], b"\x0a\xff" + data, b"", b"\x0f\x00", b"\xff" * 20):
        path.write_bytes(broken)
        with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
            Tokenizer.load(tmp_path)
    path.write_bytes(data + b"\x12\x02\x18\x01")  # a second TrainerSpec that says unigram
    with pytest.raises(TokenizerError, match="model type 1, not BPE"):
        sentencepiece_model.read(path)


def test_tiktoken_special_ids(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(texts.tiktoken_file())
    base = len(texts.tiktoken_ranks())
    tokenizer = Tokenizer.load(tmp_path)
    assert len(tokenizer) == base + 256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (base, base + 1)
    assert tokenizer.encode("<|eot_id|>") == [base, base + 9]
    assert tokenizer.token(base + 255) == "<|reserved_special_token_247|>"
    for text in texts.NASTY:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tiktoken_names_come_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(texts.tiktoken_file())
    place = len(texts.tiktoken_ranks()) + 8
    added = {str(place): {"content": "<|reserved_special_token_4|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert Tokenizer.load(tmp_path).token(place) == "<|reserved_special_token_4|>"


def test_broken_ranks(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    lines = texts.tiktoken_file().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:200]))
    with pytest.raises(TokenizerError, match="truncated"):
        tiktoken_model.read(path)
    path.write_bytes(lines[0] + b"?? x\n")
    with pytest.raises(TokenizerError, match="line 2"):
        tiktoken_model.read(path)


# Made in a script, saved, loaded


def test_from_tokenizers_and_save(tmp_path: Path) -> None:
    made = Tokenizer.from_tokenizers(
        texts.byte_level("falcon"), bos="<|endoftext|>", eos="<|endoftext|>", chat_template=CHAT
    )
    assert made.encode("Hello")[0] == made.bos_id == made.eos_id
    made.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    assert [loaded.encode(text) for text in texts.NASTY] == [made.encode(text) for text in texts.NASTY]
    assert loaded.chat_template == CHAT
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.special_ids) == (0, 0, None, {0})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    loaded.chat_template = None
    loaded.save(tmp_path / "new")
    assert Tokenizer.load(tmp_path / "new").chat_template is None


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written"):
        tokenizer.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_from_tokenizers_leaves_the_pipeline_alone() -> None:
    pipeline = texts.byte_level("falcon")
    before = pipeline.to_str()
    Tokenizer.from_tokenizers(pipeline, bos="<|endoftext|>")
    assert pipeline.to_str() == before
    with pytest.raises(TokenizerError, match=r"'<s>' is not in the vocabulary"):
        Tokenizer.from_tokenizers(pipeline, bos="<s>")


# Errors


def test_no_tokenizer_names_the_folder_and_the_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model") as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", "[" * 100_000, "not JSON"),
        ("tokenizer_config.json", "[]", "a JSON object is needed"),
        ("tokenizer_config.json", '{"bos_token": 3}', "is not a token"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "`add_bos_token` is 'yes'"),
        ("tokenizer_config.json", '{"add_bos_token": true}', "no bos_token is named"),
        ("tokenizer_config.json", '{"chat_template": 3}', "a string is needed"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x", "template": ""}]}', "named 'default'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "malformed"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": "a"}}', "malformed"),
        ("chat_template.jinja", "x" * (1 << 21), "larger than any chat template"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder_of(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_input(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, "falcon"))
    for wrong in (None, 3, b"bytes", "half \ud83d"):
        with pytest.raises(InputError, match="not encodable text"):
            tokenizer.encode(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no BOS token"):
        tokenizer.encode("a", bos=True)
    for wrong_id in (-1, 1 << 40):
        with pytest.raises(InputError, match="out of range"):
            tokenizer.decode([1, wrong_id])
    with pytest.raises(InputError, match="not in the vocabulary of 420"):
        tokenizer.token(420)
    assert tokenizer.decode([420, 100_000]) == ""  # a model's padded rows


def test_a_vocabulary_that_cannot_say_a(tmp_path: Path) -> None:
    """The post-processor is read off by encoding "a"; a vocabulary without it must load all the same."""
    Pipeline(models.WordLevel({"b": 0}, unk_token="b")).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("b") == [0]
