"""Rotary position embedding (RoPE, arXiv 2104.09864 §3.4.2) and its stretchings to longer contexts.

Numbers i and i + d/2 of a head form a pair, turned by the angle position * f_i (the *half-split* order of Hugging Face
checkpoints; Meta's own files pair 2i with 2i + 1, `minillm.checkpoint.meta` reorders their rows):

    f_i = theta^(-2i/d)   i = 0 .. d/2 - 1                     wavelength 2 pi / f_i, in tokens

    y_i       = x_i cos(p f_i)       - x_(i+d/2) sin(p f_i)
    y_(i+d/2) = x_(i+d/2) cos(p f_i) + x_i sin(p f_i)

Only position *differences* then enter q · k. Stretchings change the f_i, and two of them the length of q and k:

    linear    f / factor                                                    (kaiokendev)
    dynamic   theta' = theta * (factor * L / M - factor + 1)^(d / (d - 2))  (NTK-aware; L = longest row, M = context)
    llama3    long waves / factor, short waves kept, smooth between         (Llama 3.1)
    yarn      the same by a ramp over i, and cos, sin times 0.1 ln(factor) + 1       (arXiv 2309.00071 §3.2-3.4)
    longrope  f_i / short_factor_i up to the original context M0, f_i / long_factor_i beyond, and cos, sin times
              sqrt(1 + ln(factor) / ln(M0))                                  (arXiv 2402.13753)

Frequencies and angles are fp32 always, also in a bf16 model: at position 100,000 a bf16 frequency is wrong by whole
turns. Hence they are no buffer that `.to(bfloat16)` could reach; cos and sin are rounded last.

dynamic and longrope depend on the longest position of the *batch*; keys already cached keep their old turn, as in
transformers. So decoding past the limit differs from one forward over the whole text: that is the method's own flaw.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from minillm.config import DecoderConfig, DynamicRope, LinearRope, Llama3Rope, LongRope, YarnRope
from minillm.ops import block, lean, native


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first d numbers of each head, pass the rest: x (B, H, T, E); cos, sin (B or 1, 1, T, d); d <= E."""
    if block.fast(x) and x.dtype == cos.dtype:
        return block.rotate(x, cos, sin)
    if lean.wanted(x) and native.serves(x) and x.dtype == cos.dtype:
        return lean.rotate(x, cos, sin)
    size = cos.shape[-1]
    turning = x if size == x.shape[-1] else x[..., :size]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin  # (B, H, T, d)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)


class Rotary(nn.Module):
    """positions (B or 1, T) int64 -> cos, sin (B or 1, 1, T, d) in the dtype asked for. Holds no parameters."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        depends_on_length = isinstance(config.rope_scaling, DynamicRope | LongRope)
        self._fixed = None if depends_on_length else frequencies(config, config.context)
        self._scale = attention_factor(config)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequency = self._frequencies_for(positions)
        angle = positions[:, None, :, None].float() * frequency  # (B, 1, T, d/2); a product autocast leaves alone
        angle = torch.cat((angle, angle), dim=-1)  # (B, 1, T, d)
        return (angle.cos() * self._scale).to(dtype), (angle.sin() * self._scale).to(dtype)

    def _frequencies_for(self, positions: Tensor) -> Tensor:
        if self._fixed is None:
            return frequencies(self.config, int(positions.max()) + 1).to(positions.device)
        if self._fixed.device != positions.device:  # computed again, not moved: the meta device keeps no numbers
            self._fixed = frequencies(self.config, self.config.context).to(positions.device)
        return self._fixed


def frequencies(config: DecoderConfig, length: int) -> Tensor:
    """f (d/2,) fp32 on the CPU, for a batch whose longest row has `length` tokens; formulas above."""
    size, theta = config.rotary_dim, config.rope_theta
    exponent = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    match config.rope_scaling:
        case None:
            return 1.0 / theta**exponent
        case LinearRope(factor):
            return 1.0 / theta**exponent / factor
        case DynamicRope(factor):
            stretch = factor * max(length, config.context) / config.context - (factor - 1)
            return 1.0 / (theta * stretch ** (size / (size - 2))) ** exponent
        case Llama3Rope() as scaling:
            return _llama3(1.0 / theta**exponent, scaling)
        case YarnRope() as scaling:
            return _yarn(theta**exponent, theta, scaling)
        case LongRope() as scaling:
            beyond = length > scaling.original_context
            divisor = scaling.long_factor if beyond else scaling.short_factor
            return 1.0 / (torch.tensor(divisor, dtype=torch.float32, device="cpu") * theta**exponent)


def attention_factor(config: DecoderConfig) -> float:
    """What cos and sin are multiplied by, so that scores keep their spread over a longer context; often 1."""
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnRope | LongRope):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if isinstance(scaling, LongRope):
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_context))
    if scaling.mscale and scaling.mscale_all_dim:
        return _yarn_spread(scaling.factor, scaling.mscale) / _yarn_spread(scaling.factor, scaling.mscale_all_dim)
    return _yarn_spread(scaling.factor, 1.0)


def _yarn_spread(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _llama3(frequency: Tensor, scaling: Llama3Rope) -> Tensor:
    """w = wavelength: w > M0/low -> f/factor; w < M0/high -> f; between, s f + (1 - s) f/factor, s rising with 1/w."""
    low, high, trained = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context
    wavelength = 2 * math.pi / frequency
    blend = ((trained / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def _yarn(period: Tensor, theta: float, scaling: YarnRope) -> Tensor:
    """Those that turn over beta_fast times in M0 tokens stay, under beta_slow are divided; a ramp between.

    period (d/2,) is 1/f. Index i turns n times in M0 tokens where i = d ln(M0 / (2 pi n)) / (2 ln theta).
    """
    size = 2 * len(period)

    def index_turning(times: float) -> float:
        return size * math.log(scaling.original_context / (2 * math.pi * times)) / (2 * math.log(theta))

    low, high = index_turning(scaling.beta_fast), index_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero
    ramp = ((torch.arange(size // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return ramp / (scaling.factor * period) + (1 - ramp) / period
