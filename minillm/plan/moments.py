"""What is in memory at the same time: the total is that of the worst moment, not the sum of all parts.

Reading a prompt           weights, adapters, cache, and the widest operation of a block; or the logits after it
A training step, from the second on (the optimizer's moments are then there):

    the loss               all activations · logits, their softmax and two gradients       gradients: none yet
    backward, last block   those of all blocks, and what its mlp's backward pass needs      gradients of the head
    backward, first block  its own, and the same                                            of all blocks after it
    backward ends          logits (the loop's own name still holds them)                    all

Gradients grow while activations go, so that the peak is at one of the ends. With `accumulate` all gradients are there
at every moment. Where the head is tied to the embedding, the gradient comes in two parts and is summed in a third.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from minillm.config import DecoderConfig
from minillm.plan.activations import Kept, forward_bytes, kept_by_autograd
from minillm.plan.use import Use
from minillm.plan.weights import Shapes, adapter_sizes, optimizer_bytes, shapes_of, weight_bytes


@dataclass(frozen=True)
class Parts:
    """Bytes of each kind of tensor."""

    weights: int = 0
    adapters: int = 0
    cache: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Plan:
    """Bytes a model takes.

    whole: each part at its largest. peak: each part at the worst moment, which `moment` names. total: all of the peak.
    parameters: numbers in the model, adapters not counted. read: bytes of the checkpoint on disk. written: bytes that
    training leaves there, the result and a state to go on from.
    """

    parameters: int
    whole: Parts
    peak: Parts
    moment: str
    read: int
    written: int

    @property
    def total(self) -> int:
        return self.peak.total

    def fits(self, available: int) -> bool:
        """Whether the worst moment fits."""
        return self.total <= available


def plan(config: DecoderConfig, use: Use = Use()) -> Plan:  # noqa: B008 (frozen)
    """Memory and disk of a model used so, from its config alone; InputError for a use that contradicts itself.

    >>> tiny = DecoderConfig(vocab_size=9, hidden_size=8, num_layers=3, num_heads=2, num_kv_heads=1, head_size=4,
    ...                      ffn_size=16, context=32, tied_embeddings=True)
    >>> plan(tiny, Use(dtype="float32")).whole.weights, plan(tiny, Use(quantize="int8")).whole.weights
    (7424, 2752)
    """
    shapes = shapes_of(config)
    use.check(config, shapes.linears)
    moments = _training(config, use, shapes) if use.train else _reading(config, use, shapes)
    name, peak = max(moments.items(), key=lambda moment: moment[1].total)
    largest = {part.name: max(getattr(parts, part.name) for parts in moments.values()) for part in fields(Parts)}
    read, adapters = shapes.numbers * use.number, largest["adapters"]
    result, trained = (read, read) if use.full else (adapters, adapters)
    written = result + trained + largest["optimizer"] if use.train else 0
    return Plan(shapes.numbers, Parts(**largest), peak, name, read, written)


def _resident(use: Use, shapes: Shapes) -> Parts:
    adapters = shapes.layers * 4 * sum(adapter_sizes(shapes, use))
    return Parts(weights=weight_bytes(shapes, use), adapters=adapters)


def _reading(config: DecoderConfig, use: Use, shapes: Shapes) -> dict[str, Parts]:
    """Logits are those of each row's last token: B V numbers, and in fp32 for choosing; B T with a scalar head."""
    length, number = use.tokens(config), use.number
    cache = use.batch * length * config.cache_bytes_per_token(number) if config.head == "lm" else 0
    there = replace(_resident(use, shapes), cache=cache)
    answers = config.vocab_size if config.head == "lm" else length
    hidden = use.batch * length * config.hidden_size * number
    return {
        "while the prompt is read": replace(there, activations=forward_bytes(config, use)),
        "when a token is chosen": replace(there, activations=hidden, logits=use.batch * answers * (number + 4)),
    }


def _training(config: DecoderConfig, use: Use, shapes: Shapes) -> dict[str, Parts]:
    sizes, number = (shapes.block, use.number) if use.full else (adapter_sizes(shapes, use), 4)
    outside = (shapes.embedding, *shapes.ends) if use.full else ()
    block, everything = number * sum(sizes), number * (shapes.layers * sum(sizes) + sum(outside))
    moments = shapes.layers * sum(optimizer_bytes(size, number, use) for size in sizes)
    moments += sum(optimizer_bytes(size, number, use) for size in outside)
    there = replace(_resident(use, shapes), optimizer=moments)
    earlier = everything if use.accumulate else 0

    tied = config.tied_embeddings and config.head == "lm" and use.full
    head = number * (sum(shapes.ends) + (shapes.embedding if tied else 0)) if use.full else 0
    parts = (2 if tied else 0) + use.accumulate if use.full else 0  # of the embedding's gradient, beside the whole
    logits, loss = _loss_bytes(config, use)
    kept = kept_by_autograd(config, use, use.targets(shapes.linears))
    at_loss, last, first = _activations(config, use, kept)
    fresh = number * config.ffn_size * config.hidden_size if use.full else 0  # of the block's down_proj
    return {
        "when the loss is taken": replace(there, gradients=earlier, activations=at_loss, logits=loss),
        "in the backward pass, last block": replace(
            there, gradients=max(earlier, head) + fresh, activations=last, logits=logits
        ),
        "in the backward pass, first block": replace(
            there,
            gradients=max(earlier, head + block * (shapes.layers - 1)) + fresh,
            activations=first,
            logits=logits,
        ),
        "when the backward pass ends": replace(
            there, gradients=everything + parts * number * shapes.embedding, logits=logits
        ),
    }


def _activations(config: DecoderConfig, use: Use, kept: Kept) -> tuple[int, int, int]:
    """When the loss is taken, in the last block's backward pass, in the first's."""
    blocks = kept.first + (config.num_layers - 1) * kept.block
    at_loss, last, first = blocks, blocks, kept.first
    if use.checkpointing:
        at_loss = config.num_layers * kept.entry
        last, first = at_loss + kept.again, kept.entry + kept.again
    beside = kept.positions + kept.working
    return at_loss + kept.end + kept.positions, last + beside, first + beside


def _loss_bytes(config: DecoderConfig, use: Use) -> tuple[int, int]:
    """(logits, all at the loss): B T V numbers in the model's format, and three times in fp32.

    Those are log softmax, its gradient, and that of the logits; `minillm.losses.next_token_loss` takes them in fp32.
    """
    answers = use.batch * use.tokens(config) * (config.vocab_size if config.head == "lm" else 1)
    return answers * use.number, answers * (use.number + 3 * 4)
