"""What is in memory at the same time: the total is that of the worst moment, not the sum of all parts.

Reading a prompt           weights, adapters, cache, and the widest operation of a block; or the logits after it
A training step, from the second on (the optimizer's moments are then there):

    the loss               all activations · states under the head · a chunk of logits      gradients: the head's
    backward, last block   those of all blocks, and what its mlp's backward pass needs      the head's
    backward, first block  its own, and the same                                            and of all blocks after it
    backward ends          -                                                                all

The logits of a batch are never whole, and their gradients are made with them, a chunk of rows at a time
(`minillm.losses.chunked`); see `_at_loss`. A scalar head's B T values and what its loss makes of them are whole.

Gradients grow while activations go, so that the peak is at one of the ends. With `accumulate` all gradients are there
at every moment. Where the head is tied to the embedding, the gradient comes in two parts: the head's waits from the
loss on, and the embedding's is added to it when the backward pass ends.

Not counted: what the fp32 kernel's copy of a product's left factor takes (M K of 4 bytes of the largest product, once a
process), as little as the scratch of other libraries' products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from minillm.config import DecoderConfig
from minillm.losses.chunked import rows_in_chunk
from minillm.plan.activations import Kept, forward_bytes, kept_by_autograd, predicting
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
    sizes, number, outside = _trained(use, shapes)
    moments = shapes.layers * sum(optimizer_bytes(size, number, use) for size in sizes)
    moments += sum(optimizer_bytes(size, number, use) for size in outside)
    loss = _at_loss(config, use)
    values = 0 if config.head == "lm" else use.batch * use.tokens(config) * use.number  # the loop's name holds them
    there = replace(_resident(use, shapes), optimizer=moments, logits=values)
    kept = kept_by_autograd(config, use, use.targets(shapes.linears))
    at_loss, last, first = _activations(config, use, kept)
    earlier, of_last, of_first, all_of_them = _gradients(config, use, shapes)
    return {
        "when the loss is taken": replace(
            there,
            gradients=earlier + loss.gradients,
            activations=at_loss + loss.activations,
            logits=loss.logits,
        ),
        "in the backward pass, last block": replace(there, gradients=of_last, activations=last),
        "in the backward pass, first block": replace(there, gradients=of_first, activations=first),
        "when the backward pass ends": replace(there, gradients=all_of_them),
    }


def _trained(use: Use, shapes: Shapes) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Sizes of the tensors of a block that are trained, bytes of a number, sizes of those outside the blocks."""
    if use.full:
        return shapes.block, use.number, (shapes.embedding, *shapes.ends)
    return adapter_sizes(shapes, use), 4, ()


def _gradients(config: DecoderConfig, use: Use, shapes: Shapes) -> tuple[int, int, int, int]:
    """Before the loss, in the last block's backward pass, in the first's, at the end."""
    sizes, number, outside = _trained(use, shapes)
    block, everything = number * sum(sizes), number * (shapes.layers * sum(sizes) + sum(outside))
    if not use.full:
        earlier = everything if use.accumulate else 0
        return earlier, earlier, max(earlier, block * (shapes.layers - 1)), everything
    fresh, embedding = number * config.ffn_size * config.hidden_size, number * shapes.embedding  # fresh: of down_proj
    waiting = embedding if config.tied_embeddings and config.head == "lm" else 0
    if use.accumulate:  # each new part beside the sum that it is added to
        during = everything + waiting + fresh
        return everything, during, during, everything + waiting + embedding
    head = number * sum(shapes.ends) + waiting
    return 0, head + fresh, head + block * (shapes.layers - 1) + fresh, everything + waiting


def _activations(config: DecoderConfig, use: Use, kept: Kept) -> tuple[int, int, int]:
    """When the loss is taken, in the last block's backward pass, in the first's."""
    blocks = kept.first + (config.num_layers - 1) * kept.block
    at_loss, last, first = blocks, blocks, kept.first
    if use.checkpointing:
        at_loss = config.num_layers * kept.entry
        last, first = at_loss + kept.again, kept.entry + kept.again
    beside = kept.positions + kept.working
    return at_loss + kept.end + kept.positions, last + beside, first + beside


def _at_loss(config: DecoderConfig, use: Use) -> Parts:
    """What is there beside what autograd keeps, while `minillm.losses.chunked` takes the loss, m rows at a time:

                      in fp32      in 16 bits
        activations   B T D + m D  the same                  states under the head, those of the chunk
        logits        m V          m V, and m V of 4 bytes   their gradient takes their place
        gradients     V D          V D of 4 bytes            where the head is trained

    and in 16 bits, where a chunk's gradient is added to the head's: V D, and V D of 4 bytes, as torch widens what it
    adds to fp32. (fp16 adds in fp32, and takes V D of 2 bytes when that is rounded, after the loss.)

    A scalar head: B T values in the model's format, and three times in fp32.
    """
    tokens, number = use.batch * use.tokens(config), use.number
    if config.head != "lm":
        return Parts(logits=tokens * (number + 3 * 4))
    rows = rows_at_once(config, use)
    logits, head = rows * config.vocab_size, config.vocab_size * config.hidden_size if use.full else 0
    activations = (tokens + rows) * config.hidden_size * number
    if number == 4:
        return Parts(activations=activations, logits=4 * logits, gradients=4 * head)
    added = (2 + 4 if use.dtype == "bfloat16" else 2) * head
    return Parts(activations=activations, logits=(number + 4) * logits, gradients=4 * head + added)


def rows_at_once(config: DecoderConfig, use: Use) -> int:
    """m: all n rows that predict, in as few chunks of at most `rows_in_chunk` as there can be, of one length."""
    count = predicting(config, use)
    chunks = max(math.ceil(count / rows_in_chunk(config.vocab_size, getattr(torch, use.dtype))), 1)
    return max(math.ceil(count / chunks), 1)
