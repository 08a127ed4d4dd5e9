"""Streamed pieces add up to the decoded text, for every sequence of ids."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from minillm.data.detokenize import CONTEXT, StreamDecoder
from minillm.data.tokenizer import Tokenizer
from tests import texts

KINDS = ["llama3", "falcon", "sentencepiece", "sentencepiece_first"]


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param.startswith("sentencepiece"):
        pytest.importorskip("sentencepiece")
        folder = tmp_path_factory.mktemp(request.param)
        (folder / "tokenizer.model").write_bytes(texts.sentencepiece_bytes())
        if request.param == "sentencepiece_first":
            (folder / "tokenizer_config.json").write_text('{"legacy": false}')
        return Tokenizer.load(folder)
    return Tokenizer.from_tokenizers(texts.byte_level(request.param))


def sequences(tokenizer: Tokenizer) -> list[list[int]]:
    """Real texts, real texts cut and glued anywhere, and pure noise with many byte tokens, specials and unknown ids."""
    rng = random.Random(0)
    real = [tokenizer.encode(text) for text in texts.NASTY]
    rough = list(tokenizer.byte_ids) or [i for i in range(len(tokenizer)) if len(tokenizer.token(i)) == 1]
    made = list(real)
    for _ in range(150):
        a, b = rng.choice(real), rng.choice(real)
        made.append(a[: rng.randint(0, len(a))] + b[rng.randint(0, len(b)) :])
    for _ in range(150):
        noise = [rng.choice(rough) if rng.random() < 0.7 else rng.randrange(len(tokenizer) + 3) for _ in range(40)]
        made.append(noise)
    return made


@pytest.mark.parametrize("skip_special", [True, False])
def test_pieces_add_up(tokenizer: Tokenizer, skip_special: bool) -> None:
    for ids in sequences(tokenizer):
        stream = StreamDecoder(tokenizer, skip_special=skip_special)
        pieces = [stream.push(i) for i in ids] + [stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special), ids


def test_prompt_and_pieces_add_up(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    checked = 0
    for ids in sequences(tokenizer):
        cut = rng.randint(0, len(ids))
        prompt, answer = ids[:cut], ids[cut:]
        whole, before = tokenizer.decode(ids), tokenizer.decode(prompt)
        stream = StreamDecoder(tokenizer, prompt=prompt)
        streamed = "".join([*map(stream.push, answer), stream.finish()])
        if whole.startswith(before):  # otherwise the prompt ends inside a character
            assert before + streamed == whole, (prompt, answer)
            checked += 1
        else:
            assert whole.endswith(streamed), (prompt, answer)
    assert checked > 250


def test_a_prompt_that_ends_inside_a_character_is_completed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x 𓀀 y", bos=False)
    cut = next(i for i in range(1, len(ids)) if tokenizer.decode(ids[:i]).endswith("\ufffd"))
    stream = StreamDecoder(tokenizer, prompt=ids[:cut])
    streamed = "".join([*map(stream.push, ids[cut:]), stream.finish()])
    assert streamed == "𓀀 y"


def test_no_half_character_and_no_delay(tokenizer: Tokenizer) -> None:
    """On valid text no U+FFFD comes out, and after each token all text up to the last whole character is out."""
    text = "The café saw 你好 😀 e\u0323\u0302 and 👩‍👩‍👧 was 한국어."
    ids = tokenizer.encode(text, bos=False)
    stream, out = StreamDecoder(tokenizer), ""
    for count, i in enumerate(ids, start=1):
        out += stream.push(i)
        assert "\ufffd" not in out
        if i not in tokenizer.byte_ids:
            assert out == tokenizer.decode(ids[:count]).rstrip("\ufffd")
    assert out + stream.finish() == text


def test_a_real_replacement_character_comes_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\ufffdb", bos=False)
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) == "a\ufffdb"


def test_each_push_decodes_a_short_window(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """O(1): a thousand times the same text, or noise of lone bytes, never decodes more than a few tokens at once."""
    decode, sizes = tokenizer.decode, []

    def counted(ids: list[int], *, skip_special: bool = True) -> str:
        sizes.append(len(ids))
        return decode(ids, skip_special=skip_special)

    monkeypatch.setattr(tokenizer, "decode", counted)
    prompt = tokenizer.encode("The cat saw it. " * 1000, bos=False)
    stream = StreamDecoder(tokenizer, prompt=prompt)
    for i in tokenizer.encode("The dog was 12. " * 50, bos=False):
        stream.push(i)
    if not tokenizer.byte_ids:  # a byte-fallback run has to be whole, and is decoded once
        lone = tokenizer.encode("你", bos=False)[-1]
        for _ in range(500):
            stream.push(lone)
    assert max(sizes) <= 3 * CONTEXT + 1


def test_leading_space_with_and_without_prompt(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(texts.sentencepiece_bytes())
    tokenizer = Tokenizer.load(tmp_path)
    answer = tokenizer.encode("was", bos=False)
    assert tokenizer.token(answer[0]).startswith("\u2581")
    alone, after = StreamDecoder(tokenizer), StreamDecoder(tokenizer, prompt=tokenizer.encode("The cat"))
    assert "".join([*map(alone.push, answer), alone.finish()]) == "was"
    assert "".join([*map(after.push, answer), after.finish()]) == " was"
