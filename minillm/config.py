"""`DecoderConfig`: the numbers and four choices that make a decoder. The config *is* the model.

A checkpoint family (Llama, Falcon, ...) is a translation into these fields, never a fork of the model:

    choice     one way                               the other
    norm       "rms"        Llama, Mistral           "layer"     Falcon
    position   "rotary"     turn q and k             "alibi"     slope the scores (Falcon-RW)
    mlp        "gated"      down(act(gate x) * up x) "plain"     down(act(up x))
    block      "sequential" attention, then mlp      "parallel"  attention + mlp of the same input (Falcon)

Head counts (H query heads share G key/value heads, H/G each):

    G = H  multi-head          G < H  grouped-query (arXiv 2305.13245)          G = 1  multi-query (arXiv 1911.02150)

    q  | | | |  | | | |        | | | |  | | | |                                  | | | |  | | | |
       | | | |  | | | |         \\\\/     \\\\/                                       \\\\\\\\////
    kv | | | |  | | | |          |        |                                            |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from minillm.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class LinearRope:
    """All rotary frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DynamicRope:
    """theta grows with the sequence once it is longer than the context (NTK-aware)."""

    factor: float


@dataclass(frozen=True)
class Llama3Rope:
    """Long waves divided by `factor`, short ones kept: Llama 3.1 and 3.2."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class YarnRope:
    """The same by a ramp over the frequencies, and longer q and k (arXiv 2309.00071)."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None  # None: from factor, mscale and mscale_all_dim
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class LongRope:
    """A divisor for each frequency, one set up to the original context and one beyond (arXiv 2402.13753)."""

    factor: float
    original_context: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None  # None: from factor and original_context


#: How rotary frequencies are stretched beyond the trained context; formulas in `minillm.model.rope`.
RopeScaling = LinearRope | DynamicRope | Llama3Rope | YarnRope | LongRope


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that shapes a `Decoder`. Sizes are counts of numbers; letters are those of `minillm.model`."""

    vocab_size: int  # V
    hidden_size: int  # D
    num_layers: int
    num_heads: int  # H, query heads
    num_kv_heads: int  # G, key/value heads
    head_size: int  # E; H * E need not equal D
    ffn_size: int  # F
    context: int  # longest sequence the positions were made for, before linear or dynamic stretching
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    position: Literal["rotary", "alibi"] = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_size: int | None = None  # leading numbers of each head that turn; None = all E
    mlp: Literal["gated", "plain"] = "gated"
    activation: Activation = "silu"
    block: Literal["sequential", "parallel"] = "sequential"
    parallel_norms: Literal[1, 2] = 1  # a parallel block's branches share one norm, or have one each
    attention_bias: bool = False
    mlp_bias: bool = False
    separate_bias: bool = False  # round x @ W.T before the bias is added (Falcon), for bitwise bf16
    tied_embeddings: bool = False
    head: Literal["lm", "scalar"] = "lm"  # logits over V, or one number a token (reward, value)
    family: str = "llama"  # the dialect that `minillm.save` writes; the maths never reads it

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; minillm has {', '.join(map(repr, allowed))}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly; "
                "num_heads must be a multiple of num_kv_heads"
            )
        if not (isinstance(self.norm_eps, int | float) and 0 < self.norm_eps < 1):
            raise ConfigError(f"norm_eps is {self.norm_eps!r}; it must lie between 0 and 1, usually 1e-5")
        if self.position == "rotary":
            self._check_rotary()

    def _check_rotary(self) -> None:
        size = self.rotary_dim
        if size % 2 or not 0 < size <= self.head_size:
            raise ConfigError(
                f"rotary_size is {size}; it must be even, at most head_size {self.head_size}: pairs of numbers turn"
            )
        if not self.rope_theta > 1:
            raise ConfigError(f"rope_theta is {self.rope_theta}; it must be above 1, usually 10000 or more")
        if self.rope_scaling is not None:
            self._check_scaling(self.rope_scaling, size)

    def _check_scaling(self, scaling: RopeScaling, size: int) -> None:
        if not scaling.factor >= 1:
            raise ConfigError(f"rope scaling factor is {scaling.factor}; it must be at least 1")
        if isinstance(scaling, DynamicRope) and size == 2:
            raise ConfigError(
                "rotary_size is 2; dynamic rope scaling raises to the power d / (d - 2) and needs 4 or more"
            )
        if isinstance(scaling, Llama3Rope | YarnRope | LongRope) and not scaling.original_context > 1:
            raise ConfigError(
                f"rope scaling original_context is {scaling.original_context}; it must be at least 2 tokens"
            )
        if isinstance(scaling, Llama3Rope) and not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
            raise ConfigError(
                f"rope scaling low_freq_factor is {scaling.low_freq_factor}; it must lie between 0 and "
                f"high_freq_factor {scaling.high_freq_factor}"
            )
        if isinstance(scaling, YarnRope) and not 0 < scaling.beta_slow <= scaling.beta_fast:
            raise ConfigError(
                f"rope scaling beta_slow is {scaling.beta_slow}; it must lie between 0 and "
                f"beta_fast {scaling.beta_fast}"
            )
        if isinstance(scaling, LongRope):
            for name in ("short_factor", "long_factor"):
                divisors = getattr(scaling, name)
                if len(divisors) != size // 2 or not all(divisor > 0 for divisor in divisors):
                    raise ConfigError(
                        f"rope scaling {name} has {len(divisors)} numbers, the least {min(divisors, default=0)}; "
                        f"rotary size {size} needs {size // 2}, all above 0"
                    )

    @property
    def rotary_dim(self) -> int:
        """Numbers of each head that rotary embedding turns."""
        return self.head_size if self.rotary_size is None else self.rotary_size

    @property
    def heads_per_group(self) -> int:
        """Query heads that read the same key/value head, H / G."""
        return self.num_heads // self.num_kv_heads

    @property
    def longest(self) -> int:
        """Tokens a prompt and its answer may have together.

        `context` is already the stretched length where llama3, yarn and longrope write one; with linear and dynamic
        scaling checkpoints leave the trained length there, so the factor is applied here (vicuna-7b-v1.5-16k: 4096 and
        factor 4).
        """
        scaling = self.rope_scaling
        if self.position == "rotary" and isinstance(scaling, LinearRope | DynamicRope):
            return math.floor(self.context * scaling.factor)
        return self.context

    def cache_bytes_per_token(self, bytes_per_number: int) -> int:
        """Bytes that one more token adds to the key/value cache: 2 · layers · G · E numbers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * bytes_per_number


_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffn_size", "context")
_CHOICES: dict[str, tuple[object, ...]] = {
    "norm": ("rms", "layer"),
    "position": ("rotary", "alibi"),
    "mlp": ("gated", "plain"),
    "activation": get_args(Activation),
    "block": ("sequential", "parallel"),
    "parallel_norms": (1, 2),
    "head": ("lm", "scalar"),
}
