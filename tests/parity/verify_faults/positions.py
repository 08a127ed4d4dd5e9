"""Faults of positions, rotary tables and rotation, in our code and in our reading of the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minillm.model import attention, decoder
from minillm.model.rope import rotate
from tests.parity.verify_faults.planted import Bench, Plant, Planted, misread, one_late, output, part, through

# --- positions


def _positions(change: Callable[[Tensor], Tensor]) -> Plant:
    def plant(bench: Bench) -> None:
        right = decoder._positions
        bench.patch.setattr(decoder, "_positions", lambda *args: change(right(*args)))

    return plant


def _pads_counted(positions: Tensor) -> Tensor:
    return torch.arange(positions.shape[1]).expand_as(positions)


def _a_gap(positions: Tensor) -> Tensor:
    return positions + (positions >= 30)


# --- rotary tables and rotation


def _rotary(change: Callable[[Any], None]) -> Plant:
    return lambda bench: change(bench.ours.rotary)


def _table(change: Callable[[Tensor, int], Tensor]) -> Plant:
    """Other frequencies: change(f, d)."""

    def wrong(rotary: Any) -> None:
        rotary._fixed = change(rotary._fixed, 2 * len(rotary._fixed))

    return _rotary(wrong)


def _of_the_width(frequency: Tensor, size: int) -> Tensor:
    """Exponents 2i/D where 2i/d is right."""
    return 10_000.0 ** (-torch.arange(0, size, 2) / 64)


def _no_two(frequency: Tensor, size: int) -> Tensor:
    """Exponents i/d where 2i/d is right."""
    return 10_000.0 ** (-torch.arange(size // 2) / size)


def _tables(change: Callable[[Tensor], Tensor]) -> Plant:
    """Change cos and sin alike."""
    return output(part("rotary"), lambda tables: tuple(map(change, tables)))


def _neighbours(table: Tensor) -> Tensor:
    """f0 f0 f1 f1 .. where f0 f1 .. f0 f1 .. is right."""
    return table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1)


def _angles_in_bfloat16(bench: Bench) -> None:
    def wrong(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angle = positions[:, None, :, None].bfloat16() * bench.ours.rotary._fixed.bfloat16()
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    bench.ours.rotary.forward = wrong


def _rotate(wrong: Callable[[Tensor, Tensor, Tensor], Tensor], heads: int | None = None) -> Plant:
    """Turn in another way; only what has so many heads, if given."""

    def plant(bench: Bench) -> None:
        def chosen(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return wrong(x, cos, sin) if heads in (None, x.shape[1]) else rotate(x, cos, sin)

        bench.patch.setattr(attention, "rotate", chosen)

    return plant


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Meta's pairs (2i, 2i + 1) on Hugging Face's rows."""
    half = cos.shape[-1] // 2
    even, odd, c, s = x[..., ::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)


def _half_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Only the first half of each head, as GPT-NeoX turns a share."""
    size = x.shape[-1] // 2
    return torch.cat((rotate(x[..., :size], cos[..., :size], sin[..., :size]), x[..., size:]), dim=-1)


def _normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


_ROTATED, _K_ROTATED, _SCORES = (f"blocks.0.attention.{name}" for name in ("q_rotated", "k_rotated", "scores"))
#: Some roundings show beyond position 256 only.
_HALF, _LONG = torch.bfloat16, 320

PLACED: dict[str, Planted] = {
    # positions
    "all positions one late": Planted("llama_gqa_8_2", _positions(lambda p: p + 1), "rotary.cos", "positions"),
    "a gap in the positions": Planted("falcon_40b", _positions(_a_gap), "rotary.cos", "positions"),
    "pads counted as positions": Planted("llama_mha", _positions(_pads_counted), "rotary.cos", "positions"),
    "pads counted as positions, ALiBi": Planted("falcon_rw", _positions(_pads_counted), _SCORES, "positions|alibi"),
    "a gap in the positions, ALiBi": Planted("falcon_7b_alibi", _positions(_a_gap), _SCORES, "positions|alibi"),
    # theta and scaling
    "theta 10000 for 1e6": Planted("llama_rope_theta", misread(rope_theta=10_000.0), "rotary.cos", "theta"),
    "theta 10000 for 5e5": Planted("falcon_11b", misread(rope_theta=10_000.0), "rotary.cos", "theta"),
    "theta 1e6 for 10000": Planted("falcon_7b", misread(rope_theta=1e6), "rotary.cos", "theta"),
    "exponents of the model's width": Planted("llama_mha", _table(_of_the_width), "rotary.cos", "theta"),
    "exponents without their 2": Planted("falcon_40b", _table(_no_two), "rotary.cos", "theta"),
    "linear scaling dropped": Planted("llama_rope_linear", misread(rope_scaling=None), "rotary.cos", "scaling"),
    "dynamic scaling dropped": Planted(
        "llama_rope_dynamic", misread(rope_scaling=None), "rotary.cos", "scaling", length=90
    ),
    "llama3 scaling dropped": Planted("llama_rope_llama3", misread(rope_scaling=None), "rotary.cos", "scaling"),
    "yarn scaling dropped": Planted("falcon_rope_yarn", misread(rope_scaling=None), "rotary.cos", "scaling"),
    "longrope scaling dropped": Planted("llama_rope_longrope", misread(rope_scaling=None), "rotary.cos", "scaling"),
    "llama3 factor 32 for 8": Planted(
        "llama_rope_llama3",
        misread(rope_scaling=lambda s: replace(s, factor=32.0)),
        "rotary.cos",
        "scaling|frequencies",
    ),
    "linear factor upside down": Planted("falcon_rope_linear", _table(lambda f, _: f * 4), "rotary.cos", "scaling"),
    "yarn's betas forgotten": Planted(
        "llama_rope_yarn_betas",
        misread(rope_scaling=lambda s: replace(s, beta_fast=32.0, beta_slow=1.0)),
        "rotary.cos",
        "scaling|frequencies",
    ),
    "longrope's short factors beyond the limit": Planted(
        "llama_rope_longrope",
        misread(rope_scaling=lambda s: replace(s, long_factor=s.short_factor)),
        "rotary.cos",
        "scaling|frequencies",
    ),
    "yarn without its stretch": Planted(
        "llama_rope_yarn", _rotary(lambda rotary: setattr(rotary, "_scale", 1.0)), "rotary.cos", "stretch"
    ),
    "yarn's mscale forgotten": Planted(
        "llama_rope_yarn_mscale",
        misread(rope_scaling=lambda s: replace(s, mscale=None, mscale_all_dim=None)),
        "rotary.cos",
        "stretch",
    ),
    # tables
    "frequencies in bfloat16": Planted(
        "llama_gqa_8_2", _table(lambda f, _: through(_HALF)(f)), "rotary.cos", "frequencies_rounded"
    ),
    "frequencies in bfloat16, model too": Planted(
        "falcon_7b",
        _table(lambda f, _: through(_HALF)(f)),
        "rotary.cos",
        "frequencies_rounded",
        dtype=_HALF,
        length=_LONG,
    ),
    "angles in bfloat16": Planted("llama_mha", _angles_in_bfloat16, "rotary.cos", dtype=_HALF, length=_LONG),
    "cos and sin in bfloat16": Planted("falcon_40b", _tables(through(_HALF)), "rotary.cos", "output_rounded"),
    "neighbours share an angle": Planted("llama_mha", _tables(_neighbours), "rotary.cos", "interleaved"),
    "cos and sin exchanged": Planted(
        "mistral", output(part("rotary"), lambda tables: tables[::-1]), "rotary.cos", "swapped"
    ),
    # rotation
    "interleaved rotation": Planted("llama_mha", _rotate(_interleaved), _ROTATED, "interleaved"),
    "interleaved rotation of k only": Planted("falcon_7b", _rotate(_interleaved, heads=1), _K_ROTATED, "interleaved"),
    "nothing rotated": Planted("falcon_40b", _rotate(lambda x, *_: x), _ROTATED, "not_rotated"),
    "k not rotated": Planted("llama_gqa_8_2", _rotate(lambda x, *_: x, heads=2), _K_ROTATED, "not_rotated"),
    "rotated backwards": Planted("llama_mha", _rotate(lambda x, cos, sin: rotate(x, cos, -sin)), _ROTATED, "reversed"),
    "q and k normed": Planted("llama_gqa_8_2", _rotate(lambda x, *r: rotate(_normed(x), *r)), _ROTATED),
    "half of each head rotated": Planted("mistral", _rotate(_half_turned), _ROTATED),
    "rotary_size read as half": Planted("llama_gqa_8_4", misread(rotary_size=4), "rotary.cos", "shape"),
    "keys one token late": Planted(
        "llama_gqa_8_2", _rotate(lambda x, *r: one_late(rotate(x, *r), dim=2), heads=2), _K_ROTATED, "shifted"
    ),
}
