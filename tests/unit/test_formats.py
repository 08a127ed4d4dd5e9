"""What a record means: the format of a file, Alpaca's prompts, and why a record cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from minillm.data.formats import Completion, Conversation, alpaca_prompt, parse, recognise
from minillm.data.records import Record
from minillm.errors import InputError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def say(who: Any, what: Any) -> dict[str, Any]:
    return {"from": who, "value": what}


def record(**fields: Any) -> Record:
    return Record(fields, "a.jsonl", 7)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"messages": [], "prompt": "p"}], "chat"),
        ([{"prompt": "p", "completion": "c"}], "completion"),
        ([{"instruction": "i", "output": "o", "input": "", "text": "t"}], "alpaca"),  # as Stanford published it
        ([{"instruction": "i", "output": "o", "input": "", "prompt": "p"}], "alpaca"),  # as code Alpaca sets are
        ([{"text": "t", "prompt": "p"}], "text"),
        ([{"id": "1", "conversations": []}], "sharegpt"),
        ([{"messages": [], "conversations": []}], "chat"),
        (
            [{"instruction": "i", "output": None, "text": "t"}, {"instruction": "i", "output": "o", "text": "t"}],
            "alpaca",
        ),
        ([{"messages": None, "text": "t"}], "text"),
    ],
)
def test_a_file_has_the_finest_format_it_fills(rows: list[dict[str, Any]], expected: str) -> None:
    assert recognise([record(**row) for row in rows]) == expected


def test_an_unknown_format_names_the_fields_there_are() -> None:
    with pytest.raises(
        InputError, match=r"a.jsonl line 7: .*\(prompt, chosen\).*prompt and completion; instruction and"
    ):
        recognise([record(prompt="p", chosen="c")])


def test_alpaca_prompts_are_stanfords() -> None:
    assert alpaca_prompt("Add.", "1 + {x}") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 + {x}\n\n"
        "### Response:\n"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {input}.\n\n### Response:\n"
    )
    assert alpaca_prompt("Say {input}.", "") == alpaca_prompt("Say {input}.", " \n") == without


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("text", {"text": " a "}, Completion("", " a ")),
        ("completion", {"prompt": "p", "completion": " c"}, Completion("p", " c")),
        ("completion", {"prompt": "", "completion": "c"}, Completion("", "c")),
        ("alpaca", {"instruction": "i", "output": "o"}, Completion(alpaca_prompt("i"), "o")),
        ("alpaca", {"instruction": "i", "input": None, "output": "o"}, Completion(alpaca_prompt("i"), "o")),
        ("alpaca", {"instruction": "i", "input": "x", "output": "o"}, Completion(alpaca_prompt("i", "x"), "o")),
        ("chat", {"messages": [USER, ASSISTANT]}, Conversation([USER, ASSISTANT])),
        ("chat", {"messages": [ASSISTANT], "tools": [{"name": "f"}]}, Conversation([ASSISTANT], [{"name": "f"}])),
        (
            "completion",
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
            Conversation([USER, ASSISTANT, USER, ASSISTANT], None, 3),
        ),
        (
            "sharegpt",
            {"conversations": [say("system", "s"), say("human", "Hi"), say("gpt", "Hello"), say("tool", "3")]},
            Conversation([{"role": "system", "content": "s"}, USER, ASSISTANT, {"role": "tool", "content": "3"}]),
        ),
        ("sharegpt", {"conversations": [USER, say("assistant", "Hello")]}, Conversation([USER, ASSISTANT])),
        (
            "chat",
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            Conversation([USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]),
        ),
    ],
)
def test_records_become_samples(name: str, fields: dict[str, Any], expected: Completion | Conversation) -> None:
    assert parse(record(**fields), name) == expected


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("text", {"text": " \n"}, "`text` is empty"),
        ("text", {"other": 1}, "`text` is missing"),
        ("text", {"text": float("nan")}, "`text` is float, not text"),
        ("completion", {"prompt": "p", "completion": ""}, "`completion` is empty"),
        ("completion", {"prompt": ["p"], "completion": "c"}, "`prompt` is list, not text"),
        ("completion", {"prompt": "p", "completion": [ASSISTANT]}, "`prompt` is str, not a list of messages"),
        ("completion", {"prompt": [ASSISTANT], "completion": [USER]}, "no turn of the assistant"),
        ("completion", {}, "`prompt` and `completion` is missing"),
        ("alpaca", {"instruction": " ", "output": "o"}, "`instruction` is empty"),
        ("alpaca", {"instruction": "i", "output": " "}, "`output` is empty"),
        ("alpaca", {"instruction": "i", "text": "t"}, "`output` is missing"),
        ("alpaca", {"instruction": "i", "input": 3, "output": "o"}, "`input` is int, not text"),
        ("chat", {"messages": "Hi"}, "`messages` is str, not a list of messages"),
        ("chat", {"messages": []}, "no turn of the assistant"),
        ("chat", {"messages": [USER]}, "no turn of the assistant"),
        ("chat", {"messages": [USER, {"from": "gpt"}]}, r"`messages\[1\]` is no message with a `role`"),
        ("chat", {"messages": [{"role": "user"}, ASSISTANT]}, r"`messages\[0\]` has no `content`"),
        ("chat", {"messages": [USER, {**ASSISTANT, "content": " "}]}, r"`messages\[1\]`: the assistant says nothing"),
        ("chat", {"messages": [USER, {**ASSISTANT, "content": []}]}, r"`messages\[1\]`: the assistant says nothing"),
        ("chat", {"messages": [USER, ASSISTANT], "tools": "f"}, "`tools` is str"),
        ("sharegpt", {"conversations": "Hi"}, "`conversations` is str, not a list of messages"),
        ("sharegpt", {"conversations": ["Hi"]}, r"`conversations\[0\]` is no message with a `role`"),
        ("sharegpt", {"conversations": [say("human", "Hi")]}, "no turn of the assistant"),
        ("sharegpt", {"conversations": [say("gpt", " ")]}, r"`conversations\[0\]`: the assistant says nothing"),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, r"`conversations\[0\]` has no `value`"),
        ("sharegpt", {"conversations": [say("human", None)]}, r"`conversations\[0\]` has no `value`"),
        (
            "sharegpt",
            {"conversations": [say("bing", "Hi")]},
            r"`conversations\[0\]` is from 'bing'; known are system, hu",
        ),
        ("sharegpt", {"conversations": [say(["gpt"], "Hi")]}, r"`conversations\[0\]` is from \['gpt'\]; known are"),
        ("sharegpt", {"text": "t"}, "`conversations` is missing"),
    ],
)
def test_what_cannot_be_taught_says_why(name: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        parse(record(**fields), name)
