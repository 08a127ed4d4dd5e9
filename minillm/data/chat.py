"""Chat templates: messages in, the exact text that the model was trained on out.

A chat model knows one way to write "the user said this, now it is your turn", and the checkpoint carries it as a
Jinja2 template. minillm gives a template what those of the Hugging Face hub expect:

    messages, tools, add_generation_prompt      bos_token, eos_token and the other names of the tokenizer
    raise_exception(text), strftime_now(format), tojson (not HTML-escaped), namespace, loop controls, {% generation %}

    >>> template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    >>> render(template, [{"role": "user", "content": "Hi"}], variables={"eos_token": "</s>"})
    '<|user|>Hi</s>'

This is the only place in minillm that builds a Jinja2 template, and it does so in `minillm.data.sandbox`.

Source: `apply_chat_template` of transformers 5.23. Where we differ: time and size are limited; filters and methods
that can cost without bound are missing (the sandbox lists them); tools are JSON schemas, not Python functions; a
message must be plain data (transformers replaces what is not).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from minillm.data.sandbox import MAX_VALUE, Sandbox, Timeout, keep, limited, refuse_if
from minillm.errors import InputError, TokenizerError

MAX_TEMPLATE = 1 << 18  # characters; the longest published ones have about 2 ** 15
SECONDS = 10.0  # a thousand messages take well under one

# What a template can raise out of Python, beside jinja2's own errors. MemoryError: deep nesting overflows a compiler.
_FAULTS = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RecursionError, SyntaxError, TypeError, ValueError),
)


class TemplateRefusal(TemplateError):
    """The template itself called `raise_exception`: the messages are wrong, not the template."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    seconds: float = SECONDS,
) -> str:
    """The text of a conversation, written as the template says.

    messages: dicts with `role` and usually `content`, plain data (str, numbers, None, lists, dicts) all through
    tools: JSON schemas of the functions that the model may call
    variables: whatever else the template reads: `bos_token`, `enable_thinking`, ...
    Raises `InputError` where the messages are malformed or the template refuses them (`raise_exception`), and
    `TokenizerError` where the template is broken, hostile, or takes longer than `seconds`.

    >>> render("{{ raise_exception('roles must alternate') }}", [{"role": "user", "content": "Hi"}])
    Traceback (most recent call last):
    minillm.errors.InputError: the chat template refuses these messages: roles must alternate
    """
    given = {
        **_plain(dict(variables or {}), "variables"),
        "messages": _plain(_checked(messages), "messages"),
        "tools": None if tools is None else _plain(list(tools), "tools"),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    if len(template) > MAX_TEMPLATE:
        raise TokenizerError(f"the chat template has {len(template)} characters, {MAX_TEMPLATE} are the limit")
    with _explained(seconds), limited(seconds):
        keep(given)
        pieces, size = [], 0
        for piece in _compiled(template).generate(given):
            size += len(piece)
            refuse_if(size > MAX_VALUE, f"a text of more than {MAX_VALUE} characters")
            pieces.append(piece)
    return "".join(pieces)


@contextmanager
def _explained(seconds: float) -> Iterator[None]:
    """Whatever a template can do wrong, as one line."""
    try:
        yield
    except TemplateRefusal as error:
        raise InputError(f"the chat template refuses these messages: {_line(error)}") from error
    except TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template does not parse: line {error.lineno}: {_line(error)}") from error
    except (TemplateError, *_FAULTS) as error:
        kind = type(error).__name__
        raise TokenizerError(f"the chat template fails on these messages: {kind}: {_line(error)}") from error
    except Timeout:
        raise TokenizerError(f"the chat template ran for more than {seconds:g} seconds and was stopped") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    environment = Sandbox()
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(template)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' `tojson` writes it: no HTML escapes, non-ASCII letters as they are.

    >>> tojson({"a": "<é>"})
    '{"a": "<é>"}'
    """
    refuse_if(indent is not None and not 0 <= int(indent) <= 8, "`tojson` with this indent")
    refuse_if(any(len(mark) > 8 for mark in separators or ()), "`tojson` with separators this long")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces, size = [], 0
    for piece in encoder.iterencode(value):  # in pieces: indentation multiplies by the depth
        size += len(piece)
        refuse_if(size > MAX_VALUE, "`tojson` of something this large")
        pieces.append(piece)
    return str(keep("".join(pieces)))


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(pattern: str) -> str:
    refuse_if(len(pattern) > 200 or re.search(r"%\W*\d", pattern) is not None, "a date format this wide")
    return datetime.now().strftime(pattern)


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)):
        raise InputError(
            f"messages: a list of dicts with `role` and `content` is needed, not {type(messages).__name__}"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"messages[{i}]: a dict with a string `role` (user, assistant, system) is needed")
    return list(messages)


def _plain(value: Any, where: str) -> Any:
    """A copy of JSON types only: a template neither changes the caller's data nor reaches methods of rich objects."""
    if value is None or isinstance(value, (bool, str)):
        return value if type(value) in (type(None), bool, str) else str.__str__(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise InputError(f"{where}: {type(value).__name__} is not plain data: give text, numbers, lists or dicts")
