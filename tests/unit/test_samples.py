"""What a model under training writes: from which prompt, until where, and that the model is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import minillm
from minillm.data.examples import Example
from minillm.training.metrics import SAMPLES, Metrics, read_lines
from minillm.training.samples import continuation, evaluating, overfitting, prompt_and_answer, show_samples
from tests import tiny_checkpoint


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[minillm.Decoder, minillm.Tokenizer]:
    return minillm.load(tiny_checkpoint.write(tmp_path_factory.mktemp("model"), context=32))


def example(taught: str) -> Example:
    """Tokens 10, 11, 12 ...; taught where there is an x."""
    return Example(torch.arange(10, 10 + len(taught)).int(), torch.tensor([each == "x" for each in taught]))


@pytest.mark.parametrize(
    ("taught", "prompt", "answer"),
    [
        ("..xx", [10, 11], [12, 13]),
        (".xxx", [10], [11, 12, 13]),
        ("..x..xx", [10, 11], [12]),  # a conversation: its first answer
        ("...x.", [10, 11, 12], [13]),
    ],
)
def test_the_prompt_is_what_comes_before_the_first_taught_token(
    taught: str, prompt: list[int], answer: list[int]
) -> None:
    assert prompt_and_answer(example(taught)) == (prompt, answer)


def test_it_is_what_generate_writes_and_not_what_the_checkpoint_asks_for(
    loaded: tuple[minillm.Decoder, minillm.Tokenizer],
) -> None:
    model, tokenizer = loaded
    (answer,) = minillm.generate(model, tokenizer, [50, 51, 52], do_sample=False, max_new_tokens=12)
    assert continuation(model, tokenizer, [50, 51, 52], most=12) == [each for each in answer.tokens if each]
    model.generation_defaults = {"num_beams": 4, "max_length": 2, "do_sample": True, "eos_token_id": 0}
    try:
        assert continuation(model, tokenizer, [50, 51, 52], most=12) == [each for each in answer.tokens if each]
    finally:
        model.generation_defaults = {"eos_token_id": 0}


def test_it_ends_at_a_special_token_and_at_the_context(
    loaded: tuple[minillm.Decoder, minillm.Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    ids = continuation(model, tokenizer, [50, 51, 52], most=12)
    assert len(ids) > 3
    assert len(continuation(model, tokenizer, [50] * 30)) <= 2  # of a context of 32
    monkeypatch.setattr(tokenizer, "special_ids", frozenset({ids[2]}))
    assert continuation(model, tokenizer, [50, 51, 52], most=12) == ids[: ids.index(ids[2])]


def test_the_model_is_left_as_it_was(loaded: tuple[minillm.Decoder, minillm.Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = loaded
    for training in (True, False):
        model.train(training)
        before = torch.get_rng_state()
        with Metrics(tmp_path) as metrics:
            show_samples(model, tokenizer, [example("..xx")] * 2, 7, metrics=metrics, say=lambda text: None)
            assert len(read_lines(tmp_path / SAMPLES)) == 2
        assert all(module.training == training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), before)
    model.train()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert model.training and torch.is_grad_enabled()
    loss = model(torch.tensor([[1, 2, 3]])).sum()
    loss.backward()  # nothing that was computed while looking stays in the graph


def test_what_is_shown_is_one_line_that_no_terminal_obeys(
    loaded: tuple[minillm.Decoder, minillm.Tokenizer], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    ids = tokenizer.encode("def\x1b[2J\nmain\r" * 9)[:20]
    given = Example(torch.tensor([*ids, 40]), torch.tensor([False] * len(ids) + [True]))
    told: list[str] = []
    with Metrics(tmp_path) as metrics:
        show_samples(model, tokenizer, [given], 7, metrics=metrics, say=told.append)
    assert told[0].isprintable() and "⏎" in told[0] and len(told[0]) <= 2 + 60 + 3 + 60
    (line,) = read_lines(tmp_path / SAMPLES)
    assert line["prompt"] == tokenizer.decode(ids) and line["wanted"] == tokenizer.decode([40])


def test_a_word_each_time_the_loss_is_above_its_best() -> None:
    losses = [3.0, 2.0, 2.5, 2.4, 1.9, 2.0]
    said = [overfitting(list(enumerate(losses[:end]))) for end in range(len(losses) + 1)]
    assert [word is not None for word in said] == [False, False, False, True, True, False, True]
    assert said[6] == "step 5: the held-out loss is 2.000, above 1.900 at step 4: learning by heart begins"
