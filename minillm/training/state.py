"""Everything a run needs to go on as if it had never stopped, in one safetensors file.

    model.<name>                   every parameter that is trained; frozen ones are the base's, which the recipe names
    optimizer.<name>.<moment>      what the optimizer keeps for it: exp_avg, exp_avg_sq, step
    random, random.cuda:0 ...      torch's global random states (dropout, sampling): the CPU's, each used GPU's; of
                                   several ranks the first one's (they seed each step: `minillm.training.ranks.seed`)
    metadata "progress"            JSON: step, seconds, history, recipe ... whatever the caller hands over

One file, because one rename is atomic and two are not: killed at any moment, a run leaves the old state or the new one.
No pickle: reading a state runs nothing. The order of the data needs no state: it is a function of the step
(`minillm.data.corpus.Windows`).
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minillm.atomic import atomic_file
from minillm.checkpoint.safetensors_header import write_header
from minillm.checkpoint.tensor_file import as_bytes
from minillm.errors import CheckpointError
from minillm.training import ranks
from minillm.training.spread import placed, whole


def save_state(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write model, optimizer, random state and `progress` (anything JSON holds) to `path`, atomically.

    Of several ranks all have to call it; the first one writes, tensors of which each has a part come together one at a
    time, and all wait until the state is there. Raises CheckpointError where the disk does not take it; the state
    before stays.
    """
    _write(path, _tensors(model, optimizer), progress)


def save_parameters(path: str | os.PathLike[str], model: nn.Module, progress: dict[str, Any]) -> None:
    """`save_state` of what is trained alone: to come back to, not to go on from."""
    _write(path, {f"model.{name}": parameter for name, parameter in _trained(model).items()}, progress)


def _write(path: str | os.PathLike[str], tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    header, order = write_header(tensors, {"progress": json.dumps(progress)})
    with atomic_file(path) if ranks.is_first() else nullcontext() as file:
        if file is not None:
            file.write(header)
        for name in order:
            tensor = whole(tensors[name].detach())
            if file is not None:
                file.write(as_bytes(tensor.cpu().contiguous()))
    ranks.wait()


def read_progress(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_state` was given as `progress`; reads the header only, so that a recipe is compared before loading."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads(file.metadata()["progress"]))
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: is no training state ({error}); start the run anew") from error


@torch.no_grad()
def load_state(path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill model, optimizer and torch's random state from `path`, bit for bit; returns `progress`.

    Every rank reads the file; it does not matter how many there were when it was written, nor what each of them held.

    Raises CheckpointError for a file that is damaged, or whose parameters are not those of this model; nothing is
    changed then.
    """
    progress = read_progress(path)
    tensors = _read(path, model)
    for name, parameter in _trained(model).items():
        parameter.copy_(placed(tensors[f"model.{name}"], parameter))
        prefix = f"optimizer.{name}."
        moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if moments:
            optimizer.state[parameter] = {key: placed(value, parameter) for key, value in moments.items()}
    torch.set_rng_state(tensors["random"])
    for name in [name for name in tensors if name.startswith("random.") and ranks.is_first()]:
        torch.cuda.set_rng_state(tensors[name], name.removeprefix("random."))
    return progress


@torch.no_grad()
def load_parameters(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Fill what is trained from `path`, as `load_state` does; returns `progress`."""
    progress, tensors = read_progress(path), _read(path, model)
    for name, parameter in _trained(model).items():
        parameter.copy_(placed(tensors[f"model.{name}"], parameter))
    return progress


def _read(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the file, whose parameters are those of the model."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping, has only keys())
    _check_same(Path(path), tensors, _trained(model))
    return tensors


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {"random": torch.get_rng_state()}
    for device in {parameter.device for parameter in _trained(model).values() if parameter.is_cuda}:
        tensors[f"random.{device}"] = torch.cuda.get_rng_state(device)
    for name, parameter in _trained(model).items():
        tensors[f"model.{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_same(path: Path, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    expected = {f"model.{name}": tuple(parameter.shape) for name, parameter in parameters.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("model.")}
    if expected != found:
        odd = min(name for name, shape in (expected.items() ^ found.items()))
        raise CheckpointError(
            f"{path}: {odd} has shape {found.get(odd)}, the model {expected.get(odd)}; resume with the same recipe"
        )
