"""Where the prompt ends and the answer begins, in tokens: the mask of what a model is to learn to write.

    prompt + completion + EOS         ids  = encode(prompt + completion), EOS
                                      from = where encode(prompt) and ids part
    conversation                      ids  = the rendered chat template
                                      from = where the template up to the turn, asking for an answer, and ids part
                                      to   = where the template through the turn and ids part

*The true boundary.* A tokenizer joins letters across the end of a prompt: `len(encode(prompt))` may point into the
completion, or past its first letters. What both tokenisations share is the prompt; the token that holds its last and
the completion's first letters is taught, since in generation nobody else would write it. At the end of a turn it is the
other way round: a token that holds the beginning of the next turn is not the assistant's, and not taught.

*The end.* EOS is appended and taught, or the model never learns to stop. Which tokens are taught is a matter of
position alone: nothing is masked for being equal to the padding token, which in many checkpoints is EOS itself.

Source: `common_prefix_length` of trl 1.16 for the boundary; `return_assistant_tokens_mask` of transformers for what a
mask of several turns is (there the template must mark its turns with {% generation %}; here it need not).
"""

from __future__ import annotations

from collections.abc import Sequence

from minillm.data.formats import Completion, Conversation
from minillm.data.tokenizer import Tokenizer
from minillm.errors import InputError, TokenizerError


def encode(sample: Completion | Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """ids, and for each whether it is taught. The first never is: nothing comes before it that could predict it.

    BOS stands in front as the checkpoint has it (`Tokenizer.encode`), or as its chat template writes it; two of them
    are an error. EOS follows a completion unless it ends in one already. A conversation ends as its template says; only
    where its last turn does not end in a special token EOS is added.
    Raises `InputError` for a sample that cannot be taught, the template's complaints about it included;
    `TokenizerError` for a tokenizer without EOS, and for a conversation without a chat template.
    """
    if isinstance(sample, Completion):
        ids, taught = _completion(sample, tokenizer)
    else:
        ids, taught = _conversation(sample, tokenizer)
    if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        raise InputError(f"starts with two BOS tokens ({tokenizer.token(tokenizer.bos_id)!r}); take one out")
    taught[:1] = [False]
    if not any(taught):
        raise InputError("no token is left to be taught")
    return ids, taught


def _completion(sample: Completion, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    ids = _ids(tokenizer, sample.prompt + sample.completion)
    begin = _shared(_ids(tokenizer, sample.prompt), ids)
    if not ids or ids[-1] != tokenizer.eos_id:
        ids.append(end_of_text(tokenizer))
    return ids, [at >= begin for at in range(len(ids))]


def _conversation(sample: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    if tokenizer.chat_template is None:
        raise TokenizerError("these are conversations, but the tokenizer has no chat template: set `chat_template`")
    turns = [i for i, message in enumerate(sample.messages) if i >= sample.first and message["role"] == "assistant"]
    try:
        text = _render(tokenizer, sample, len(sample.messages))
        ids = _ids(tokenizer, text, bos=False)
        spans = [_span(tokenizer, sample, turn, text=text, ids=ids) for turn in turns]
    except TokenizerError as error:  # the template fails on these messages; on others it may not
        raise InputError(str(error)) from error
    taught = [any(begin <= at < end for begin, end in spans) for at in range(len(ids))]
    is_answered = bool(spans) and turns[-1] == len(sample.messages) - 1
    if is_answered and ids[spans[-1][1] - 1] not in tokenizer.special_ids:
        return [*ids, end_of_text(tokenizer)], [*taught, True]
    return ids, taught


def _span(tokenizer: Tokenizer, sample: Conversation, turn: int, *, text: str, ids: list[int]) -> tuple[int, int]:
    """Where in ids the assistant's message number `turn` begins and ends, the token that ends its turn included.

    Raises `InputError` where the template writes the turn, or what comes before it, otherwise in the whole conversation
    than at its own time (Mistral moves the system message, Qwen3 drops thoughts): then no position is the boundary.
    """
    asked, before = (_render(tokenizer, sample, turn, ask=ask) for ask in (True, False))
    through = _render(tokenizer, sample, turn + 1)
    begin, end = _shared(asked, text), _shared(through, text)
    content = sample.messages[turn].get("content")
    if begin < _shared(asked, before) or (isinstance(content, str) and content.strip() not in text[begin:end]):
        raise InputError(
            f"`messages[{turn}]`: the chat template rewrites it, or what precedes it, once more turns follow; "
            "make a record of each answer"
        )
    begin, end = (_shared(_ids(tokenizer, part, bos=False), ids) for part in (asked, through))
    marks = [at for at in range(begin, end) if ids[at] in tokenizer.special_ids]
    if marks and not tokenizer.decode(ids[marks[-1] + 1 : end], skip_special=False).strip():
        end = marks[-1] + 1  # the line end that a template writes behind its mark is nobody's
    return begin, end


def _render(tokenizer: Tokenizer, sample: Conversation, count: int, *, ask: bool = False) -> str:
    return tokenizer.render_chat(sample.messages[:count], add_generation_prompt=ask, tools=sample.tools)


def _ids(tokenizer: Tokenizer, text: str, *, bos: bool | None = None) -> list[int]:
    """Without what the checkpoint puts behind every text: that belongs behind the whole example only."""
    ids = tokenizer.encode(text, bos=bos)
    return ids[: len(ids) - len(tokenizer.encode("", bos=False))]


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of EOS. Raises `TokenizerError` where the tokenizer has none."""
    if tokenizer.eos_id is None:
        raise TokenizerError("the tokenizer names no EOS token, so no end can be taught: name one as `eos_token`")
    return tokenizer.eos_id


def _shared(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items two sequences share at their beginning."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
