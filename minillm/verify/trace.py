"""Every named operation of a `Decoder`, recorded while it runs, without the model knowing.

    with trace(model) as recorded:
        model(tokens)
    recorded["blocks.0.attention.scores"]            # (B, H, T, S); names: minillm.verify.operations

Modules are watched by forward hooks, attention's inside by `AttentionCalls`. Tensors are copies, detached, on the
model's device. What is computed does not change: the same calls in the same order on the same tensors; but with a cache
attention runs through torch's kernel instead of ours, which nobody could watch.

A trace of all of a 7B over 64 tokens takes about 100 MB; `only` keeps some of it, `statistics` keeps six numbers of
each tensor instead of its values and so needs no memory at any length. One forward without a cache is what can be
compared; a second forward begins the trace anew, so behind a loop of decoding steps it holds the last one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from minillm.atomic import write_atomically
from minillm.config import DecoderConfig
from minillm.errors import InputError
from minillm.model import Decoder
from minillm.ops import native
from minillm.verify.attention_calls import AttentionCalls


class Take(Protocol):
    """Keeps x under a name. of: the tensor of autograd's graph that x comes from; pick: its gradient -> that of x."""

    def __call__(
        self, name: str, x: Tensor, *, of: Tensor | None = None, pick: Callable[[Tensor], Tensor] = ...
    ) -> None: ...


def _all(gradient: Tensor) -> Tensor:
    return gradient


class Statistics(NamedTuple):
    """What is kept of a tensor where its values are not."""

    shape: tuple[int, ...]
    mean: float
    rms: float
    least: float
    largest: float
    not_finite: int  # -inf of hidden scores not counted

    @staticmethod
    def of(x: Tensor) -> Statistics:
        """The numbers of one tensor, over its finite values."""
        finite = x[x.isfinite()].double()
        bad = int((~x.isfinite() & (x != -torch.inf)).sum())
        if not finite.numel():
            return Statistics(tuple(x.shape), 0.0, 0.0, 0.0, 0.0, bad)
        mean, rms, least, largest = finite.mean(), finite.square().mean().sqrt(), finite.min(), finite.max()
        return Statistics(tuple(x.shape), float(mean), float(rms), float(least), float(largest), bad)


@dataclass
class Trace(Mapping[str, Tensor]):
    """name -> tensor, in the order of recording; what ran is beside it.

    tokens (B, T) int64 and keep (B, T) bool are those of the forward; `gradients` is filled by `trace(gradients=True)`
    once backward ran, `statistics` by `trace(statistics=True)`. about: free text by key (who, versions, dtype).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    keep: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def begin(self, tokens: Tensor, keep: Tensor | None) -> None:
        """Forget everything: a forward of these tokens starts."""
        self.tensors.clear()
        self.statistics.clear()
        self.gradients = {}  # a backward from what ran before goes on to write into the old one
        self.tokens = tokens.detach().clone()
        self.keep = torch.ones_like(tokens, dtype=torch.bool) if keep is None else keep.clone()

    def save(self, path: str | Path) -> None:
        """Write everything but statistics to one safetensors file, which `Trace.load` reads."""
        from safetensors.torch import save  # not at the top: `import minillm` stays light

        kept = {f"value/{name}": x for name, x in self.tensors.items()}
        kept |= {f"gradient/{name}": x for name, x in self.gradients.items()}
        kept |= {f"input/{name}": x for name in ("tokens", "keep") if (x := getattr(self, name)) is not None}
        ready = {name: x.cpu().contiguous() for name, x in kept.items()}
        about = {"format": _FORMAT, "order": json.dumps(list(self.tensors)), "about": json.dumps(self.about)}
        write_atomically(path, save(ready, metadata=about))

    @staticmethod
    def load(path: str | Path) -> Trace:
        """A trace that `save` wrote. Raises InputError for any other file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise InputError(
                        f"{path}: is no trace that minillm saved; make one with `minillm verify --save-trace`"
                    )
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read as a trace ({error}); save it again") from error
        parts: dict[str, dict[str, Tensor]] = {"value": {}, "gradient": {}, "input": {}}
        for name, x in found.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = x
        values = {name: parts["value"][name] for name in json.loads(about["order"])}
        tokens, keep = (parts["input"].get(name) for name in ("tokens", "keep"))
        return Trace(values, tokens, keep, parts["gradient"], about=json.loads(about["about"]))


_FORMAT = "minillm trace 1"


@contextmanager
def trace(
    model: Decoder,
    *,
    only: Callable[[str], bool] | None = None,
    statistics: bool = False,
    gradients: bool = False,
) -> Iterator[Trace]:
    """Record the operations of `model` while the block runs; the trace stays when it ends.

    only: which names to keep, `only=lambda name: name.startswith("blocks.3.")`. statistics: six numbers of each tensor
    in `recorded.statistics` instead of its values. gradients: after a backward, `recorded.gradients` has that of each
    recorded tensor which autograd knows, zero where none came by; scores and weights of a fused kernel have none.
    """
    recorded = Trace()
    with watching(model, recorded, sink(recorded, only=only, statistics=statistics, gradients=gradients)):
        yield recorded


def sink(
    recorded: Trace, *, only: Callable[[str], bool] | None = None, statistics: bool = False, gradients: bool = False
) -> Take:
    """A function that keeps what it is given under a name, the first time in a forward; options as in `trace`."""

    def take(name: str, x: Tensor, *, of: Tensor | None = None, pick: Callable[[Tensor], Tensor] = _all) -> None:
        if name in recorded.tensors or name in recorded.statistics or (only is not None and not only(name)):
            return
        if statistics:
            recorded.statistics[name] = Statistics.of(x.detach())
            return
        recorded.tensors[name] = x.detach().clone()  # a clone: some code adds to a module's output in place
        source = x if of is None else of
        if gradients and source.requires_grad:
            recorded.gradients[name] = x.detach().new_zeros(()).expand(x.shape)  # one number, until backward comes by
            kept = recorded.gradients
            source.register_hook(lambda gradient: _add(kept, name, pick(gradient.detach())))

    return take


def gradient_of(parameter: Tensor) -> Tensor:
    """What backward left in it; zeros, as one number, where it left nothing."""
    return parameter.detach().new_zeros(()).expand(parameter.shape) if parameter.grad is None else parameter.grad


def _add(gradients: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    gradients[name] = gradients[name] + gradient


@contextmanager
def watching(model: Decoder, recorded: Trace, take: Take) -> Iterator[None]:
    """Hooks on every module of a Decoder; gone when the block ends."""
    calls = AttentionCalls()
    hooks: list[Any] = []

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded.begin(args[0], kwargs.get("keep"))

    hooks.append(model.register_forward_pre_hook(begin, with_kwargs=True))
    hooks += [after(model.embed, "embed", take), after(model.norm, "norm", take), after(model, "logits", take)]
    if model.rotary is not None:
        hooks.append(
            model.rotary.register_forward_hook(lambda _, args, out: take_rotary(take, out[0][:, 0], out[1][:, 0]))
        )
    for layer, block in enumerate(model.blocks):
        hooks += _watch_block(block, f"blocks.{layer}", calls, take, model.config)
    try:
        with calls, native.aside():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _watch_block(block: Any, name: str, calls: AttentionCalls, take: Take, config: DecoderConfig) -> Iterator[Any]:
    attention, mlp = block.attention, block.mlp
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield after(getattr(attention, part), f"{name}.attention.{part}", take)
    for part in ("gate_proj", "up_proj", "down_proj"):
        if hasattr(mlp, part):
            yield after(getattr(mlp, part), f"{name}.mlp.{part}", take)
    yield before(attention.o_proj, f"{name}.attention.mixed", take)
    yield before(mlp.down_proj, f"{name}.mlp.inner", take)
    yield from watch_attention(attention, f"{name}.attention", calls, take, config)
    yield after(block.attention_norm, f"{name}.attention_norm", take)
    if block.mlp_norm is not None:
        yield after(block.mlp_norm, f"{name}.mlp_norm", take)
        if config.block == "sequential":
            yield before(block.mlp_norm, f"{name}.residual", take)
    yield after(block, name, take)


def watch_attention(
    module: nn.Module, name: str, calls: AttentionCalls, take: Take, config: DecoderConfig
) -> Iterator[Any]:
    """Hooks that record what happens inside one attention module."""

    def finish(*_: Any) -> None:
        seen = calls.finish(config.num_heads, config.num_kv_heads)
        if seen is None:
            return
        if config.position == "rotary":
            take(f"{name}.q_rotated", seen.q)
            take(f"{name}.k_rotated", seen.k, of=seen.source, pick=seen.to_k)
        take(f"{name}.scores", seen.scores)
        take(f"{name}.weights", seen.weights)

    yield module.register_forward_pre_hook(lambda *_: calls.start())
    yield module.register_forward_hook(finish)


def take_rotary(take: Take, cos: Tensor, sin: Tensor) -> None:
    """cos, sin (B or 1, T, d)."""
    take("rotary.cos", cos)
    take("rotary.sin", sin)


def after(module: nn.Module, name: str, take: Take) -> Any:
    """A hook that takes a module's output (its first, if it returns several)."""
    return module.register_forward_hook(lambda _, args, out: take(name, out[0] if isinstance(out, tuple) else out))


def before(module: nn.Module, name: str, take: Take) -> Any:
    """A hook that takes a module's input."""
    return module.register_forward_pre_hook(lambda _, args: take(name, args[0]))
