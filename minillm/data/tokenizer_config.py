"""What a checkpoint says about its tokenizer beside the vocabulary itself.

| file | read for |
|---|---|
| tokenizer_config.json | `bos_token` and the other names (a string, or a dict with `content`), `add_bos_token`, `add_eos_token`, `added_tokens_decoder`, `legacy`, `chat_template` |
| special_tokens_map.json | the same names, where tokenizer_config.json lacks them |
| added_tokens.json | token -> id, from before tokenizer_config.json had `added_tokens_decoder` |
| chat_template.jinja | the chat template; wins over the one in tokenizer_config.json |

All are optional. Source: the layout that `save_pretrained` of transformers writes, 4.x and 5.x.
"""  # noqa: E501 (a table)

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from minillm.data.chat import MAX_TEMPLATE
from minillm.errors import TokenizerError

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class TokenizerConfig:
    """The side files of one folder, in one shape."""

    named: dict[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>"
    special: tuple[AddedToken, ...] = ()  # tokens that are special, ids left to the vocabulary
    added: dict[int, AddedToken] = field(default_factory=dict)  # tokens with the id they must have
    add_bos: bool | None = None  # None: the folder does not say
    add_eos: bool | None = None
    legacy: bool = True
    chat_template: str | None = None

    @classmethod
    def read(cls, folder: Path) -> TokenizerConfig:
        """Read the side files; `TokenizerError` names the broken one. An empty folder gives the defaults."""
        path = folder / "tokenizer_config.json"
        config = _json_object(path)
        fallback = _json_object(folder / "special_tokens_map.json")
        tokens = {name: config.get(name) or fallback.get(name) for name in NAMES}
        extra = [token for key in EXTRA for token in _listed(config.get(key) or fallback.get(key) or [], path)]
        special = [_token(value, path) for value in [*tokens.values(), *extra] if value]
        return cls(
            named={name: _token(value, path).content for name, value in tokens.items() if value},
            special=tuple(special),
            added=_added(config, folder),
            add_bos=_flag(config, "add_bos_token", path),
            add_eos=_flag(config, "add_eos_token", path),
            legacy=_flag(config, "legacy", path) is not False,
            chat_template=_chat_template(config, folder),
        )


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON ({error}): mend or remove it") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: a JSON object is needed, found {type(value).__name__}: mend or remove it")
    return value


def _listed(value: Any, path: Path) -> list[Any]:
    if not isinstance(value, dict | list):
        raise TokenizerError(f"{path}: {value!r:.80} is no list of special tokens: mend it")
    return list(value.values()) if isinstance(value, dict) else value


def _token(value: Any, path: Path) -> AddedToken:
    """`"<s>"`, or `{"content": "<s>", "lstrip": false, ...}` as older files spell it."""
    flags = value if isinstance(value, dict) else {"content": value}
    content = flags.get("content")
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{path}: {json.dumps(value)[:80]} is not a token: a string, or a dict with `content`")
    known = {key: bool(flags[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in flags}
    return AddedToken(content, special=bool(flags.get("special", True)), **{"normalized": False, **known})


def _added(config: dict[str, Any], folder: Path) -> dict[int, AddedToken]:
    stated = config.get("added_tokens_decoder") or {}
    path = folder / "tokenizer_config.json"
    try:
        if stated:
            return {int(i): _token({"special": False, **token}, path) for i, token in stated.items()}
        path = folder / "added_tokens.json"
        named = _json_object(path).items()
        return {int(i): AddedToken(token, normalized=False, special=False) for token, i in named}
    except (TypeError, ValueError, AttributeError) as error:
        raise TokenizerError(f"{path}: the added tokens are malformed ({error}): mend or remove it") from error


def _flag(config: dict[str, Any], name: str, path: Path) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{path}: `{name}` is {value!r}: true, false or null is needed")
    return value


def _chat_template(config: dict[str, Any], folder: Path) -> str | None:
    """The template as text; of several named ones, `default`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > 4 * MAX_TEMPLATE:  # bytes; a character has at most four
            raise TokenizerError(f"{path}: larger than any chat template should be ({MAX_TEMPLATE} characters)")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}: not UTF-8 ({error}): mend or remove it") from error
    path = folder / "tokenizer_config.json"
    template = config.get("chat_template")
    if isinstance(template, list):
        try:
            named = {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError) as error:
            raise TokenizerError(f"{path}: `chat_template` entries need `name` and `template`") from error
        if "default" not in named:
            raise TokenizerError(f"{path}: no chat template named 'default' among {sorted(named)}: name one so")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{path}: `chat_template` is {type(template).__name__}: a string is needed")
    return template
