"""Generation on models without a checkpoint: one with random weights, and one that recites what it is told.

The reciting model is an ordinary decoder: its blocks write nothing, its embedding is the identity, and its head sends
each token to the one that follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from minillm.errors import InputError, NumericsError
from minillm.generation import generate as generation
from minillm.generation.generate import (
    Completion,
    Prompt,
    decode_step,
    generate,
    left_pad,
    prefill,
    stream,
    token_steps,
)
from minillm.generation.sampling import Sampling
from minillm.model import Decoder
from tests import tiny
from tests.decoders import SHAPES, config, decoder
from tests.error import assert_near

EVERY = pytest.mark.parametrize("shape", SHAPES)


class Pieces:
    """A tokenizer whose token i is the i-th piece of text."""

    byte_ids: frozenset[int] = frozenset()

    def __init__(self, pieces: Sequence[str], special: Sequence[int] = ()) -> None:
        self.pieces, self.special_ids = list(pieces), frozenset(special)

    def encode(self, text: str) -> list[int]:
        return [] if not text else [self.pieces.index(text)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return "".join(self.pieces[i] for i in ids if not (skip_special and i in self.special_ids))

    def token(self, token_id: int) -> str:
        return self.pieces[token_id]

    def __len__(self) -> int:
        return len(self.pieces)


def reciting(following: Sequence[int], **fields: Any) -> Decoder:
    """A decoder that writes following[t] after token t."""
    size = len(following)
    model = Decoder(config(vocab_size=size, hidden_size=size, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.embed.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[list(following), range(size)] = 1
    return model


#: Token i is followed by i + 1, the last by the first.
TEXT = ("<s>", "Once", " upon", " a", " time", ". E", "ND", " of", " it", "</s>")
EOS = 9


def storyteller(**fields: Any) -> tuple[Decoder, Any]:
    return reciting([*range(1, 10), 0], **fields), Pieces(TEXT, special=(0, 9))


def tell(prompt: Prompt | Sequence[Prompt] = "Once", **options: Any) -> Completion:
    return generate(*storyteller(), prompt, **options)[0]


# -- why an answer ends ------------------------------------------------------------------------------------------------


def test_end_of_text() -> None:
    answer = tell(eos_ids=(EOS,))
    assert answer.text == " upon a time. END of it"
    assert (answer.tokens, answer.finish_reason) == ([2, 3, 4, 5, 6, 7, 8, 9], "eos")


@pytest.mark.parametrize(("prompt", "end"), [([1], 4), ([4], 6), ([6], EOS)])
def test_any_of_several_end_of_text_ids_ends_it(prompt: Prompt, end: int) -> None:
    answer = tell(prompt, eos_ids=(6, 4, EOS))
    assert (answer.tokens[-1], answer.finish_reason) == (end, "eos")
    assert answer.text == "".join(TEXT[prompt[0] + 1 : end])


def test_length() -> None:
    answer = tell(max_new_tokens=3)
    assert (answer.text, answer.tokens, answer.finish_reason) == (" upon a time", [2, 3, 4], "length")


def test_the_last_token_allowed_may_be_the_end() -> None:
    assert tell(eos_ids=(4,), max_new_tokens=3).finish_reason == "eos"


def test_stop_string_split_over_tokens() -> None:
    answer = tell(stop="END", eos_ids=(EOS,))
    assert (answer.text, answer.finish_reason) == (" upon a time. ", "stop")
    assert answer.tokens[-1] == 6  # and not one token more


def test_half_a_stop_string_at_the_end_is_text() -> None:
    answer = tell(stop="END", max_new_tokens=4)
    assert (answer.text, answer.finish_reason) == (" upon a time. E", "length")


def test_half_a_character_at_the_end_is_shown() -> None:
    """Held back while more bytes may come; after the last token it is all there is."""
    model, pieces = reciting([1, 2, 3, 0]), Pieces(["a", "b", "c\ufffd", "d"])
    answer = generate(model, pieces, "a", max_new_tokens=2)[0]  # type: ignore[arg-type]
    assert (answer.text, list(stream(model, pieces, "a", max_new_tokens=2))) == ("bc\ufffd", ["b", "c\ufffd"])  # type: ignore[arg-type]


def test_max_length_counts_the_prompt() -> None:
    assert tell([1, 2, 3], max_length=5).tokens == [4, 5]
    with pytest.raises(InputError, match="the prompt has 3 tokens and max_length, which counts it, is 3"):
        tell([1, 2, 3], max_length=3)


def test_the_first_of_two_limits_ends_it() -> None:
    assert tell([1, 2], max_length=4, max_new_tokens=5).tokens == [3, 4]
    assert tell([1, 2], max_length=8, max_new_tokens=1).tokens == [3]


def test_the_context_is_a_limit_of_each_row() -> None:
    model, tokenizer = storyteller(context=6)
    answers = generate(model, tokenizer, [[1], [1, 2, 3, 4]], max_new_tokens=50)
    assert [len(answer.tokens) for answer in answers] == [5, 2]
    assert {answer.finish_reason for answer in answers} == {"length"}


def test_min_new_tokens_puts_the_end_off() -> None:
    model = reciting([2, 2, 2, 2])  # that would say 2 and nothing else
    answer = generate(model, None, [1], eos_ids=(2,), min_new_tokens=3)[0]
    assert answer.tokens == [0, 0, 0, 2]
    assert generate(model, None, [1], eos_ids=(2,))[0].tokens == [2]


def test_a_row_that_has_ended_stays_as_it_is() -> None:
    model, tokenizer = storyteller()
    answers = generate(model, tokenizer, [[1], [7], [3, 4]], eos_ids=(EOS,))
    assert [answer.text for answer in answers] == [" upon a time. END of it", " it", ". END of it"]
    assert [len(answer.logprobs) for answer in answers] == [8, 2, 5]


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_an_empty_prompt_starts_from_bos() -> None:
    model, tokenizer = storyteller()
    model.generation_defaults = {"bos_token_id": 0}
    assert generate(model, tokenizer, "", max_new_tokens=2)[0].text == "Once upon"
    assert "".join(stream(model, tokenizer, "", max_new_tokens=2)) == "Once upon"


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_without_bos(prompt: Prompt) -> None:
    with pytest.raises(InputError, match="the prompt is empty and the model has no BOS token to start from"):
        tell(prompt)
    with pytest.raises(InputError, match="the prompt is empty"):
        stream(*storyteller(), prompt)


@pytest.mark.parametrize("length", [6, 7])
def test_a_prompt_that_fills_the_context(length: int) -> None:
    model, tokenizer = storyteller(context=6)
    with pytest.raises(InputError, match=f"the prompt has {length} tokens and the context 6; shorten the prompt"):
        generate(model, tokenizer, [[1], [1] * length])
    with pytest.raises(InputError, match=f"the prompt has {length} tokens"):
        next(iter(stream(model, tokenizer, [1] * length)))


@pytest.mark.parametrize("token", [10, -1, 1.5])
def test_a_token_outside_the_vocabulary(token: Any) -> None:
    with pytest.raises(
        InputError, match=f"token {token} is outside the model's vocabulary of 10; the tokenizer belongs"
    ):
        tell([1, token])


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(InputError, match="the prompt is text and there is no tokenizer"):
        generate(storyteller()[0], None, "Once")


def test_tokens_without_a_tokenizer() -> None:
    answer = generate(storyteller()[0], None, [1], max_new_tokens=2)[0]
    assert (answer.tokens, answer.text) == ([2, 3], "")


def test_one_prompt_or_several() -> None:
    for prompts, count in (("Once", 1), (["Once", " a"], 2), ([1, 2], 1), ([[1, 2]], 1), ([[1], [2, 3]], 2)):
        assert len(generate(*storyteller(), prompts, max_new_tokens=1)) == count  # type: ignore[arg-type]


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, 1.5, None])
def test_num_return_sequences_out_of_range(count: Any) -> None:
    with pytest.raises(InputError, match=r"num_return_sequences is .*; give a whole number of at least 1"):
        tell(num_return_sequences=count)


@pytest.mark.parametrize("count", [0, -5])
def test_no_new_tokens(count: int) -> None:
    with pytest.raises(InputError, match=f"max_new_tokens is {count}; give a whole number of at least 1"):
        tell(max_new_tokens=count)
    with pytest.raises(InputError, match=f"max_new_tokens is {count}"):
        stream(*storyteller(), "Once", max_new_tokens=count)


def test_the_checkpoints_defaults_and_the_callers_word() -> None:
    model, tokenizer = storyteller()
    model.generation_defaults = {"eos_token_id": [4, 7], "max_new_tokens": 2}
    assert generate(model, tokenizer, "Once")[0].tokens == [2, 3]
    assert generate(model, tokenizer, "Once", max_new_tokens=9)[0].tokens == [2, 3, 4]


def test_a_scalar_head_writes_nothing() -> None:
    with pytest.raises(InputError, match="the model has a scalar head: it scores text and writes none"):
        generate(decoder(head="scalar"), None, [1])


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 0}])
def test_broken_weights(options: dict[str, Any]) -> None:
    model = decoder()
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    with pytest.raises(NumericsError, match="row 0, step 0"):
        generate(model, None, [[1], [2]], **options)


# -- sampled batches ---------------------------------------------------------------------------------------------------

PROMPTS = [tiny.tokens(1, length, seed=length)[0].tolist() for length in (2, 11, 5)]


@EVERY
@pytest.mark.parametrize("options", [{}, {"top_k": 40, "temperature": 1.3}, {"top_p": 0.9, "repetition_penalty": 1.2}])
def test_a_row_is_the_single_run_of_its_own_seed(shape: str, options: dict[str, Any]) -> None:
    model = decoder(**SHAPES[shape])
    options = {**options, "do_sample": True, "max_new_tokens": 15}
    batch = generate(model, None, PROMPTS, seed=3, **options)
    singles = [generate(model, None, prompt, seed=3 + r, **options)[0] for r, prompt in enumerate(PROMPTS)]
    assert [row.tokens for row in batch] == [single.tokens for single in singles]
    assert_near(torch.tensor([row.logprobs for row in batch]), torch.tensor([single.logprobs for single in singles]))


def test_return_sequences_are_rows_of_their_own() -> None:
    model = decoder()
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 15}
    found = generate(model, None, PROMPTS[:2], num_return_sequences=3, seed=5, **options)
    expected = [
        generate(model, None, prompt, seed=5 + 3 * p + copy, **options)[0].tokens
        for p, prompt in enumerate(PROMPTS[:2])
        for copy in range(3)
    ]
    assert [row.tokens for row in found] == expected
    assert len(set(map(tuple, expected))) == 6


@EVERY
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1, "top_k": 5, "temperature": 0.7}])
def test_logprobs_are_those_of_one_uncached_forward(shape: str, options: dict[str, Any]) -> None:
    """At temperature 1 and unfiltered, however the token was chosen."""
    model = decoder(**SHAPES[shape])
    for prompt, row in zip(PROMPTS, generate(model, None, PROMPTS, max_new_tokens=10, **options), strict=True):
        text = torch.tensor([[*prompt, *row.tokens]])
        with torch.inference_mode():
            logprobs = model(text)[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
        # a difference of two fp32 logits, each within 1e-5 of the largest
        assert float((torch.tensor(row.logprobs) - expected).abs().max()) < 2e-5 * float(logprobs.abs().max())


# -- the stream --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"stop": ["END"]}, {"stop": ["upon a", "x"]}, {"max_new_tokens": 4}, {"stop": "EN d"}]
)
def test_pieces_together_are_the_text(options: dict[str, Any]) -> None:
    expected, answer = tell(eos_ids=(EOS,), **options), Completion()
    pieces = list(stream(*storyteller(), "Once", eos_ids=(EOS,), answer=answer, **options))
    assert "" not in pieces and "".join(pieces) == expected.text
    assert answer == expected


def test_no_piece_holds_part_of_a_stop_string() -> None:
    assert list(stream(*storyteller(), "Once", stop="END")) == [" upon", " a", " time", ". "]


def test_stopping_early_computes_no_more_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = storyteller()
    calls, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args, **options: calls.append(1) or hidden(*args, **options))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    answer = Completion()
    pieces = stream(model, tokenizer, "Once", answer=answer)
    assert calls == []  # nothing is computed before it is asked for
    assert list(itertools.islice(pieces, 2)) == [" upon", " a"]
    pieces.close()  # type: ignore[attr-defined]
    assert len(calls) == 2 and answer.tokens == [2, 3]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("grad", [True, False])
def test_the_callers_grad_mode_is_its_own_between_pieces(grad: bool) -> None:
    model, tokenizer = storyteller()
    with torch.set_grad_enabled(grad):
        for count, _ in enumerate(stream(model, tokenizer, "Once", max_new_tokens=5)):
            assert torch.is_grad_enabled() is grad and not torch.is_inference_mode_enabled()
            if grad and count == 2:  # training between two pieces
                model(torch.tensor([[1, 2]])).sum().backward()
                assert model.embed.weight.grad is not None


def test_training_mode_is_left_as_it_was() -> None:
    model, _ = storyteller()
    model.train()
    generate(model, None, [1], max_new_tokens=2)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


# -- the steps ---------------------------------------------------------------------------------------------------------


@EVERY
@torch.inference_mode()
def test_prefill_and_decode_are_the_last_logits(shape: str) -> None:
    model = decoder(**SHAPES[shape])
    tokens, keep = left_pad(PROMPTS)
    cache = model.new_cache(3, 12)
    first = prefill(model, tokens, keep, cache)
    second = decode_step(model, torch.tensor([7, 8, 9]), cache)
    for r, prompt in enumerate(PROMPTS):
        text = torch.tensor([[*prompt, 7 + r]])
        assert_near(torch.stack((first[r], second[r])), model(text)[0, -2:])


@EVERY
@pytest.mark.parametrize("cached", [1, 6, 10])
def test_a_prefilled_cache_changes_nothing(shape: str, cached: int) -> None:
    model, prompt = decoder(**SHAPES[shape]), PROMPTS[1]
    sampling = Sampling(do_sample=True, seed=4)
    expected = list(token_steps(model, [prompt], sampling, 8))
    cache = model.new_cache(1, len(prompt) + 8)
    with torch.inference_mode():
        model(torch.tensor([prompt[:cached]]), cache=cache)
    found = list(token_steps(model, [prompt], sampling, 8, cache=cache))
    assert [step.tokens for step in found] == [step.tokens for step in expected]
    assert_near(torch.tensor([step.logprobs for step in found]), torch.tensor([step.logprobs for step in expected]))
    assert cache.length == len(prompt) + 7  # the last token is chosen and not read


def test_left_pad() -> None:
    tokens, keep = left_pad([[1, 2, 3], [4], [5, 6]])
    assert tokens.tolist() == [[1, 2, 3], [0, 0, 4], [0, 5, 6]]
    assert keep.int().tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert (tokens.dtype, keep.dtype) == (torch.int64, torch.bool)


def test_a_finished_row_leaves_the_batch_and_cannot_end_the_others() -> None:
    """Alone row 0 ends by max_length before it has forbidden itself every token; beside row 1 it must too."""
    model = decoder(vocab_size=8, context=64)
    options: dict[str, Any] = {"no_repeat_ngram_size": 1, "max_length": 8}
    prompts = [[0, 1, 2, 3, 4, 5], [6]]
    alone = [generate(model, None, prompt, **options)[0].tokens for prompt in prompts]
    assert [answer.tokens for answer in generate(model, None, prompts, **options)] == alone
    assert [len(tokens) for tokens in alone] == [2, 7]


def test_rows_are_computed_only_while_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = generation.decode_step

    def counted(model: Decoder, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        sizes.append(len(tokens))
        return original(model, tokens, cache)

    monkeypatch.setattr(generation, "decode_step", counted)
    generate(decoder(context=64), None, [[1, 2, 3, 4], [5, 6], [7]], max_length=6)
    assert sizes == [3, 2, 2, 1]  # answers of 2, 4 and 5 tokens, the first of each from the prefill


def test_a_stop_string_that_is_a_special_token_stops() -> None:
    """A special token prints nothing, so no text would ever show it."""
    model, _ = storyteller()
    pieces = Pieces([*"abcdefgh"][: model.config.vocab_size], special=[])
    first = generate(model, pieces, [0], max_new_tokens=3)[0].tokens
    pieces.special_ids = frozenset([first[1]])
    (answer,) = generate(model, pieces, [0], max_new_tokens=3, stop=pieces.token(first[1]))
    assert (answer.tokens, answer.finish_reason, answer.text) == (first[:2], "stop", pieces.token(first[0]))
