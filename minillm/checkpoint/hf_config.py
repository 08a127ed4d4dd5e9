"""Reading a Hugging Face config.json, field by field, so that nothing in it is silently ignored.

A family asks for the fields it knows; `Fields.finish` then looks at what nobody asked for. A field that is off (null,
false, empty) or known to leave the maths alone passes; any other is an error, because a config that says
`sliding_window: 4096` or `num_local_experts: 8` describes another model than the one we would build.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minillm.config import DynamicRope, LinearRope, Llama3Rope, LongRope, RopeScaling, YarnRope
from minillm.errors import ConfigError, nearest

#: Fields of transformers' configs that concern bookkeeping, training (dropout too: minillm has none), generation or
#: other heads, never the forward pass of inference.
BOOKKEEPING = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path
    architectures attention_dropout attn_implementation auto_map bad_words_ids base_model_tp_plan
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout id2label initializer_range is_decoder keys_to_ignore_at_inference
    label2id length_penalty max_length max_sequence_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)


class Fields:
    """One config.json as a mapping that remembers what was asked for.

    >>> fields = Fields({"hidden_size": 8, "magic": 3}, "config.json")
    >>> fields.whole("hidden_size")
    8
    >>> fields.finish()
    Traceback (most recent call last):
    minillm.errors.ConfigError: config.json: field magic = 3 is unknown and may change the maths; ...
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        self._asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or the default where it is absent or null."""
        self._asked.add(name)
        value = self.raw.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.get(name, default)
        if value is None:
            raise ConfigError(f"{self.where}: field {name} is missing{nearest(name, self.raw)}; add it")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.where}: field {name} is {value!r:.40}; it must be a whole number of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A real number. JSON has no NaN and no infinity, but Python's reader takes them."""
        value = self.get(name, default)
        if not _is_number(value):
            raise ConfigError(f"{self.where}: field {name} is {value!r:.40}; it must be a number")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of real numbers."""
        value = self.get(name)
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise ConfigError(f"{self.where}: field {name} is {value!r:.40}; it must be a list of numbers")
        return tuple(map(float, value))

    def name(self, name: str, default: str) -> str:
        """A string."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}: field {name} is {value!r:.40}; it must be a string")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: field {name} is {value!r:.40}; it must be true or false")
        return value

    def finish(self, ignore: Collection[str] = ()) -> None:
        """Refuse every field that was not asked for, is not off, and is not known to leave the maths alone."""
        for name, value in self.raw.items():
            if name in self._asked or name in BOOKKEEPING or name in ignore or value in (None, False, "", [], {}):
                continue
            if name == "quantization_config":
                method = value.get("quant_method", "unknown") if isinstance(value, Mapping) else "unknown"
                if method == "bitsandbytes":  # `minillm.checkpoint.quantised` reads it
                    continue
                raise ConfigError(
                    f"{self.where}: the weights are already quantised ({method}); load the float checkpoint instead"
                )
            hint = nearest(name, self._asked)
            raise ConfigError(
                f"{self.where}: field {name} = {value!r:.80} is unknown and may change the maths{hint}; "
                f"if it does not, pass ignore=[{name!r}]"
            )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file in front of `DecoderConfig`'s own errors, which know the field but not where it was read."""
    try:
        yield
    except ConfigError as error:
        if str(path) in str(error):
            raise
        raise ConfigError(f"{path}: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_activation(fields: Fields, name: str, default: str) -> Any:
    """The activation's name in `DecoderConfig`."""
    value = fields.name(name, default)
    if value not in _ACTIVATIONS:
        raise ConfigError(
            f"{fields.where}: {name} {value!r} is unknown{nearest(value, _ACTIVATIONS)}; "
            f"minillm has {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[value]


def write_activation(activation: str) -> str:
    """The name transformers gives to an activation of `DecoderConfig`."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)


def read_head(fields: Fields) -> Any:
    """`"scalar"` for a sequence classifier of one label (a reward model), else `"lm"`."""
    if "ForSequenceClassification" not in str(fields.get("architectures")):
        return "lm"
    labels = fields.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else fields.get("num_labels", 2)
    if count != 1:
        raise ConfigError(f"{fields.where}: a classifier of {count} labels; minillm has a scalar head, of one label")
    return "scalar"


_ROPE_KINDS: dict[str, type[RopeScaling]] = {
    "linear": LinearRope,
    "dynamic": DynamicRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
    "longrope": LongRope,
    "su": LongRope,  # its first name
}
_TRAINED = "original_max_position_embeddings"
_ROPE_COMMON = ("type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned", _TRAINED)


def read_rope(fields: Fields, context: int) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and the `share` of each head that turns, from either spelling of config.json.

    transformers 5 writes one dictionary, `rope_parameters` = {rope_type, rope_theta, factor, ...}; earlier ones write
    `rope_theta` beside `rope_scaling` = {type or rope_type, factor, ...}. A null rope_scaling means none.
    """
    found = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    theta, share = fields.number("rope_theta", 10_000.0), fields.number("partial_rotary_factor", 1.0)
    trained = None if fields.get(_TRAINED) is None else fields.whole(_TRAINED)
    fields.get("rope_parameters")
    if not isinstance(found, Mapping):
        raise ConfigError(f"{fields.where}: rope_scaling is {found!r:.40}; it must be a dictionary or null")
    inner = Fields(found, f"{fields.where}, rope_scaling")
    return {
        "rope_theta": inner.number("rope_theta", theta),
        "rope_scaling": _read_scaling(inner, context, trained),
        "share": inner.number("partial_rotary_factor", share),
    }


def _read_scaling(fields: Fields, context: int, trained: int | None) -> RopeScaling | None:
    name = fields.name("rope_type", fields.name("type", "default"))
    if name not in _ROPE_KINDS and name != "default":
        hint = nearest(name, _ROPE_KINDS)
        raise ConfigError(f"{fields.where}: type {name!r} is unknown{hint}; minillm has {', '.join(_ROPE_KINDS)}")
    kind = _ROPE_KINDS.get(name)
    wanted = {field.name: field for field in dataclasses.fields(kind)} if kind else {}
    unknown = [key for key, value in fields.raw.items() if key not in (*wanted, *_ROPE_COMMON) and value is not None]
    if unknown:
        hint = nearest(unknown[0], wanted)
        raise ConfigError(f"{fields.where}: field {unknown[0]} is unknown for {name}{hint}; remove or correct it")
    if kind is None:
        return None
    original = trained or fields.whole(_TRAINED, context)
    values: dict[str, Any] = {"original_context": original}
    if kind in (YarnRope, LongRope):
        values["factor"] = context / original
    for key, field in wanted.items():
        if fields.get(key) is not None:
            values[key] = _READERS[str(field.type)](fields, key)
        elif field.default is dataclasses.MISSING and key not in values:
            raise ConfigError(f"{fields.where}: {name} needs {key}; add it")
    return kind(**{key: value for key, value in values.items() if key in wanted})


#: How a field of a scaling is read, by its annotation.
_READERS: Mapping[str, Callable[[Fields, str], Any]] = {
    "int": Fields.whole,
    "bool": Fields.flag,
    "float": Fields.number,
    "float | None": Fields.number,
    "tuple[float, ...]": Fields.numbers,
}


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, the spelling that every version of transformers reads."""
    if scaling is None:
        return {"rope_theta": theta}
    written: dict[str, Any] = {
        "rope_type": next(name for name, kind in _ROPE_KINDS.items() if isinstance(scaling, kind))
    }
    for name, value in dataclasses.asdict(scaling).items():
        if value is not None:
            key = _TRAINED if name == "original_context" else name
            written[key] = list(value) if isinstance(value, tuple) else value
    return {"rope_theta": theta, "rope_scaling": written}
