"""The processes that train one model together, as torchrun starts them, and what they have to agree about.

    torchrun --nproc-per-node 2 scripts/sft.py ...           rank 0 and rank 1 of a world of 2

    rows of a step   0 1 2 3 4 5 6        the same on every rank, drawn from the seed
    rank 0           0   2   4   6        the first rank: it alone writes files, prints, and looks at the clock
    rank 1             1   3   5   ·      ·: a row of which nothing is taught, where the rows run out

Ranks wait for each other wherever they add something up, so all must come by as often: what decides about the way (when
to stop, whether a loss is finite, how late it is) is the same number on all of them. Without torchrun a process is the
only rank of a world of 1, and every function here gives back what it gets.

Numbers travel on the CPU (gloo); parameters and gradients by nccl between GPUs, each rank's own: `--device cuda`.
"""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from minillm.data.batches import Batch, collate
from minillm.data.examples import Example
from minillm.errors import InputError

_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, this process is one rank of those that torchrun started. device: cpu, or cuda for a GPU a rank.

    A rank that ends with an error ends the run, as torchrun stops the others. Where several do, each for the same
    reason or because another is gone, the first one speaks: the error leaves this block on one rank alone.
    """
    if world_planned() == 1 or dist.is_initialized():
        yield
        return
    store, rank, size = next(iter(dist.rendezvous("env://")))
    try:
        backend = _choose(device)
        dist.init_process_group(backend, store=dist.PrefixStore("minillm", store), rank=rank, world_size=size)
        yield
    except BaseException:
        if _another_spoke(store):
            time.sleep(1)  # torchrun kills all as soon as one is gone: the speaker shall have had its say
            sys.exit(1)
        raise
    gc.collect()  # a DDP module freed after its group waits for ever (torch 2.13, seen with gloo)
    dist.destroy_process_group()


def world_planned() -> int:
    """How many ranks torchrun starts; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _SET_BY_TORCHRUN) else 1


def refuse(script: str) -> None:
    """For a script that trains on one device: raise InputError where torchrun started several, once."""
    if world_planned() > 1:
        if not is_first():
            sys.exit(2)
        raise InputError(f"{script} trains on one device; start it without torchrun")


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """This rank, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """Whether files and messages are this process' business; also before ranks join and after they part."""
    return world_planned() == 1 or os.environ["RANK"] == "0"


def total(x: float) -> float:
    """x summed over the ranks: the same bits on each, as all add in the order of the ranks."""
    if world() == 1:
        return x
    found = [torch.zeros((), dtype=torch.float64) for _ in range(world())]
    dist.all_gather(found, torch.tensor(x, dtype=torch.float64))
    return sum(each.item() for each in found)


def firsts(x: float) -> float:
    """x of the first rank."""
    if world() == 1:
        return x
    found = torch.tensor(x, dtype=torch.float64)
    dist.broadcast(found, 0)
    return found.item()


def wait() -> None:
    """Until all ranks are here."""
    total(0.0)


def seed(number_of_run: int, step: int) -> None:
    """Among several ranks: begin a step's random numbers (dropout) at a function of (seed, step, rank).

    So each rank draws its own, and a run that goes on, with as many ranks, draws what it would have drawn. A process
    alone keeps the one stream that it began with, whose place a state holds.
    """
    if world() > 1:
        digest = hashlib.sha256(f"{number_of_run} step {step} rank {number()}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:4], "big"))


def own_parts(rows: Sequence[Sequence[Example]], size: int) -> list[Batch]:
    """This rank's share of a step's rows, `size` of them a batch; as many batches on every rank.

    Every W-th row, as neighbours are of like length: all ranks have about as much to do.
    """
    mine, most = rows[number() :: world()], -(-len(rows) // world())
    cut = [mine[at : at + size] for at in range(0, most, size)]
    return [collate(part) if part else _untaught(rows[:1]) for part in cut]


def _untaught(rows: Sequence[Sequence[Example]]) -> Batch:
    batch = collate(rows)
    return batch._replace(taught=torch.zeros_like(batch.taught))


def _choose(device: str) -> str:
    """The backend; makes this rank's GPU the current one."""
    kind, place = torch.device(device), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if kind.type == "cpu":
        return "gloo"
    if kind.type != "cuda" or kind.index is not None:
        raise InputError(f"device {device} cannot be shared by {world_planned()} processes; give --device cpu or cuda")
    if place >= torch.cuda.device_count():
        raise InputError(
            f"a process has no GPU: this machine has {torch.cuda.device_count()}; start as many with --nproc-per-node"
        )
    torch.cuda.set_device(place)
    return "cpu:gloo,cuda:nccl"


def _another_spoke(store: dist.Store) -> bool:
    try:
        return store.add("spoke", 1) > 1
    except RuntimeError:  # who kept the store is gone
        return True
