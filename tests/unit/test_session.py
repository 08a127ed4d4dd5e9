"""A conversation on one cache says what it would say without one, and computes only what is new."""

from __future__ import annotations

from pathlib import Path

import pytest

import minillm
from minillm.generation import generate as generation
from minillm.generation.generate import Completion
from minillm.generation.session import Session
from tests import tiny_checkpoint


@pytest.fixture
def model_and_tokenizer(tmp_path: Path) -> tuple[minillm.Decoder, minillm.Tokenizer]:
    return minillm.load(tiny_checkpoint.write(tmp_path, eos=None))


def test_turns_equal_fresh_runs_and_prefill_only_the_new(
    model_and_tokenizer: tuple[minillm.Decoder, minillm.Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = model_and_tokenizer
    session, computed = Session(model, tokenizer), []
    original = generation.prefill

    def counted(model: minillm.Decoder, tokens, keep, cache):  # type: ignore[no-untyped-def]
        computed.append(tokens.shape[1])
        return original(model, tokens, keep, cache)

    monkeypatch.setattr(generation, "prefill", counted)
    first = tokenizer.encode("def main")
    answer = Completion()
    "".join(session.stream(first, answer, max_new_tokens=6))
    second = [*first, *answer.tokens, *tokenizer.encode("the other")]
    edited = [*first[:-1], *tokenizer.encode("thing")]
    for prompt in (second, edited, edited):
        told = "".join(session.stream(prompt, Completion(), max_new_tokens=6))
        (fresh,) = minillm.generate(model, tokenizer, prompt, max_new_tokens=6)
        assert told == fresh.text
        computed.pop()  # the fresh run's
    # all of the first; the last answer token and what follows; from the edit on; the last token alone
    assert computed == [len(first), len(second) - len(first) - 5, len(edited) - len(first) + 1, 1]


def test_an_answer_stopped_early_leaves_the_session_usable(
    model_and_tokenizer: tuple[minillm.Decoder, minillm.Tokenizer],
) -> None:
    model, tokenizer = model_and_tokenizer
    session, prompt = Session(model, tokenizer), tokenizer.encode("def main")
    pieces = session.stream(prompt, Completion(), max_new_tokens=20)
    next(pieces)
    pieces.close()
    told = "".join(session.stream(prompt, Completion(), max_new_tokens=6))
    assert told == minillm.generate(model, tokenizer, prompt, max_new_tokens=6)[0].text
