"""From logits to the next token: what a request asks for (`Sampling`), and the draw.

    logits (B, V) --process--> filtered logits (B, V) --choose--> tokens (B,)
                     Sampling                            one uniform a row

The draw inverts the cumulative distribution, so that a row spends exactly one uniform number a step and a token depends
on nothing but (seed, step, the row's own probabilities), never on the rows beside it:

    token = the first v with  p_1 + ... + p_v > u * (p_1 + ... + p_V)          u in [0, 1)

transformers draws all rows from one global generator (`torch.multinomial`): its sample of a prompt changes with the
batch it sits in. Ours does not, so sampled tokens are not comparable across the two libraries; greedy ones are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from minillm.errors import ConfigError, InputError, NumericsError, nearest
from minillm.generation import filters

# torch's CPU generator reads the low 32 bits of a seed: 0 and 2**32 would be one stream.
_SEEDS = 2**32

# What sampling alone reads, with the value that leaves the distribution as it is.
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request turns logits into tokens and when it stops. Greedy unless told otherwise; names are those of
    transformers' `GenerationConfig`, except `eos_ids` (`eos_token_id`) and `stop` (`stop_strings`).

    Nothing given is ignored but a seed, which greedy decoding has no use for: with `do_sample=False` a temperature,
    top_k, top_p, min_p or typical_p is an `InputError`, as is any value out of range. With both `max_new_tokens` and
    `max_length` the first to be reached ends the text.

    >>> Sampling(do_sample=True, top_k=10).top_k
    10
    >>> Sampling(max_new_tokens=0)
    Traceback (most recent call last):
    minillm.errors.InputError: max_new_tokens is 0; give a whole number of at least 1
    """

    max_new_tokens: int | None = None
    max_length: int | None = None  # prompt and answer together
    min_new_tokens: int = 0  # until then no EOS
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # 0: off
    eos_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None  # None: follow torch.manual_seed

    def __post_init__(self) -> None:
        for field in fields(self):
            problem = _problem(field.name, getattr(self, field.name))
            if problem:
                raise InputError(problem)
        if not self.do_sample:
            for name, neutral in _NEUTRAL.items():
                if getattr(self, name) != neutral:
                    raise InputError(
                        f"{name}={getattr(self, name)} has no effect on greedy decoding; "
                        "pass do_sample=True or leave it out"
                    )
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens {self.max_new_tokens}; raise the latter"
            )

    @classmethod
    def from_hf(cls, generation_config: Mapping[str, Any], **overrides: Any) -> Sampling:
        """The request of a checkpoint's `generation_config.json` (its dict; `{}` where there is none) and a caller.

        An override wins over the file; an override of None means "not given". Names as in the class, or as in the file.

        * The file sets what transformers would take from it, with its default for what it leaves out: `top_k` 50 while
          sampling (`top_k=0` turns it off). Its `max_length` default of 20 is not taken: `generate` has its own.
        * temperature, top_k, top_p, min_p or typical_p given by the caller *asks* for sampling: `do_sample=True` need
          not be said. (transformers stays greedy and warns.) Said by the file alone, it waits for `do_sample`.
        * `max_new_tokens` given by the caller retires the file's `max_length`, and the other way round; in a file that
          has both, `max_new_tokens` counts (as in transformers).

        Raises `ConfigError` for a field of the file that is malformed, unknown, or asks for a decoding that minillm
        does not have (beams, guidance, ...); the message names the override that goes without it. `InputError` for an
        override.

        >>> Sampling.from_hf({"do_sample": True, "temperature": 0.6, "eos_token_id": 2}, top_k=10, seed=0).temperature
        0.6
        >>> Sampling.from_hf({"temperature": 0.6}).do_sample, Sampling.from_hf({}, top_k=10).do_sample
        (False, True)
        """
        _refuse_other_decodings(generation_config, overrides)
        stored, given = _own_fields(generation_config), _own_fields(overrides)
        if "max_length" in given:
            stored.pop("max_new_tokens", None)
        elif "max_new_tokens" in {**stored, **given}:
            stored.pop("max_length", None)
        if "do_sample" not in given and not _NEUTRAL.keys().isdisjoint(given):
            given["do_sample"] = True
        if {**stored, **given}.get("do_sample", False):
            stored.setdefault("top_k", 50)
        else:
            stored = {name: value for name, value in stored.items() if name not in _NEUTRAL}
        for name, value in stored.items():
            problem = None if name in given else _problem(name, value)
            if problem:
                raise ConfigError(f"generation_config.json: {problem}, or override it with {name}=...")
        return cls(**{**stored, **given})


def process(logits: Tensor, tokens: Tensor, keep: Tensor, *, sampling: Sampling, step: int) -> Tensor:
    """The filters that `sampling` asks for, in the order of `minillm.generation.filters`; the others cost nothing.

    logits (B, V) any float dtype · tokens (B, S) int64, the history · keep (B, S) bool, True on real tokens
    step  number of tokens already written, 0 at the first                                     ->  (B, V) float32
    """
    scores = logits.float()
    if sampling.repetition_penalty != 1:
        scores = filters.repetition_penalty(scores, tokens, keep, penalty=sampling.repetition_penalty)
    if sampling.no_repeat_ngram_size:
        scores = filters.no_repeat_ngram(scores, tokens, keep, size=sampling.no_repeat_ngram_size)
    if step < sampling.min_new_tokens:
        scores = filters.forbid(scores, sampling.eos_ids)
    # In greedy decoding all five are neutral: `Sampling` sees to it.
    if sampling.temperature != 1:
        scores = filters.temperature(scores, value=sampling.temperature)
    if sampling.top_k:
        scores = filters.top_k(scores, k=sampling.top_k)
    if sampling.top_p < 1:
        scores = filters.top_p(scores, p=sampling.top_p)
    if sampling.min_p > 0:
        scores = filters.min_p(scores, p=sampling.min_p)
    if sampling.typical_p < 1:
        scores = filters.typical(scores, p=sampling.typical_p)
    return scores


def row_generators(seed: int | None, rows: int) -> list[torch.Generator]:
    """One random stream a row, on the CPU. Row r of a request with seed s is the single run with seed s + r.

    Seeds are taken modulo 2**32. `None` takes the first seed from torch's global generator, so that
    `torch.manual_seed` still makes a run repeatable.

    >>> [generator.initial_seed() for generator in row_generators(7, 3)]
    [7, 8, 9]
    """
    first = int(torch.randint(_SEEDS, (), device="cpu")) if seed is None else seed
    return [torch.Generator("cpu").manual_seed((first + row) % _SEEDS) for row in range(rows)]


def uniforms(generators: Sequence[torch.Generator]) -> Tensor:
    """The next number of each row's stream, in [0, 1): (B,) float64 on the CPU."""
    return torch.stack([torch.rand((), generator=row, dtype=torch.float64, device="cpu") for row in generators])


def choose(processed: Tensor, draws: Tensor | None, *, step: int) -> Tensor:
    """The next token of each row: the most likely (`draws` None; the first of equals), or one drawn by `draws`.

    processed (B, V) float32 · draws (B,) float64 in [0, 1), from `uniforms` · step for the message  ->  (B,) int64

    A token of probability 0 is never drawn. Raises `NumericsError` with row and step where a row holds NaN or +inf, or
    where every token was removed. The sum over the vocabulary is float64: in float32 rare tokens late in the vocabulary
    would be rounded away.
    """
    if draws is None:
        tokens = processed.argmax(-1)  # NaN counts as the largest
        sound = processed.gather(1, tokens[:, None])[:, 0].isfinite()
    else:
        reached = processed.softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
        total = reached[:, -1:]  # (B, 1)
        # u <= 1 - 2**-53, so u * total rounds to less than total: the search always ends on a token.
        target = draws.to(reached.device)[:, None] * total
        tokens = torch.searchsorted(reached, target, right=True)[:, 0]
        sound = total[:, 0].isfinite()
    if not bool(sound.all()):
        raise _unsound(processed, row=int(sound.int().argmin()), step=step)
    return tokens


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each row's token under the model itself: log_softmax(logits)[token].

    logits (B, V), the model's own before `process` · tokens (B,) int64  ->  (B,) float32

    Temperature 1, nothing filtered: what text APIs report. Not the log-probability under which a *sampled* token was
    drawn, and not for policy-gradient ratios, whose old, new and reference values must all be taken at the sampling
    temperature and unfiltered (trl #235): training computes its own.

    >>> token_logprobs(torch.tensor([[0., 0.]]), torch.tensor([1])).exp()
    tensor([0.5000])
    """
    return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def _unsound(processed: Tensor, *, row: int, step: int) -> NumericsError:
    scores = processed[row]
    broken = ~scores.isfinite() & (scores != -torch.inf)
    if not bool(broken.any()):
        return NumericsError(
            f"row {row}, step {step}: no token is left to choose; lower no_repeat_ngram_size or min_new_tokens"
        )
    token = int(broken.int().argmax())
    return NumericsError(
        f"row {row}, step {step}: the logit of token {token} is {float(scores[token])}; check the weights for NaN, "
        "the dtype (float16 overflows where bfloat16 does not) and the temperature (not nearly 0)"
    )


# -- what a field may hold ---------------------------------------------------------------------------------------------


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_mass(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: _is_int(value) and value >= least


_COUNT = (_at_least(0), "a whole number of at least 0")
_LENGTH = (lambda value: value is None or _at_least(1)(value), "a whole number of at least 1")
_MASS = (_is_mass, "a number above 0 and up to 1 (1 switches it off)")

_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": _LENGTH,
    "max_length": _LENGTH,
    "min_new_tokens": _COUNT,
    "do_sample": (lambda value: isinstance(value, bool), "True or False"),
    "temperature": (
        lambda value: _is_number(value) and value > 0,
        "a number above 0 (for greedy decoding: do_sample=False and no temperature)",
    ),
    "top_k": (_at_least(0), "a whole number of at least 0 (0 switches it off)"),
    "top_p": _MASS,
    "min_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 (off) to 1"),
    "typical_p": _MASS,
    "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a number above 0 (1 switches it off)"),
    "no_repeat_ngram_size": _COUNT,
    "eos_ids": (
        lambda value: isinstance(value, tuple) and all(_at_least(0)(token) for token in value),
        "a tuple of token ids",
    ),
    "stop": (
        lambda value: isinstance(value, tuple) and all(isinstance(text, str) and text for text in value),
        "a tuple of strings, none of them empty",
    ),
    "seed": (
        lambda value: value is None or (_at_least(0)(value) and value < _SEEDS),
        "a whole number from 0 to 2**32 - 1",
    ),
}


def _problem(name: str, value: object) -> str | None:
    allowed, description = _ALLOWED[name]
    return None if allowed(value) else f"{name} is {value!r}; give {description}"


# -- generation_config.json --------------------------------------------------------------------------------------------

_OUR_NAME = {"eos_token_id": "eos_ids", "stop_strings": "stop"}

# Fields that change which tokens come out and that minillm does not have, with the value that means "off"; None and
# an empty list do too.
_OFF: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "num_return_sequences": 1,
    "min_length": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "remove_invalid_values": False,
    "token_healing": False,
    "assistant_ensemble_weight": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "constraints": None,
    "dola_layers": None,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "max_time": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "top_h": None,
    "watermarking_config": None,
}

# Fields that say how to compute, what to return, or who wrote the file; and those that only beams or encoders read.
_WITHOUT_EFFECT = frozenset(
    """transformers_version _from_model_config _commit_hash bos_token_id pad_token_id decoder_start_token_id
    use_cache cache_implementation cache_config max_cache_len low_memory prefill_chunk_size compile_config
    disable_compile continuous_batching_config early_stopping length_penalty renormalize_logits output_attentions
    output_hidden_states output_scores output_logits return_dict_in_generate is_assistant use_mtp
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
    assistant_lookbehind target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size speculation_type""".split()
)


def _own_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Sampling` among `values`, under our names; nulls left out; one id or string made a tuple."""
    own: dict[str, Any] = {}
    for name, value in values.items():
        ours = _OUR_NAME.get(name, name)
        if value is None or ours not in _ALLOWED:
            continue
        if ours in ("eos_ids", "stop"):
            value = tuple(value) if isinstance(value, list | tuple) else (value,)
        own[ours] = value
    return own


def _refuse_other_decodings(generation_config: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """An override may name a field of `Sampling` or take back one of the file: `None`, or its "off" value."""
    for name, value in {**generation_config, **overrides}.items():
        if name in _OFF and not _is_off(name, value):
            if name in overrides:
                raise InputError(f"{name}={value!r} asks for a decoding that minillm does not have; leave it out")
            raise ConfigError(
                f"generation_config.json: {name} is {value!r}, a decoding that minillm does not have; "
                f"pass {name}={_OFF[name]!r} to go without"
            )
        known = name in _ALLOWED or name in _OUR_NAME or name in _OFF or name in _WITHOUT_EFFECT
        if known or value is None:
            continue
        similar = nearest(name, _ALLOWED)
        if name in overrides:
            raise InputError(f"{name} is not a sampling option{similar}; see minillm.generation.sampling.Sampling")
        raise ConfigError(
            f"generation_config.json: {name} is unknown and may change the text{similar}; pass {name}=None to ignore it"
        )


def _is_off(name: str, value: Any) -> bool:
    return value is None or value == _OFF[name] or (isinstance(value, list | tuple | dict) and not value)
