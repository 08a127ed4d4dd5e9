"""Records to tensors, and that each one is either an example or in the account."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minillm.data.examples import Example, Tally, divided, make_examples
from minillm.data.formats import Completion, alpaca_prompt
from minillm.data.records import Record, number
from minillm.data.tokenizer import Tokenizer
from minillm.errors import InputError, TokenizerError
from tests import texts

PAIR = {"prompt": "Hello", "completion": " world"}


def tokenizer(**options: Any) -> Tokenizer:
    return Tokenizer.from_tokenizers(texts.byte_level(), bos="<|begin|>", **{"eos": "<|end|>", **options})


def make(*rows: dict[str, Any], **options: Any) -> tuple[list[list[int]], Tally]:
    examples, tally = make_examples(number(rows, name="a.jsonl"), tokenizer(), **{"context": 200, **options})
    return [example.tokens.tolist() for example in examples], tally


def test_an_example_is_its_ids_and_its_mask() -> None:
    by = tokenizer()
    (example,), tally = make_examples([Record(PAIR, "a.jsonl", 9)], by, context=50)
    assert example.tokens.tolist() == [*by.encode("Hello world"), by.eos_id]
    assert (example.tokens.dtype, example.taught.dtype) == (torch.int32, torch.bool)
    assert by.decode(example.tokens[example.taught].tolist(), skip_special=False) == " world<|end|>"
    assert (len(example), example.place) == (len(by.encode("Hello world")) + 1, "a.jsonl line 9")
    assert tally == Tally(used=1)


def test_every_record_is_used_or_named() -> None:
    rows = [PAIR, {**PAIR, "completion": " "}, PAIR, {"prompt": "a"}, {**PAIR, "prompt": "\ud800"}, PAIR]
    found, tally = make(*rows)
    assert len(found) == tally.used == 3
    assert [place for place, _ in tally.unusable] == ["a.jsonl line 2", "a.jsonl line 4", "a.jsonl line 5"]
    assert [reason.split(",")[0] for _, reason in tally.unusable] == [
        "`completion` is empty",
        "`completion` is missing",
        r"str '\ud800world' is not encodable text: give a str of Unicode".replace("world", " world"),
    ]
    assert str(tally).startswith("3 of 6 records are used; 3 cannot be: a.jsonl line 2: `completion` is empty; a.jsonl")


def test_a_long_account_names_the_first() -> None:
    _, tally = make(PAIR, *[{"prompt": "a"}] * 5)
    assert str(tally) == (
        "1 of 6 records are used; 5 cannot be: a.jsonl line 2: `completion` is missing; a.jsonl line 3: `completion` is"
        " missing; a.jsonl line 4: `completion` is missing; and 2 more"
    )


def test_too_long_is_named_or_cut() -> None:
    long = {"prompt": "Hello", "completion": " world" * 9}
    whole = make(long)[0][0]
    found, tally = make(PAIR, long, context=len(whole) - 1)
    assert len(found) == 1 and tally.unusable == [
        ("a.jsonl line 2", f"{len(whole)} tokens, the context is {len(whole) - 1}")
    ]
    assert make(PAIR, long, context=len(whole))[1] == Tally(used=2)
    found, tally = make(PAIR, long, context=len(whole) - 1, cut=True)
    assert found[1] == whole[:-1] and tally.cut == ["a.jsonl line 2"]
    assert "1 were cut to the context and lost their end: a.jsonl line 2" in str(tally)


def test_a_cut_that_leaves_nothing_to_learn_is_named() -> None:
    prompt = {"prompt": "Hello world" * 9, "completion": " a"}
    _, tally = make(PAIR, prompt, context=6, cut=True)
    assert tally.cut == [] and "none of the first 6 is to be taught" in tally.unusable[0][1]


def test_files_may_have_formats_of_their_own() -> None:
    alpaca = {"instruction": "Add", "output": "12"}
    rows = [Record(PAIR, "a.jsonl", 1), Record(alpaca, "b.json", 1), Record({"text": "a"}, "b.json", 2)]
    examples, tally = make_examples(rows, tokenizer(), context=500)
    assert [example.place for example in examples] == ["a.jsonl line 1", "b.json line 1"]
    assert tally.unusable == [("b.json line 2", "`instruction` and `output` is missing")]
    text = tokenizer().decode(examples[1].tokens.tolist())
    assert text == "".join(Completion(alpaca_prompt("Add"), "12"))


def test_the_format_can_be_said() -> None:
    both = {**PAIR, "text": "other"}
    assert make(both, format="text")[0] == make({"text": "other"})[0] != make(both)[0]
    with pytest.raises(InputError, match=r"'aplaca' is not known \(nearest: alpaca\); choose chat, sharegpt, compl"):
        make(PAIR, format="aplaca")


def test_nothing_usable_is_an_error_with_the_reasons() -> None:
    with pytest.raises(
        InputError, match=r"nothing to learn from: 0 of 2 .* a.jsonl line 1: .* tokens, the context is 3"
    ):
        make(PAIR, PAIR, context=3)
    with pytest.raises(InputError, match="context is 1"):
        make(PAIR, context=1)
    with pytest.raises(InputError, match="fields of no known format"):
        make({"question": "a"})


def test_a_tokenizer_that_cannot_serve_stops_at_once() -> None:
    rows = number([{"messages": [{"role": "assistant", "content": "a"}]}], name="a")
    with pytest.raises(TokenizerError, match="no chat template"):
        make_examples(rows, tokenizer(), context=9)
    with pytest.raises(TokenizerError, match="no EOS"):
        make_examples(rows, tokenizer(eos=None), context=9)


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(10, 0.2, 2), (10, 0.0, 0), (10, 0.01, 1), (1, 0.5, 0), (2, 0.99, 1), (3, 0.5, 2)]
)
def test_a_fraction_is_held_out(count: int, fraction: float, held: int) -> None:
    examples = [Example(torch.tensor([i, i]), torch.tensor([False, True]), str(i)) for i in range(count)]
    out, rest = divided(examples, fraction, seed=1)
    assert len(out) == held and sorted((*out, *rest), key=lambda each: int(each.place)) == examples
    assert divided(examples, fraction, seed=1) == (out, rest)
    assert count < 10 or held == 0 or divided(examples, fraction, seed=2)[0] != out
