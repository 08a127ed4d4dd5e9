"""Which module reads a config.json: by its `model_type`, which names a format and nothing else."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from minillm.checkpoint import falcon, llama
from minillm.checkpoint.hf_config import naming
from minillm.config import DecoderConfig
from minillm.errors import CheckpointError, ConfigError, nearest

FAMILIES: Mapping[str, ModuleType] = {
    "llama": llama,
    "mistral": llama,
    "falcon": falcon,
    "RefinedWeb": falcon,  # the first names of Falcon-40B
    "RefinedWebModel": falcon,  # and of Falcon-7B and -RW
}


def family_of(model_type: object, where: str) -> ModuleType:
    """The module of a `model_type`; ConfigError lists those there are."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type {model_type!r} is not supported{nearest(str(model_type), FAMILIES)}; "
            f"minillm reads {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError where it is missing, broken, or something else than an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; a checkpoint folder needs it") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check what it is and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, a number of 5,000 digits
        raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not a JSON object; download it again")
    return found


def read_config(folder: Path, ignore: Collection[str] = ()) -> DecoderConfig:
    """config.json of a folder -> DecoderConfig; `ignore` names unknown fields known to leave the maths alone."""
    path = folder / "config.json"
    raw = read_json(path)
    family = family_of(raw.get("model_type"), str(path))
    with naming(path):
        return family.config_from_hf(raw, str(path), ignore)
