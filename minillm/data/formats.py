"""What a record means: a prompt with its completion, or a conversation. Five formats are known by their fields.

| format | fields | becomes |
|---|---|---|
| chat | messages: a list of `{role, content}`; tools if any | `Conversation`, every assistant turn is taught |
| sharegpt | conversations: a list of `{from, value}`, from one of `SPEAKERS`, or of chat's messages | the same |
| completion | prompt, completion: text, or both of them messages | `Completion`, or `Conversation` |
| alpaca | instruction, output; input if any | `Completion` of Stanford Alpaca's prompt |
| text | text | `Completion` of an empty prompt: all of it is taught |

A file has one format: the first of the table for which it holds at least one whole record. So data sets that carry the
same thing twice (Alpaca's rows have a `text` as well) are read in the finer way, and a record that lacks its `output`
does not turn into one whose prompt is taught.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minillm.data.records import Record
from minillm.errors import InputError

#: Format -> the fields without which a record is none.
FORMATS = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}

#: ShareGPT's name of who speaks -> the role that templates know.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}

# github.com/tatsu-lab/stanford_alpaca, PROMPT_DICT of train.py
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class Completion(NamedTuple):
    """Text to go on from, and how it goes on."""

    prompt: str
    completion: str


class Conversation(NamedTuple):
    """Messages, of which the assistant's are taught, those before number `first` excepted."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    first: int = 0


def recognise(records: Sequence[Record]) -> str:
    """The format of the records of one file, a key of `FORMATS`.

    Raises `InputError` where no record has all fields of any format; it names those that the first one has.
    """
    for name, needed in FORMATS.items():
        if any(all(record.fields.get(key) is not None for key in needed) for record in records):
            return name
    needs = "; ".join(" and ".join(needed) for needed in FORMATS.values())
    found = ", ".join(map(str, records[0].fields)) or "none"
    raise InputError(f"{records[0].place}: fields of no known format ({found:.200}); needed are {needs}")


def parse(record: Record, name: str) -> Completion | Conversation:
    """One record read as format `name`. Raises `InputError`, without the place, where it cannot be taught."""
    fields = record.fields
    missing = [key for key in FORMATS[name] if fields.get(key) is None]
    if missing:
        raise InputError(f"`{'` and `'.join(missing)}` is missing")
    if name == "chat":
        return _conversation(fields, _messages(fields["messages"], "messages"), first=0)
    if name == "sharegpt":
        return _conversation(fields, _messages(_said(fields["conversations"]), "conversations"), first=0)
    if name == "completion" and not isinstance(fields["completion"], str):
        asked, answered = (_messages(fields[key], key) for key in FORMATS[name])
        return _conversation(fields, [*asked, *answered], first=len(asked))
    if name == "completion":
        return _completion(_text(fields, "prompt"), fields, "completion")
    if name == "alpaca":
        return _completion(alpaca_prompt(_text(fields, "instruction"), _text(fields, "input")), fields, "output")
    return _completion("", fields, "text")


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Stanford Alpaca's prompt, with its other wording where there is an input; the answer follows at once.

    Where we differ: a line end follows `### Response:`, as in the `text` of the published data set and in what
    alpaca-lora and Unsloth train with; Stanford's train.py has none. Raises `InputError` for a blank instruction.

    >>> alpaca_prompt("Name a colour.").splitlines()[-2:]
    ['', '### Response:']
    """
    if not instruction.strip():
        raise InputError("`instruction` is empty")
    template = _ALPACA_WITH_INPUT if context.strip() else _ALPACA
    return template.format(instruction=instruction, input=context)


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"`{key}` is {type(value).__name__}, not text")
    return value or ""


def _completion(prompt: str, fields: Mapping[str, Any], key: str) -> Completion:
    completion = _text(fields, key)
    if not completion.strip():
        raise InputError(f"`{key}` is empty")
    return Completion(prompt, completion)


def _conversation(fields: Mapping[str, Any], messages: list[Mapping[str, Any]], *, first: int) -> Conversation:
    tools = fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"`tools` is {type(tools).__name__}, not a list of JSON schemas")
    if not any(message["role"] == "assistant" for message in messages[first:]):
        raise InputError("no turn of the assistant to learn from")
    return Conversation(messages, tools or None, first)


def _said(value: Any) -> Any:
    """ShareGPT's `{from, value}` as `{role, content}`. What is neither is left as it is, for `_messages` to refuse."""
    if not isinstance(value, list | tuple):
        return value
    messages: list[Any] = []
    for i, turn in enumerate(value):
        if isinstance(turn, Mapping) and "from" in turn and "role" not in turn:
            role = SPEAKERS.get(str(turn["from"]))
            if role is None:
                raise InputError(f"`conversations[{i}]` is from {turn['from']!r:.40}; known are {', '.join(SPEAKERS)}")
            if not isinstance(turn.get("value"), str):
                raise InputError(f"`conversations[{i}]` has no `value`")
            messages.append({"role": role, "content": turn["value"]})
        else:
            messages.append(turn)
    return messages


def _messages(value: Any, key: str) -> list[Mapping[str, Any]]:
    """Checked here, since a template would write a missing content as "None" and be none the wiser."""
    if not isinstance(value, list | tuple):
        raise InputError(f"`{key}` is {type(value).__name__}, not a list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"`{key}[{i}]` is no message with a `role`")
        content = message.get("content")
        if not content and message.get("tool_calls"):
            continue
        if not isinstance(content, str | list):
            raise InputError(f"`{key}[{i}]` has no `content`")
        if message["role"] == "assistant" and not (content.strip() if isinstance(content, str) else content):
            raise InputError(f"`{key}[{i}]`: the assistant says nothing")
    return list(value)
