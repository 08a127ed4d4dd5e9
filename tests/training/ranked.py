"""Two processes that stand ready as rank 0 and rank 1, and what tests have them do together.

Starting a process that knows torch takes seconds, so one pair serves all tests: `Pair.run(function, ...)` calls the
function on both at once, under the variables that torchrun sets.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from minillm import lora
from minillm.data.examples import Example
from minillm.errors import InputError, NumericsError
from minillm.model import Decoder
from minillm.quant.convert import quantize_linears
from minillm.training import ranks
from minillm.training.adamw8 import AdamW8
from minillm.training.loop import accumulate, clip_gradients
from minillm.training.progress import Progress
from minillm.training.recipe import Interrupted
from minillm.training.spread import Parallel, local, spread, whole
from minillm.training.token_loss import TokenLoss
from scripts import sft
from tests import decoders

WORLD = 2


class Pair:
    """`with Pair() as pair: pair.run(f, ...)` -> what f returned on rank 0 and on rank 1."""

    def __enter__(self) -> Pair:
        spawn = multiprocessing.get_context("spawn")
        self._pools = [
            ProcessPoolExecutor(1, mp_context=spawn, initializer=_be, initargs=(rank,)) for rank in range(WORLD)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown()

    def run(self, function: Callable[..., Any], *inputs: Any) -> list[Any]:
        """Raises what either raised, rank 0 first."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        waiting = [pool.submit(_serve, port, function, inputs) for pool in self._pools]
        try:
            return [each.result(timeout=60) for each in waiting]
        except BaseException:  # the other rank may wait for ever
            for pool in self._pools:
                for process in list((pool._processes or {}).values()):
                    process.kill()
            self.__enter__()
            raise


def _be(rank: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "WORLD_SIZE": str(WORLD)}


def _serve(port: int, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    os.environ["MASTER_PORT"] = str(port)
    with ranks.joined("cpu"):
        return function(*inputs)


def model(kind: str, **fields: Any) -> Decoder:
    """All weights, or adapters on a float, bfloat16, int8 or nf4 base; in float64 where kernels take it: what is left
    of a difference then is no rounding."""
    made = decoders.decoder(**fields)
    if kind in ("int8", "nf4"):
        quantize_linears(made, kind)
    if kind == "bfloat16":
        made.to(torch.bfloat16)
    if kind != "full":
        lora.add(
            made,
            rank=3,
            targets=lora.ALL_LINEAR,
            dora=kind == "dora",
            init="linear" if kind != "dora" else "kaiming",
            generator=torch.Generator().manual_seed(0),
        )
    return (made.double() if kind in ("full", "lora", "dora") else made).train()


def rows(count: int) -> list[list[Example]]:
    """Of unequal length; the first token is given, the others are taught, but for every fifth."""
    drawn = torch.Generator().manual_seed(count)
    made = []
    for row in range(count):
        tokens = torch.randint(131, (3 + 2 * row,), generator=drawn)
        taught = torch.arange(len(tokens)) % 5 > 0
        made.append([Example(tokens, taught, f"row {row}")])
    return made


def gradients(
    how: Parallel, kind: str, count: int, size: int, fields: dict[str, Any]
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, norm, and every gradient of `count` rows, `size` at a time, before it is cut to length 1."""
    made = model(kind, **fields)
    made.recompute = kind == "int8"  # blocks are gathered once more then
    measured = spread(TokenLoss(made), how)
    loss = accumulate(measured, ranks.own_parts(rows(count), size))
    trained = {name: x for name, x in made.named_parameters() if x.requires_grad}
    found = {name: whole(x.grad).clone() for name, x in trained.items() if x.grad is not None}
    assert found.keys() == trained.keys()
    return loss, clip_gradients(list(trained.values()), 1.0), found


def sums_of_gradients(count: int, size: int) -> int:
    """How often DDP sums a bucket over the ranks in a step."""
    measured: Any = spread(TokenLoss(model("full")), "ddp")
    seen: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are text
        seen.append(bucket.index())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0] / 2)

    measured.register_comm_hook(None, hook)
    accumulate(measured, ranks.own_parts(rows(count), size))
    return len(seen)


def loss_that_is_none_on_one_rank(how: Parallel) -> str:
    """What is said where rank 1 alone has a row that gives a NaN."""
    measured = spread(TokenLoss(model("full")), how)
    parts = ranks.own_parts(rows(2), 1)
    if ranks.number() == 1:
        measured.register_forward_hook(lambda module, inputs, loss: loss * float("nan"))
    try:
        accumulate(measured, parts)
    except NumericsError as error:
        return str(error)
    return ""


def codes(how: Parallel, width: int) -> dict[str, Tensor]:
    """The state of AdamW8 after three steps of a model of that width, in eight bits wherever there are 256 numbers."""
    made = model("full", hidden_size=width, vocab_size=128).float()
    measured = spread(TokenLoss(made), how)
    optimizer = AdamW8([{"params": list(made.parameters()), "smallest": 256}], lr=1e-3)
    for _ in range(3):
        accumulate(measured, ranks.own_parts(rows(4), 2))
        optimizer.step()
        optimizer.zero_grad()
    return {
        f"{name}.{key}": whole(x).clone()
        for name, p in made.named_parameters()
        for key, x in optimizer.state[p].items()
    }


def why_no_codes(width: int) -> str:
    """What AdamW8 says of a model of that width under FSDP."""
    try:
        codes("fsdp", width)
    except InputError as error:
        return str(error)
    return ""


def overflow_on_one_rank(how: Parallel) -> tuple[bool, float]:
    """Whether the weights stayed as they were, and the loss scale, which was 2^16, after a step of fp16."""
    made = model("full").float()
    measured = spread(TokenLoss(made), how)
    trained = list(made.parameters())
    scale, optimizer = torch.amp.GradScaler("cpu"), torch.optim.AdamW(trained, lr=1.0, fused=True)
    before = [local(x).clone() for x in trained]
    accumulate(measured, ranks.own_parts(rows(2), 1), scale=scale)
    if how == "ddp" or ranks.number() == 1:  # a gradient that is whole overflows on all of them
        assert trained[0].grad is not None
        local(trained[0].grad).fill_(float("inf"))
    scale.unscale_(optimizer)
    scale.step(optimizer)
    scale.update()
    return all(torch.equal(local(x), y) for x, y in zip(trained, before, strict=True)), scale.get_scale()


def shares(how: Parallel, kind: str) -> tuple[int, int]:
    """Bytes of parameters that this rank keeps between steps, and of the whole model."""
    made = model(kind)
    all_of_it = sum(x.nbytes for x in made.parameters())
    measured = spread(TokenLoss(made), how)
    accumulate(measured, ranks.own_parts(rows(4), 2))
    with torch.no_grad():
        measured(ranks.own_parts(rows(2), 1)[0], 1)  # as an evaluation leaves them
    parts: list[Any] = list(made.parameters())
    return sum((x.to_local() if hasattr(x, "to_local") else x).nbytes for x in parts), all_of_it


@contextlib.contextmanager
def signalled(step: int, rank: int) -> Iterator[None]:
    """Ctrl-C, as one rank alone sees it, in the middle of a step."""
    plain = Progress.update

    def update(self: Progress, done: float, **seen: Any) -> None:
        plain(self, done, **seen)
        if done == step and ranks.number() == rank:
            signal.raise_signal(signal.SIGINT)

    with patch.object(Progress, "update", update):
        yield


def fine_tune(recipe: sft.Sft) -> dict[str, Any]:
    """The script's `main`; a rank that is not the first must write no file."""
    with contextlib.ExitStack() as forbidden:
        for place in ("atomic", "training.state") if ranks.number() else ():
            unused = AssertionError("rank 1 writes")
            forbidden.enter_context(patch(f"minillm.{place}.atomic_file", side_effect=unused))
        return sft.main(recipe)


def fine_tune_until(recipe: sft.Sft, step: int, rank: int) -> str:
    """`main`, interrupted on one rank; what it said, or nothing where the other rank speaks."""
    with signalled(step, rank):
        try:
            sft.main(recipe)
        except Interrupted as stop:
            return str(stop)
    return ""
