"""Bytes of what a pass through the model makes: what autograd keeps, and what is there for a moment.

Kept for the backward pass, by one block, in numbers a token (D, H, G, E, F as in `minillm.model`); each line is what
one operation of the model's code saves, and a tensor that two of them save counts once:

    RMSNorm       D x · D out, the linears' input                           + 1 of 4 bytes
    LayerNorm     D x · D out                                               + 2
    attention     H E q · G E k · G E v, after rotation · H E out           + 2 H of 4 bytes (softmax: largest, sum)
                  fused kernels: no (T, T) scores. ALiBi: torch's, H of 4 bytes; its mask, H T T, once for all blocks
    gated mlp     F gate · F up · F product                                 but for silu: F act(gate); relu: no gate
    plain mlp     F up · F act(up)                                          relu: no up

RMSNorm and SwiGLU keep so little as their backward passes are written by hand (`minillm.ops.lean`). A sequential block
has two norms, a parallel one or two that share x. So Llama: 4 D + 2 H E + 2 G E + 3 F, and Falcon-7B: 2 D + 2 H E +
2 G E + 2 F.

Where only adapters are trained, a frozen linear keeps no input, and what comes before the first adapter of all keeps
nothing. By hand as well (`minillm.lora.as_one`), in the model's format, not the adapters':

    adapter       K its linear's input · R between A and B
    down_proj's   F gate · F up · R                                         no F product: computed again, for silu

After the blocks, where the head gives logits (`minillm.losses.chunked`), n = B (T - 1) predicting tokens:

    norm          as above, but nobody keeps D out
    loss          D gradient of out · 8 bytes of its place, for each of n   V D of 4 bytes: the head's gradient, trained
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minillm.config import DecoderConfig
from minillm.plan.use import Use

#: Numbers a head and token that plain causal attention keeps of its softmax, with the native kernels; torch's keeps 1,
#: where they do not serve.
STATISTICS = 2


@dataclass
class _Tape:
    """Tensors that autograd keeps, by name: bytes a token. `live` says that a gradient flows into an operation."""

    config: DecoderConfig
    use: Use
    targets: tuple[str, ...]
    kept: dict[str, int] = field(default_factory=dict)

    def keep(self, name: str, numbers: int, *, bytes_each: int | None = None) -> None:
        self.kept[name] = numbers * (self.use.number if bytes_each is None else bytes_each)

    def linear(self, name: str, source: str, width: int, live: bool) -> bool:
        if self.use.full:
            self.keep(source, width)
        elif name in self.targets:
            self.keep(source, width)
            self.keep(f"{name}.down", self.use.lora_rank or 0)
        return live or self.use.full or name in self.targets

    def norm(self, name: str, source: str, live: bool) -> bool:
        if live:
            self.keep(source, self.config.hidden_size)
        if live and self.config.norm == "layer":
            self.keep(f"{name}.statistics", 2)
        elif live:
            self.keep(f"{name}.statistics", 1, bytes_each=4)
        return live

    def attention(self, source: str, live: bool) -> bool:
        config = self.config
        all_heads, all_groups = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        flows = [self.linear(name, source, config.hidden_size, live) for name in ("q_proj", "k_proj", "v_proj")]
        if any(flows):
            self.keep("q", all_heads)
            self.keep("k", all_groups)
            self.keep("v", all_groups)
            self.keep("attended", all_heads)
            each = STATISTICS if config.position == "rotary" else 1
            self.keep("softmax", each * config.num_heads, bytes_each=4)
        return self.linear("o_proj", "attended", all_heads, any(flows))

    def mlp(self, source: str, live: bool) -> bool:
        config = self.config
        width, inner = config.hidden_size, config.ffn_size
        first, by_hand = "gate" if config.mlp == "gated" else "up", config.activation == "silu"
        live_first = self.linear(f"{first}_proj", source, width, live)
        if live_first:  # relu's gradient needs its result, those of the others their input
            self.keep("activated" if config.activation == "relu" else first, inner)
        if config.mlp == "plain":
            return self.linear("down_proj", "activated", inner, live_first)
        live_up = self.linear("up_proj", source, width, live)
        again = by_hand and "down_proj" in self.targets and (live_first or live_up)
        if live_up or again:
            self.keep("gate" if by_hand else "activated", inner)
        if live_first or again:
            self.keep("up", inner)
        if again:
            self.keep("down_proj.down", self.use.lora_rank or 0)
            return True
        return self.linear("down_proj", "product", inner, live_first or live_up)

    def block(self, live: bool) -> bool:
        live_in = self.norm("attention_norm", "x", live)
        if self.config.block == "sequential":
            live = self.attention("attention_norm.out", live_in) or live
            return self.mlp("mlp_norm.out", self.norm("mlp_norm", "x2", live)) or live
        attended = self.attention("attention_norm.out", live_in)
        if self.config.parallel_norms == 1:
            return self.mlp("attention_norm.out", live_in) or attended or live
        return self.mlp("mlp_norm.out", self.norm("mlp_norm", "x", live)) or attended or live


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps, and what its backward pass needs beside them.

    first, block: of the first block and of each other one. entry: the input of a block, all that checkpointing keeps of
    it. again: what computing a block again adds to that. positions: rotation or mask. end: last norm, token ids, and
    what the loss keeps, but for the head's gradient. working: see `_working_numbers`.
    """

    first: int
    block: int
    entry: int
    again: int
    positions: int
    end: int
    working: int


def kept_by_autograd(config: DecoderConfig, use: Use, targets: tuple[str, ...]) -> Kept:
    """The module's table for B · T tokens."""
    tokens = use.batch * use.tokens(config)
    first, block, end = (_Tape(config, use, targets) for _ in range(3))
    live = first.block(live=use.full)
    block.block(live)
    end.norm("norm", "x", live)
    at_end = tokens * 8 * use.full  # where the embedding is trained its tokens: int64
    if config.head == "lm":
        at_end += predicting(config, use) * (use.number * config.hidden_size + 8)
    else:
        end.linear("lm_head", "hidden", config.hidden_size, live)
        at_end += tokens * 8  # targets
    return Kept(
        first=tokens * sum(first.kept.values()),
        block=tokens * sum(block.kept.values()),
        entry=tokens * use.number * config.hidden_size,
        again=tokens * sum(size for name, size in block.kept.items() if name != "x"),
        positions=position_bytes(config, use),
        end=tokens * sum(end.kept.values()) + at_end,
        working=tokens * (use.number * _working_numbers(config) - block.kept.get(_let_go(config), 0)),
    )


def predicting(config: DecoderConfig, use: Use) -> int:
    """n, the tokens of a batch that predict another: all but the last of each row."""
    return use.batch * (use.tokens(config) - 1)


def _working_numbers(config: DecoderConfig) -> int:
    """Numbers a token that an mlp's backward pass adds to what is kept, at its widest: D + 3 F gated, D + 2 F plain.

    D gradient of the residual stream · gated: F of the product, F of act(gate), F of up · plain: F of act(up), F of up.
    The input of down_proj has been let go by then.
    """
    return config.hidden_size + (3 if config.mlp == "gated" else 2) * config.ffn_size


def _let_go(config: DecoderConfig) -> str:
    if config.mlp == "gated":
        return "product"
    return "" if config.activation == "relu" else "activated"  # relu's gradient still needs its result


def position_bytes(config: DecoderConfig, use: Use) -> int:
    """cos and sin (1, 1, T, d), or ALiBi's mask (1, H, T, T); one for all blocks and rows."""
    length = use.tokens(config)
    if config.position == "rotary":
        return 2 * length * config.rotary_dim * use.number
    return config.num_heads * length * length * use.number


def forward_bytes(config: DecoderConfig, use: Use) -> int:
    """The most that is there at once while a prompt of B · T tokens is read, without autograd, in numbers a token:

    norm        D x + D unit + D out                                          RMSNorm; in bf16, 2 D of 4 bytes more
    attention   D x + D norm + H E q + G E k + G E v + the larger of 3 H E (turning q) and H E + 3 G E (turning k)
    mlp         D x + D x after attention + D norm + 4 F                      gated; 2 F plain
                parallel: D attended in place of x after attention, and D more with two norms
    """
    number, width = use.number, config.hidden_size
    heads, groups = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    turning = max(3 * heads, heads + 3 * groups) if config.position == "rotary" else heads
    attention = 2 * width + heads + 2 * groups + turning
    extra = config.block == "parallel" and config.parallel_norms == 2
    mlp = (4 if extra else 3) * width + max((4 if config.mlp == "gated" else 2) * config.ffn_size, width)
    norm = number * 3 * width + (2 * 4 * width if config.norm == "rms" and number < 4 else 0)
    if config.block == "sequential":
        norm += number * width  # x before and after attention
    return use.batch * use.tokens(config) * max(number * max(attention, mlp), norm) + position_bytes(config, use)
