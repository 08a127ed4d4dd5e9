"""One model over several ranks: what each of them holds, and how its tensors come together again.

            parameters   gradients   moments    what travels
    ddp     whole        whole       whole      gradients, once a step
    fsdp    1/W          1/W         1/W        all parameters, twice, and gradients, with every micro-batch

`ddp` is torch's DistributedDataParallel (arXiv 2006.15704). `fsdp` is FSDP2, `fully_shard` (arXiv 2304.11277, ZeRO-3):
a block's parameters are gathered when it is computed, forward and backward, and let go afterwards; embedding, last norm
and head, with whatever else stands outside the blocks, come and go in one group. Cut in W are all parameters, frozen or
trained, whatever their format: fp32 adapters, a bf16 base, int8 and NF4 codes and their scales. Whole on every rank are
only buffers (rotary tables; the start of PiSSA and OLoRA) and single numbers (NF4's `nested_offset`). Layers see whole
tensors while they compute, so kernels that take addresses need know nothing.

Gradients of micro-batches: DDP adds them up on each rank and sums over the ranks with the last one. FSDP sums after
each: gradients that wait for the last one would be whole on every rank, which is what one sharded against.

A rank reads the whole checkpoint before it keeps its part: while loading, a device must hold the model once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minillm.errors import InputError
from minillm.training import ranks
from minillm.training.token_loss import TokenLoss

Parallel = Literal["ddp", "fsdp"]


def spread(measured: TokenLoss, how: Parallel) -> nn.Module:
    """The module over all ranks; alone, as it is. Make the optimizer afterwards: `fsdp` puts other parameters in place.

    Trained parameters and buffers start as the first rank has them.
    """
    if ranks.world() == 1:
        return measured
    if how == "fsdp":
        return _shard(measured)
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the older one's name
    settings: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(measured, **settings)


def _shard(measured: TokenLoss) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh  # here: they take 0.3 s
    from torch.distributed.fsdp import fully_shard

    model: Any = measured.model
    for x in (*(x for x in model.parameters() if x.requires_grad), *model.buffers()):
        dist.broadcast(x.detach(), 0)
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.world(),))
    single = {x for x in model.parameters() if not x.ndim}
    try:
        for module in (*model.blocks, measured):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=single)
    except RuntimeError as error:
        if "can require gradients" not in str(error):
            raise
        raise InputError(f"torch {torch.__version__} shards no quantised weights; update it, or take ddp") from error
    return measured


def is_spread(module: nn.Module) -> bool:
    """Whether its gradients become the mean over the ranks."""
    return isinstance(module, DistributedDataParallel) or is_sharded(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether this rank holds only a part of its parameters."""
    return hasattr(module, "set_requires_gradient_sync")


def adding(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """For the forward and backward pass of a micro-batch; `last`: no other one follows before the step."""
    return nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()


def gather(model: nn.Module) -> None:
    """Trained parameters whole again on the first rank, on the CPU, to be saved; the model computes no more.

    All ranks have to call it; one parameter at a time is whole on the others.
    """
    made: dict[int, nn.Parameter] = {}  # an adapter's A may belong to several layers
    for module, name, parameter in list(_sharded(model)):
        if id(parameter) not in made:
            x = whole(parameter.detach()).cpu()
            made[id(parameter)] = nn.Parameter(x if ranks.is_first() else x[:0])
        module._parameters[name] = made[id(parameter)]


def _sharded(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and hasattr(parameter, "full_tensor"):
                yield module, name, parameter


def whole(x: Tensor) -> Tensor:
    """All of a tensor of which each rank has a part, on every rank; all have to call it. Others come back as they are.

    >>> whole(torch.ones(2))
    tensor([1., 1.])
    """
    sharded: Any = x
    found: Tensor = sharded.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def local(x: Tensor) -> Tensor:
    """This rank's part; writing to it writes to x."""
    sharded: Any = x
    found: Tensor = sharded.to_local() if hasattr(x, "to_local") else x
    return found


def placed(x: Tensor, like: Tensor) -> Tensor:
    """x on the device of `like`, and cut along its rows among the ranks where that is; single numbers are never cut."""
    sharded: Any = like
    if not hasattr(like, "to_local") or not x.ndim:
        return x.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), sharded.device_mesh, sharded.placements)
