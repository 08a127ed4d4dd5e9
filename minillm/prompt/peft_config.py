"""adapter_config.json of peft (0.21) <-> `PromptConfig`: every field is honoured, or refused by name.

    peft_type                          kind       PROMPT_TUNING, P_TUNING, PREFIX_TUNING
    num_virtual_tokens                 tokens
    encoder_reparameterization_type    encoder    MLP, LSTM                             P-tuning
    prefix_projection                  encoder    true: "mlp"                           prefix
    encoder_hidden_size                width      written, and unused, without encoder
    encoder_num_layers, -_dropout      layers, dropout    said of an MLP they change nothing, in peft too
    prompt_tuning_init, init_weights   init       with their texts and tokenizers only before training, so they are
                                                  checked and then forgotten
    token_dim, num_layers, num_attention_heads    checked against the model

The last is H, for a prefix N (`minillm.prompt.cache`), and token_dim then N E. Where Falcon is multi-query, peft's own
default for a prefix is H and fails in its first forward; 1 and E, which we write, work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillm.config import DecoderConfig
from minillm.errors import CheckpointError, nearest
from minillm.prompt.cache import cached_heads
from minillm.prompt.config import Encoder, Init, Kind, PromptConfig
from minillm.prompt.virtual import sizes

TYPES: Mapping[str, Kind] = {"PROMPT_TUNING": "prompt", "P_TUNING": "p-tuning", "PREFIX_TUNING": "prefix"}
_COMMON = {
    "peft_type", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
    "modules_to_save", "task_type",
}  # fmt: skip
_OWN = {
    "prompt": {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
    "p-tuning": {
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
    },
    "prefix": {"encoder_hidden_size", "prefix_projection", "init_weights"},
}  # fmt: skip
#: Say nothing about the maths.
_NEUTRAL = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
#: Field -> what it may say, the default first.
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "task_type": (None, "CAUSAL_LM"),
    "num_transformer_submodules": (None, 1),
    "modules_to_save": (None, []),
    "prompt_tuning_init": ("RANDOM", "SAMPLE_VOCAB", "TEXT"),
    "init_weights": (None, "zero"),
    "encoder_reparameterization_type": ("MLP", "LSTM"),
    "prefix_projection": (False, True),
}
_WHOLE = {"token_dim", "num_layers", "num_attention_heads", "encoder_hidden_size", "encoder_num_layers"}
_KINDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "encoder_dropout": ((int, float), "a number"),
    "prompt_tuning_init_text": (str, "a text"),
    "tokenizer_name_or_path": (str, "a text"),
    "tokenizer_kwargs": (dict, "an object"),
}
_OTHER = "the adapter belongs to another base model"


def from_peft(raw: Mapping[str, Any], where: str) -> PromptConfig:
    """The settings; CheckpointError that names the field."""
    kind = TYPES.get(str(raw.get("peft_type")))
    if kind is None:
        raise CheckpointError(f"{where}: peft_type is {raw.get('peft_type')!r}; this loads {', '.join(TYPES)}")
    known = _COMMON | _OWN[kind] | _NEUTRAL
    for name, value in raw.items():
        if name not in known and value:
            near = nearest(name, known)
            raise CheckpointError(f"{where}: field {name!r} is unknown{near} and could change the maths; remove it")
    given = {name: value for name, value in raw.items() if value is not None and name in known}
    _check(given, where)
    if "num_virtual_tokens" not in given:
        raise CheckpointError(f"{where}: num_virtual_tokens is missing; save the adapter again")
    of_lstm = given.get("encoder_reparameterization_type") == "LSTM"
    encoder: Encoder | None = None
    if kind == "p-tuning" or given.get("prefix_projection"):
        encoder = "lstm" if of_lstm else "mlp"
    return PromptConfig(
        kind=kind,
        tokens=given["num_virtual_tokens"],
        init=_init(given),
        encoder=encoder,
        width=given.get("encoder_hidden_size") if encoder else None,
        layers=given.get("encoder_num_layers", 2) if of_lstm else 2,
        dropout=given.get("encoder_dropout", 0.0) if of_lstm and given.get("encoder_num_layers", 2) > 1 else 0.0,
    )


def _init(given: Mapping[str, Any]) -> Init:
    """A text is not kept: with its tokenizer it only mattered before training."""
    inits: Mapping[Any, Init] = {"SAMPLE_VOCAB": "vocab"}
    return "zero" if given.get("init_weights") else inits.get(given.get("prompt_tuning_init"), "random")


def _check(given: Mapping[str, Any], where: str) -> None:
    for name, value in given.items():
        if name in _WHOLE | {"num_virtual_tokens"} and (type(value) is not int or value < 1):
            raise CheckpointError(f"{where}: {name} is {value!r:.100}; it must be a whole number of at least 1")
        if name in _KINDS and (not isinstance(value, _KINDS[name][0]) or isinstance(value, bool)):
            raise CheckpointError(f"{where}: {name} is {value!r:.100}; it must be {_KINDS[name][1]}")
        if name in _CHOICES and not any(type(value) is type(each) and value == each for each in _CHOICES[name]):
            have = ", ".join(str(each) for each in _CHOICES[name] if each)
            raise CheckpointError(
                f"{where}: {name} is {value!r:.100}, which minillm does not have{have and f'; {have}'}"
            )
    if not 0 <= given.get("encoder_dropout", 0) < 1:
        raise CheckpointError(f"{where}: encoder_dropout is {given['encoder_dropout']!r}; it must be from 0 to below 1")


def check_base(raw: Mapping[str, Any], config: DecoderConfig, kind: str, where: str) -> int:
    """CheckpointError where the sizes in the file are not the model's; returns N, the heads of a prefix.

    A prefix may have G heads or N: on a Falcon with grouped heads both work here.
    """
    heads = raw.get("num_attention_heads") or (cached_heads(config) if kind == "prefix" else config.num_heads)
    fitting = {cached_heads(config), config.num_kv_heads} if kind == "prefix" else {config.num_heads}
    if heads not in fitting:
        sorted_out = " or ".join(map(str, sorted(fitting)))
        raise CheckpointError(f"{where}: num_attention_heads is {heads}, and this model has {sorted_out}; {_OTHER}")
    expected = {"token_dim": sizes(config, kind, heads)[0], "num_layers": config.num_layers}
    for name, value in expected.items():
        if raw.get(name) not in (None, value):
            raise CheckpointError(f"{where}: {name} is {raw[name]}, and this model asks for {value}; {_OTHER}")
    return int(heads)


def to_peft(config: PromptConfig, model: DecoderConfig, *, heads: int, base: str) -> dict[str, Any]:
    """The settings for a file; heads: N of a prefix, H otherwise."""
    written: dict[str, Any] = {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_attention_heads": heads,
        "num_layers": model.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.tokens,
        "peft_type": next(theirs for theirs, kind in TYPES.items() if kind == config.kind),
        "task_type": "CAUSAL_LM",
        "token_dim": sizes(model, config.kind, heads)[0],
    }
    width = config.width or written["token_dim"]
    if config.kind == "prompt":  # TEXT would ask peft for a tokenizer, and the numbers are in the file
        return written | {"prompt_tuning_init": "SAMPLE_VOCAB" if config.init == "vocab" else "RANDOM"}
    if config.kind == "prefix":
        zero = "zero" if config.init == "zero" else None
        projects = config.encoder is not None
        return written | {"encoder_hidden_size": width, "init_weights": zero, "prefix_projection": projects}
    return written | {
        "encoder_dropout": config.dropout,
        "encoder_hidden_size": width,
        "encoder_num_layers": config.layers,
        "encoder_reparameterization_type": str(config.encoder).upper(),
    }
