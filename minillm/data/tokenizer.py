"""Text to ids and back, exactly as the checkpoint was trained.

Three vocabularies are in use, and all three become one `tokenizers` pipeline:

| file in the folder | family | how |
|---|---|---|
| tokenizer.json | every current checkpoint | the library's own format, used as it is |
| tokenizer.model, a protobuf | Llama 1 and 2, Mistral | `minillm.data.sentencepiece_model` |
| tokenizer.model, lines of base64 | Llama 3 as Meta ships it | `minillm.data.tiktoken_model` |

Exactly one BOS. A model trained with a beginning-of-sequence token in front is quietly worse without it and with two of
it. So one rule holds everywhere: `encode` puts in front what the checkpoint says, unless the text starts with it
already; `chat` adds nothing, since a template writes its own, and refuses a template that writes two.

What the checkpoint says: `add_bos_token` of tokenizer_config.json; without it the post-processor of tokenizer.json;
without that (a bare tokenizer.model) the model's own BOS, as the reference code of Llama 1 to 3 does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Pipeline

from minillm.atomic import write_atomically
from minillm.data import chat, sentencepiece_model, tiktoken_model
from minillm.data.tokenizer_config import TokenizerConfig
from minillm.errors import InputError, TokenizerError

#: Files that another tokenizer may have left beside tokenizer.json, and that `load` would read with it.
_OTHER_FILES = ("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.json")


class Tokenizer:
    """One vocabulary with its special tokens and chat template. Build it with `load` or `from_tokenizers`.

    bos_id, eos_id, pad_id    the ids, or None where the checkpoint names none
    special_ids               every id that `decode(skip_special=True)` leaves out
    byte_ids                  ids of single bytes (`<0xE2>`) that only a run of them turns into a character
    chat_template             Jinja2 source, or None
    """

    def __init__(self, pipeline: Pipeline, *, named: Mapping[str, str], chat_template: str | None = None) -> None:
        pipeline.no_padding()
        pipeline.no_truncation()
        self._pipeline = pipeline
        self._named = dict(named)
        self.chat_template = chat_template
        self.bos_id, self.eos_id, self.pad_id = (
            pipeline.token_to_id(self._named[name]) if name in self._named else None
            for name in ("bos_token", "eos_token", "pad_token")
        )
        added = pipeline.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.byte_ids = _byte_ids(pipeline)
        self._prefix, self._suffix = _surroundings(pipeline)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder.

        Where we differ from transformers 5.23, which ignores `add_bos_token` beside a tokenizer.json and rebuilds a
        `LlamaTokenizer` with rules of its own (a leading space is lost, and no dummy space follows a special token):
        the files decide here. A sentencepiece `tokenizer.model` alone gives sentencepiece's ids, and its BOS;
        `"legacy": false` in tokenizer_config.json asks for transformers' rules about spaces.
        Raises `TokenizerError` where there is no tokenizer, or a broken one.
        """
        folder = Path(folder)
        config = TokenizerConfig.read(folder)
        pipeline, named = _read_vocabulary(folder, config)
        named = {**named, **config.named}
        _add_tokens(pipeline, config, folder)
        if config.add_bos is not None or config.add_eos is not None:
            _state_surroundings(pipeline, named, config, folder)
        return cls(pipeline, named=named, chat_template=config.chat_template)

    @classmethod
    def from_tokenizers(
        cls,
        pipeline: Pipeline,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
    ) -> Tokenizer:
        """Wrap a pipeline that was trained in a script; it is copied. With `bos`, `encode` starts with that token.

        Raises `TokenizerError` where a named token is not in the vocabulary.
        """
        pipeline = Pipeline.from_str(pipeline.to_str())
        named = {f"{name}_token": token for name, token in (("bos", bos), ("eos", eos), ("pad", pad)) if token}
        for name, token in named.items():
            if pipeline.token_to_id(token) is None:
                raise TokenizerError(f"{name} {token!r} is not in the vocabulary: train with it as a special token")
        pipeline.add_special_tokens([AddedToken(token, normalized=False) for token in named.values()])
        if bos:
            _set_surroundings(pipeline, prefix=[bos], suffix=[])
        return cls(pipeline, named=named, chat_template=chat_template)

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Ids of `text`. Special tokens written in the text (`</s>`) become their ids.

        bos: None does what the checkpoint says; True and False override it. A BOS that the text already starts with is
        never doubled (transformers doubles it).
        Raises `InputError` for what is not text, and for bos=True without a BOS token.
        """
        ids = self._ids(text)
        prefix = self._prefix
        if bos is not None:
            if bos and self.bos_id is None:
                raise InputError("bos=True, but this tokenizer defines no BOS token: leave bos out")
            prefix = [self.bos_id] if bos and self.bos_id is not None else []
        starts = bool(ids) and ids[0] == self.bos_id
        return ([] if starts and prefix == [self.bos_id] else prefix) + ids + self._suffix

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Ids beyond the vocabulary (a model's padded rows) are no text, as in transformers.

        Never "cleaned up": transformers' `clean_up_tokenization_spaces` is not done for BPE there either.
        """
        ids = [int(i) for i in ids]
        if ids and (min(ids) < 0 or max(ids) >= 1 << 32):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InputError(f"token id {wrong} is out of range: ids are 0 to {len(self) - 1}")
        return str(self._pipeline.decode(ids, skip_special_tokens=skip_special))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of a conversation: the rendered template, tokenised with nothing added.

        variables: whatever the template reads besides (`enable_thinking=False`). Raises as `render_chat` does, and
        `TokenizerError` where the text starts with two BOS.
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables)
        ids = self._ids(text)
        if self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            raise TokenizerError(
                f"the chat template starts with two BOS tokens ({self.token(self.bos_id)!r}): take one out of it"
            )
        return ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text that `chat` tokenises. Raises as `minillm.data.chat.render`; `TokenizerError` without a template."""
        if self.chat_template is None:
            raise TokenizerError(
                "this tokenizer has no chat template: use plain `generate`, or set `tokenizer.chat_template`"
            )
        return chat.render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables={**self._named, **variables},
        )

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id, e.g. `Ġthe` or `<0xE2>`."""
        token = self._pipeline.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            raise InputError(f"token id {token_id} is not in the vocabulary of {len(self)} tokens")
        return str(token)

    def __len__(self) -> int:
        return int(self._pipeline.get_vocab_size(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included (transformers' `vocab_size` leaves those out)."""
        return len(self)

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as `AutoTokenizer` reads them.

        The class is stated as `PreTrainedTokenizerFast`, which uses the pipeline as written. Each file appears whole or
        not at all; what another tokenizer left in the folder goes, since it would be read beside this one.
        Raises `TokenizerError` where the folder cannot be made, `CheckpointError` where a file cannot be written.
        """
        folder = Path(folder)
        try:
            self._write(folder)
        except OSError as error:
            raise TokenizerError(
                f"{folder}: cannot be written ({error.strerror}): free space or choose another"
            ) from error

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._named,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        write_atomically(folder / "tokenizer.json", self._pipeline.to_str(pretty=True))
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if self.chat_template is not None:
            write_atomically(folder / "chat_template.jinja", self.chat_template)
        for name in _OTHER_FILES + (("chat_template.jinja",) if self.chat_template is None else ()):
            (folder / name).unlink(missing_ok=True)

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self._pipeline.encode(text, add_special_tokens=False).ids)
        except TypeError as error:  # not a str, or one with lone surrogates, which no UTF-8 can hold
            shown = f"{type(text).__name__} {text!r:.60}"
            raise InputError(f"{shown} is not encodable text: give a str of Unicode") from error


def _read_vocabulary(folder: Path, config: TokenizerConfig) -> tuple[Pipeline, dict[str, str]]:
    """The pipeline of the folder, and the special tokens that the vocabulary file itself names."""
    path, model = folder / "tokenizer.json", folder / "tokenizer.model"
    if path.is_file():
        try:
            return Pipeline.from_file(str(path)), {}
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: not a tokenizer ({error}): download it again") from error
    if not model.is_file():
        raise TokenizerError(f"{folder}: no tokenizer: neither tokenizer.json nor tokenizer.model is there: add one")
    with model.open("rb") as file:
        head = file.read(512)
    if tiktoken_model.is_ranks(head):
        names = {i: token.content for i, token in config.added.items()}
        pipeline = tiktoken_model.to_tokenizers(tiktoken_model.read(model), names=names)
        named = tiktoken_model.NAMED
    else:
        pieces = sentencepiece_model.read(model)
        pipeline = sentencepiece_model.to_tokenizers(pieces, legacy=config.legacy)
        named = pieces.named()
    named = {**named, **config.named}
    if "bos_token" in named:
        _set_surroundings(pipeline, prefix=[named["bos_token"]], suffix=[])
    return pipeline, named


def _add_tokens(pipeline: Pipeline, config: TokenizerConfig, folder: Path) -> None:
    """Add what the side files name and the vocabulary lacks; mark the named ones as special."""
    present = pipeline.get_added_tokens_decoder()
    for i, token in sorted(config.added.items()):
        if repr(present.get(i)) != repr(token):
            pipeline.add_tokens([token])
        if pipeline.token_to_id(token.content) != i:
            raise TokenizerError(
                f"{folder}: the added token {token.content!r} should have id {i}, the vocabulary gives it"
                f" {pipeline.token_to_id(token.content)}: mend added_tokens_decoder or added_tokens.json"
            )
    contents = {token.content for token in pipeline.get_added_tokens_decoder().values() if token.special}
    pipeline.add_special_tokens([token for token in config.special if token.content not in contents])


def _state_surroundings(pipeline: Pipeline, named: Mapping[str, str], config: TokenizerConfig, folder: Path) -> None:
    """Make the post-processor add what `add_bos_token` and `add_eos_token` say, where it does not already."""
    before = _surroundings(pipeline)
    tokens = [[str(pipeline.id_to_token(i)) for i in ids] for ids in before]
    for place, (name, stated) in enumerate((("bos_token", config.add_bos), ("eos_token", config.add_eos))):
        if stated and name not in named:
            raise TokenizerError(
                f"{folder}: add_{name} is true, but no {name} is named: name it in tokenizer_config.json"
            )
        if stated is not None:
            tokens[place] = [named[name]] if stated else []
    if [[pipeline.token_to_id(token) for token in side] for side in tokens] != list(before):
        _set_surroundings(pipeline, prefix=tokens[0], suffix=tokens[1])


def _set_surroundings(pipeline: Pipeline, *, prefix: list[str], suffix: list[str]) -> None:
    """Let the post-processor write `prefix text suffix`. Others (byte-level offsets) change no id and give way."""
    single = [*prefix, "$A", *suffix]
    pair = [*single, *(f"{part}:1" for part in [*prefix, "$B", *suffix])]
    names = dict.fromkeys([*prefix, *suffix])
    pipeline.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, pipeline.token_to_id(name)) for name in names]
    )


def _surroundings(pipeline: Pipeline) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text, seen on one text."""
    bare = pipeline.encode("a", add_special_tokens=False).ids
    whole = pipeline.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _byte_ids(pipeline: Pipeline) -> frozenset[int]:
    if pipeline.decoder is None or b'"ByteFallback"' not in pipeline.decoder.__getstate__():  # its JSON
        return frozenset()
    ids = (pipeline.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in ids if i is not None)
