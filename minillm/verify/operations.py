"""The named operations of a decoder, in the order in which they run, and what each one reads.

The names are ours; a trace of transformers is recorded under the same ones. N counts layers from 0:

    embed                            rows of the embedding                                          (B, T, D)
    rotary.cos, rotary.sin           one angle for each position and pair                           (B or 1, T, d)
    blocks.N.attention_norm          what attention reads                                           (B, T, D)
    blocks.N.attention.q_proj        also k_proj, v_proj                                            (B, T, H E or G E)
    blocks.N.attention.q_rotated     also k_rotated; none with ALiBi                                (B, H or G, T, E)
    blocks.N.attention.scores        q k / sqrt(E) and ALiBi; -inf where a query may not look       (B, H, T, S)
    blocks.N.attention.weights       their softmax                                                  (B, H, T, S)
    blocks.N.attention.mixed         values, weighted and side by side: what o_proj reads           (B, T, H E)
    blocks.N.attention.o_proj                                                                       (B, T, D)
    blocks.N.residual                x + attention; sequential blocks only                          (B, T, D)
    blocks.N.mlp_norm                none where a parallel block has one norm                       (B, T, D)
    blocks.N.mlp.gate_proj, up_proj  no gate in a plain feed-forward                                (B, T, F)
    blocks.N.mlp.inner               act(gate) * up, or act(up): what down_proj reads               (B, T, F)
    blocks.N.mlp.down_proj                                                                          (B, T, D)
    blocks.N                         the stream behind the layer                                    (B, T, D)
    norm                             the last norm                                                  (B, T, D)
    logits                                                                                          (B, T, V)

A parameter has the name of its operation and a leaf: `blocks.0.attention.k_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minillm.config import DecoderConfig


@dataclass(frozen=True)
class Operation:
    """One step: the formula `kind` (a method of `minillm.verify.reference.Formula`) of what `inputs` name."""

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    layer: int | None = None

    @property
    def short(self) -> str:
        """The name without its layer and module: `q_proj`, `weights`; `output` for a whole block.

        >>> Operation("blocks.3.attention.q_proj", "linear", layer=3).short
        'q_proj'
        >>> Operation("blocks.3.attention.q_proj.weight", "gradient", layer=3).short
        'q_proj.weight'
        """
        if self.name == f"blocks.{self.layer}":
            return "output"
        *_, before, last = ("", *self.name.split("."))
        return f"{before}.{last}" if last in ("weight", "bias") else last


def operations(config: DecoderConfig) -> list[Operation]:
    """All operations of one forward without a cache, in execution order.

    >>> tiny = DecoderConfig(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_size=4,
    ...                      ffn_size=16, context=32)
    >>> [op.name for op in operations(tiny)][:4]
    ['embed', 'rotary.cos', 'rotary.sin', 'blocks.0.attention_norm']
    """
    return list(_operations(config))


def _operations(config: DecoderConfig) -> Iterator[Operation]:
    yield Operation("embed", "embed")
    if config.position == "rotary":
        yield Operation("rotary.cos", "cosine")
        yield Operation("rotary.sin", "sine")
    x = "embed"
    for layer in range(config.num_layers):
        for name, kind, inputs in _block(config, f"blocks.{layer}", x):
            yield Operation(name, kind, inputs, layer)
        x = f"blocks.{layer}"
    yield Operation("norm", "norm", (x,))
    yield Operation("logits", "logits", ("norm",))


_Step = tuple[str, str, tuple[str, ...]]


def _block(config: DecoderConfig, block: str, x: str) -> Iterator[_Step]:
    attention, normed = f"{block}.attention", f"{block}.attention_norm"
    yield normed, "norm", (x,)
    yield from _attention(config, attention, normed)
    attended = f"{attention}.o_proj"
    if config.block == "sequential":
        residual = f"{block}.residual"
        yield residual, "add", (x, attended)
        yield f"{block}.mlp_norm", "norm", (residual,)
        yield from _mlp(config, f"{block}.mlp", f"{block}.mlp_norm")
        yield block, "add", (residual, f"{block}.mlp.down_proj")
        return
    if config.parallel_norms == 2:
        normed = f"{block}.mlp_norm"
        yield normed, "norm", (x,)
    yield from _mlp(config, f"{block}.mlp", normed)
    yield block, "parallel_add", (x, f"{block}.mlp.down_proj", attended)


def _attention(config: DecoderConfig, name: str, x: str) -> Iterator[_Step]:
    q, k, v = (f"{name}.{letter}_proj" for letter in "qkv")
    for projection in (q, k, v):
        yield projection, "linear", (x,)
    if config.position == "rotary":
        for letter, projection in (("q", q), ("k", k)):
            yield f"{name}.{letter}_rotated", "rotate", (projection, "rotary.cos", "rotary.sin")
        q, k = f"{name}.q_rotated", f"{name}.k_rotated"
    scores, weights, mixed = (f"{name}.{step}" for step in ("scores", "weights", "mixed"))
    yield scores, "scores", (q, k)
    yield weights, "weights", (scores,)
    yield mixed, "mixed", (scores, v)
    yield f"{name}.o_proj", "linear", (mixed,)


def _mlp(config: DecoderConfig, name: str, x: str) -> Iterator[_Step]:
    gate, up, inner = (f"{name}.{step}" for step in ("gate_proj", "up_proj", "inner"))
    gated = config.mlp == "gated"
    if gated:
        yield gate, "linear", (x,)
    yield up, "linear", (x,)
    yield inner, "inner", (gate, up) if gated else (up,)
    yield f"{name}.down_proj", "linear", (inner,)
