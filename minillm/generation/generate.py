"""Tokens out of a model: prefill, decode, and the loop around them.

    prefill       all prompts at once (B, S) -> logits of the last position (B, V); keys and values fill the cache
    decode_step   one token a row     (B,)   -> logits of the next position (B, V)

    prompts ─left pad─▶ prefill ─▶ logits ─process, choose─▶ tokens ─▶ decode_step ─▶ logits ─▶ ...

Prompts of unequal length are padded on the left, so that all rows end at the same slot; positions count real tokens
only, hence each row gets what it would get alone. A row that has finished leaves the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minillm.data.detokenize import StreamDecoder
from minillm.data.tokenizer import Tokenizer
from minillm.errors import InputError
from minillm.generation.sampling import Sampling, choose, process, row_generators, token_logprobs, uniforms
from minillm.generation.stop import StopStrings
from minillm.model import Decoder, KVCache

Prompt = str | Sequence[int]

#: Answer length where neither the caller nor the checkpoint says one.
NEW_TOKENS = 256


@dataclass
class Completion:
    """One finished answer.

    tokens include the end-of-text token that ended it; text does not, nor a stop string. logprobs: natural logarithm of
    each token's probability under the model at temperature 1, before any filter.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["eos", "stop", "length"] = "length"


class Step(NamedTuple):
    """What one step gives the rows that are still written: their numbers, a token and its log-probability each."""

    rows: list[int]
    tokens: list[int]
    logprobs: list[float]


@torch.inference_mode()
def prefill(model: Decoder, tokens: Tensor, keep: Tensor | None, cache: KVCache) -> Tensor:
    """Prompts (B, S), left-padded where keep (B, S) is False -> next-token logits (B, V); the cache then holds them."""
    return model.head(model.hidden(tokens, keep=keep, cache=cache)[:, -1])


@torch.inference_mode()
def decode_step(model: Decoder, tokens: Tensor, cache: KVCache) -> Tensor:
    """The token just chosen in each row (B,) -> next-token logits (B, V)."""
    return model.head(model.hidden(tokens[:, None], cache=cache)[:, -1])


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids of unequal length -> tokens (B, S) int64 and keep (B, S) bool, True on real tokens.

    >>> left_pad([[5, 6], [7]])[0].tolist()
    [[5, 6], [0, 7]]
    """
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    pads = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)
    return tokens, torch.arange(longest, device=device) >= pads


def token_steps(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    steps: int,
    *,
    cache: KVCache | None = None,
    live: list[bool] | None = None,
) -> Iterator[Step]:
    """Up to `steps` tokens for every row, as they are chosen; stop iterating to stop computing.

    cache: one that already holds the beginning of a single prompt, which is then not computed again. live: one flag a
    row, read after each step; a row whose flag the caller has cleared leaves the batch and is computed no further.
    """
    if model.config.head != "lm":
        raise InputError("the model has a scalar head: it scores text and writes none; load a language model")
    tokens, keep = left_pad(prompts, model.embed.weight.device)
    if cache is None:
        cache = model.new_cache(len(prompts), tokens.shape[1] + steps)
    generators = row_generators(sampling.seed, len(prompts)) if sampling.do_sample else None
    logits = prefill(model, tokens[:, cache.length :], None if bool(keep.all()) else keep, cache)
    rows = list(range(len(prompts)))
    for step in range(steps):
        chosen, logprobs = _pick(logits, (tokens, keep), sampling, generators, step)
        yield Step(rows, chosen.tolist(), logprobs.tolist())
        if step + 1 == steps or not any(live or [True]):
            return
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        keep = torch.cat((keep, torch.ones_like(chosen, dtype=torch.bool)[:, None]), dim=1)
        if live is not None and not all(live[row] for row in rows):
            stay = [place for place, row in enumerate(rows) if live[row]]
            rows, generators = [rows[place] for place in stay], generators and [generators[place] for place in stay]
            tokens, keep = tokens[stay], keep[stay]
            cache.select(stay)
        logits = decode_step(model, tokens[:, -1], cache)


@torch.inference_mode()
def _pick(
    logits: Tensor,
    history: tuple[Tensor, Tensor],
    sampling: Sampling,
    generators: Sequence[torch.Generator] | None,
    step: int,
) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    processed = process(logits, *history, sampling=sampling, step=step)
    chosen = choose(processed, None if generators is None else uniforms(generators), step=step)
    return chosen, token_logprobs(logits, chosen)


class _Row:
    """One answer while it is written: text that may be shown so far, and why it ended."""

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: Tokenizer | None,
        sampling: Sampling,
        limit: int,
        completion: Completion | None = None,
    ) -> None:
        self.completion = Completion() if completion is None else completion
        self.done = False
        self._limit, self._eos = limit, frozenset(sampling.eos_ids)
        self._stop_ids = _special_ids(tokenizer, sampling.stop)
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer, prompt=prompt)
        self._stop = StopStrings(sampling.stop)

    def push(self, token: int, logprob: float) -> str:
        """Add a token; returns the text that is now certain."""
        answer = self.completion
        answer.tokens.append(token)
        answer.logprobs.append(logprob)
        ended, stopped = token in self._eos, token in self._stop_ids
        piece = "" if ended or stopped or self._decoder is None else self._decoder.push(token)
        last = ended or stopped or len(answer.tokens) >= self._limit
        if last and self._decoder is not None:
            piece += self._decoder.finish()
        text = self._stop.push(piece)
        if last and not self._stop.found:
            text += self._stop.finish()
        if last or self._stop.found:
            self.done = True
            answer.finish_reason = "stop" if stopped or self._stop.found else "eos" if ended else "length"
        answer.text += text
        return text


def _special_ids(tokenizer: Tokenizer | None, stop: Sequence[str]) -> set[int]:
    """Ids of stop strings that are a special token: it prints nothing, so the text never shows it."""
    if tokenizer is None or not stop:
        return set()
    return {token for token in tokenizer.special_ids if tokenizer.token(token) in stop}


def generate(
    model: Decoder,
    tokenizer: Tokenizer | None,
    prompts: Prompt | Sequence[Prompt] | Tensor,
    *,
    num_return_sequences: int = 1,
    **options: Any,
) -> list[Completion]:
    """Answers to one prompt or several, `num_return_sequences` each, in order.

    prompts: text, or token ids (as `tokenizer.chat` gives them, or an int64 tensor; tokenizer may then be None and the
    text stays empty).
    options: the fields of `Sampling`; what is not given comes from the checkpoint's generation_config.json. Row r draws
    from a random stream of its own, seeded with seed + r, so that its text does not depend on the rows beside it (but
    for dynamic and longrope scaling, whose frequencies follow the longest row: `minillm.model.rope`).

    An answer ends at an end-of-text token, a stop string, `max_new_tokens`, `max_length` (prompt included), or the
    model's longest context; a checkpoint without an end-of-text token goes on to one of the others. Raises InputError
    for a prompt that is empty (and no BOS to stand for it) or does not fit the context, NumericsError for NaN logits.
    """
    sampling = sampling_for(model, options)
    if not isinstance(num_return_sequences, int) or num_return_sequences < 1:
        raise InputError(f"num_return_sequences is {num_return_sequences!r}; give a whole number of at least 1")
    listed = _each(prompts)
    ids = [_prompt_ids(model, tokenizer, prompt) for prompt in listed for _ in range(num_return_sequences)]
    limits = [answer_limit(len(prompt), sampling, model.config.longest) for prompt in ids]
    rows = [_Row(prompt, tokenizer, sampling, limit) for prompt, limit in zip(ids, limits, strict=True)]
    live = [True] * len(rows)
    for step in token_steps(model, ids, sampling, max(limits), live=live):
        for number, token, logprob in zip(*step, strict=True):
            rows[number].push(token, logprob)
            live[number] = not rows[number].done
    return [row.completion for row in rows]


def _each(prompts: Prompt | Sequence[Prompt] | Tensor) -> list[Prompt]:
    """One prompt or several, as a list: whole numbers in a row are one prompt of token ids."""
    if isinstance(prompts, str):
        return [prompts]
    several: list[Any] = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    return [several] if not several or isinstance(several[0], int) else several


def stream(
    model: Decoder, tokenizer: Tokenizer, prompt: Prompt, *, answer: Completion | None = None, **options: Any
) -> Iterator[str]:
    """The answer to one prompt, piece by piece as it is written; never half a character, never part of a stop string.

    Options as in `generate`; the pieces together are its text. `answer`, if given, is filled on the way: tokens,
    log-probabilities, why it ended.
    """
    sampling = sampling_for(model, options)
    return answer_stream(model, tokenizer, _prompt_ids(model, tokenizer, prompt), sampling, answer=answer)


def answer_stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    answer: Completion | None = None,
    cache: KVCache | None = None,
) -> Iterator[str]:
    """`stream` on token ids; fills `answer`, a fresh Completion, and computes only what `cache` does not hold yet."""
    limit = answer_limit(len(prompt), sampling, model.config.longest)
    row = _Row(prompt, tokenizer, sampling, limit, answer)
    if cache is not None:
        cache.grow(len(prompt) + limit)
    return _pieces(row, token_steps(model, [prompt], sampling, limit, cache=cache))


def _pieces(row: _Row, steps: Iterator[Step]) -> Iterator[str]:
    for step in steps:
        piece = row.push(step.tokens[0], step.logprobs[0])
        if piece:
            yield piece
        if row.done:
            return


def sampling_for(model: Decoder, options: Mapping[str, Any]) -> Sampling:
    """What the checkpoint's generation_config.json says, with the caller's options on top."""
    return Sampling.from_hf(model.generation_defaults, **options)


def _prompt_ids(model: Decoder, tokenizer: Tokenizer | None, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("the prompt is text and there is no tokenizer; pass token ids or a tokenizer")
        ids = tokenizer.encode(prompt)
    else:
        ids = list(prompt)
    if not ids:
        bos = model.generation_defaults.get("bos_token_id")
        if not isinstance(bos, int):
            raise InputError("the prompt is empty and the model has no BOS token to start from; give a prompt")
        ids = [bos]
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < model.config.vocab_size:
            raise InputError(
                f"token {token!r} is outside the model's vocabulary of {model.config.vocab_size}; "
                "the tokenizer belongs to another model"
            )
    return ids


def answer_limit(prompt_tokens: int, sampling: Sampling, longest: int) -> int:
    """Tokens an answer may have: the least of max_new_tokens, what max_length leaves, and what the context leaves."""
    if prompt_tokens >= longest:
        raise InputError(f"the prompt has {prompt_tokens} tokens and the context {longest}; shorten the prompt")
    limits = [longest - prompt_tokens]
    if sampling.max_length is not None:
        if prompt_tokens >= sampling.max_length:
            raise InputError(
                f"the prompt has {prompt_tokens} tokens and max_length, which counts it, is {sampling.max_length}; "
                "raise max_length or give max_new_tokens instead"
            )
        limits.append(sampling.max_length - prompt_tokens)
    if sampling.max_new_tokens is not None:
        limits.append(sampling.max_new_tokens)
    elif sampling.max_length is None:
        limits.append(NEW_TOKENS)
    return min(limits)
