"""adapter_config.json of peft (0.21) <-> `LoraConfig`: every field is honoured, or refused by name.

    r, lora_alpha                rank, alpha            lora_dropout          dropout
    target_modules               targets                exclude_modules       exclude
    layers_to_transform          layers                 modules_to_save       retrain
    use_rslora, use_dora         rslora, dora           lora_bias, bias       lora_bias, biases
    rank_pattern, alpha_pattern  the same               init_lora_weights     init

A field that changes the maths and that minillm does not have is refused where it is set; where it is null, false or
empty it says nothing. So is a field that nobody knows: it could change the maths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minillm.errors import CheckpointError, nearest
from minillm.lora.config import Init, LoraConfig

#: Read above all.
_READ = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "use_rslora", "use_dora", "lora_bias", "bias", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "peft_type",
}  # fmt: skip
#: Say nothing about the maths.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "revision",
    "task_type", "qalora_group_size", "runtime_config", "ensure_weight_tying", "merge_weights",
}  # fmt: skip
#: Field -> what it asks for.
_REFUSED = {
    "alora_invocation_tokens": "adapters that wait for tokens (aLoRA)",
    "arrow_config": "routing between adapters (Arrow)",
    "enable_lora": "adapters of parts of a fused weight (peft before 0.3)",
    "corda_config": "a base changed at the start (CorDA)",
    "eva_config": "ranks from activations (EVA)",
    "fan_in_fan_out": "weights stored as (in, out)",
    "kasa_config": "KaSA",
    "layer_replication": "blocks used twice",
    "loftq_config": "a base changed at the start (LoftQ)",
    "lora_ga_config": "a base changed at the start (LoRA-GA)",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "adapters on bare parameters",
    "trainable_token_indices": "single rows of the embedding",
    "use_bdlora": "block-diagonal adapters",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
#: Fields, their kinds, the kind of what is in a list, in words.
_KINDS: tuple[tuple[set[str], tuple[type, ...], type, str], ...] = (
    ({"target_modules", "exclude_modules"}, (str, list), str, "a text or a list of texts"),
    ({"modules_to_save"}, (list,), str, "a list of texts"),
    ({"layers_to_transform"}, (int, list), int, "a whole number or a list of them"),
    ({"rank_pattern", "alpha_pattern"}, (dict,), str, "an object"),
    ({"use_rslora", "use_dora", "lora_bias"}, (bool,), bool, "true or false"),
    ({"lora_dropout"}, (int, float), float, "a number"),
)
#: init_lora_weights -> init. Those that are not here and leave the base alone only matter before training.
_INITS: Mapping[Any, Init] = {
    True: "kaiming", False: "linear", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora",
}  # fmt: skip
_ONLY_AT_THE_START = ("eva", "orthogonal", "mica")


def from_peft(raw: Mapping[str, Any], where: str, defaults: tuple[str, ...]) -> LoraConfig:
    """The settings; defaults: target_modules where the file leaves them to the architecture. CheckpointError."""
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {raw.get('peft_type')!r}; this loads LORA")
    for name, value in raw.items():
        if name in _REFUSED and value:
            raise CheckpointError(f"{where}: {name} asks for {_REFUSED[name]}, which minillm does not have")
        if name not in _READ | _NEUTRAL | set(_REFUSED) and value:
            known = nearest(name, _READ | _NEUTRAL | set(_REFUSED))
            raise CheckpointError(f"{where}: field {name!r} is unknown{known} and could change the maths; remove it")
    if raw.get("layers_pattern") not in (None, [], "", "layers", "h", ["layers"], ["h"]):
        raise CheckpointError(
            f"{where}: layers_pattern {raw['layers_pattern']!r} names no list of blocks of this model"
        )
    given = {name: value for name, value in raw.items() if value is not None}
    _check_kinds(given, where)
    names = ("target_modules", "layers_to_transform", "exclude_modules")
    targets, layers, exclude = (given.get(name) for name in names)
    if isinstance(targets, str) and layers not in (None, []) and targets != "all-linear":
        raise CheckpointError(f"{where}: layers_to_transform needs target_modules as a list; peft refuses this too")
    return LoraConfig(
        rank=given.get("r", 8),
        alpha=given.get("lora_alpha", 8),
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)) if targets else defaults,
        exclude=exclude if isinstance(exclude, str) else tuple(exclude or ()),
        layers=None if layers in (None, []) else tuple([layers] if isinstance(layers, int) else layers),
        dropout=given.get("lora_dropout", 0.0),
        rslora=given.get("use_rslora", False),
        dora=given.get("use_dora", False),
        init=_init(given.get("init_lora_weights", True), where),
        rank_pattern=given.get("rank_pattern", {}),
        alpha_pattern=given.get("alpha_pattern", {}),
        lora_bias=given.get("lora_bias", False),
        biases=given.get("bias", "none"),
        retrain=tuple(given.get("modules_to_save", ())),
    )


def _check_kinds(given: Mapping[str, Any], where: str) -> None:
    """JSON may hold anything; CheckpointError where a field is not of its kind."""
    for names, kinds, within, what in _KINDS:
        for name in names & given.keys():
            value = given[name]
            inner = value if isinstance(value, list) else ()
            if not isinstance(value, kinds) or not all(type(each) is within for each in inner):
                raise CheckpointError(f"{where}: {name} is {value!r:.100}; it must be {what}")


def _init(value: Any, where: str) -> Init:
    if isinstance(value, bool | str) and value in _INITS:
        return _INITS[value]
    if value in _ONLY_AT_THE_START:
        return "kaiming"
    raise CheckpointError(
        f"{where}: init_lora_weights {value!r} has changed the base's weights in a way that cannot be repeated; "
        "save it in peft with path_initial_model_for_weight_conversion, which makes a plain adapter of it"
    )


def to_peft(
    config: LoraConfig, layers: Mapping[str, tuple[int, float]], retrain: Sequence[str], *, base: str, task: str
) -> dict[str, Any]:
    """The settings for layers, by their names in the checkpoint's format, of these ranks and alphas; retrain: so named.

    The commonest rank and alpha are the file's; what differs becomes a pattern of the full name.
    """
    ranks, alphas = ([pair[place] for pair in layers.values()] for place in (0, 1))
    rank, alpha = (max(set(values), key=lambda each: (values.count(each), each)) for values in (ranks, alphas))
    return {
        "alpha_pattern": {name: each[1] for name, each in sorted(layers.items()) if each[1] != alpha},
        "base_model_name_or_path": base,
        "bias": config.biases,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_bias": config.lora_bias,
        "lora_dropout": config.dropout,
        "modules_to_save": list(retrain) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: each[0] for name, each in sorted(layers.items()) if each[0] != rank},
        "target_modules": sorted(layers),
        "task_type": task,
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }
