"""The config refuses what no decoder can be, in one line, and is a value: frozen, equal by content, hashable."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from minillm.config import DynamicRope, LinearRope, Llama3Rope, LongRope, RopeScaling, YarnRope
from minillm.errors import ConfigError
from tests.decoders import config

LONG = LongRope(4.0, 16, short_factor=(1.0,) * 4, long_factor=(4.0,) * 4)

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, "vocab_size is 0; it must be a whole number of at least 1"),
    ({"num_layers": -1}, "num_layers is -1; it must be a whole number of at least 1"),
    ({"hidden_size": 32.0}, "hidden_size is 32.0; it must be a whole number of at least 1"),
    ({"ffn_size": True}, "ffn_size is True; it must be a whole number of at least 1"),
    ({"context": None}, "context is None; it must be a whole number of at least 1"),
    ({"norm": "batch"}, "norm is 'batch'; minillm has 'rms', 'layer'"),
    ({"position": "learned"}, "position is 'learned'; minillm has 'rotary', 'alibi'"),
    ({"mlp": "moe"}, "mlp is 'moe'; minillm has 'gated', 'plain'"),
    ({"activation": "tanh"}, "activation is 'tanh'; minillm has 'silu', 'gelu', 'gelu_tanh', 'relu'"),
    ({"block": "post"}, "block is 'post'; minillm has 'sequential', 'parallel'"),
    ({"parallel_norms": 3}, "parallel_norms is 3; minillm has 1, 2"),
    ({"head": "classifier"}, "head is 'classifier'; minillm has 'lm', 'scalar'"),
    ({"num_kv_heads": 3}, "4 query heads cannot share 3 key/value heads evenly; num_heads must be a multiple"),
    ({"num_kv_heads": 8}, "4 query heads cannot share 8 key/value heads evenly"),
    ({"norm_eps": 0.0}, "norm_eps is 0.0; it must lie between 0 and 1"),
    ({"norm_eps": "1e-5"}, "norm_eps is '1e-5'; it must lie between 0 and 1"),
    ({"rotary_size": 3}, "rotary_size is 3; it must be even, at most head_size 8"),
    ({"rotary_size": 10}, "rotary_size is 10; it must be even, at most head_size 8"),
    ({"rotary_size": 0}, "rotary_size is 0; it must be even"),
    ({"head_size": 7}, "rotary_size is 7; it must be even"),
    ({"rope_theta": 1.0}, "rope_theta is 1.0; it must be above 1"),
    ({"rope_theta": float("nan")}, "rope_theta is nan; it must be above 1"),
    ({"rope_scaling": LinearRope(0.5)}, "rope scaling factor is 0.5; it must be at least 1"),
    ({"rope_scaling": DynamicRope(2.0), "rotary_size": 2}, "rotary_size is 2; dynamic rope scaling"),
    ({"rope_scaling": YarnRope(2.0, 0)}, "rope scaling original_context is 0; it must be at least 2 tokens"),
    ({"rope_scaling": dataclasses.replace(LONG, original_context=1)}, "original_context is 1; it must be at least 2"),
    ({"rope_scaling": Llama3Rope(8.0, 4.0, 4.0, 16)}, "low_freq_factor is 4.0; it must lie between 0 and high_freq"),
    ({"rope_scaling": YarnRope(2.0, 16, beta_slow=0.0)}, "beta_slow is 0.0; it must lie between 0 and beta_fast 32"),
    ({"rope_scaling": YarnRope(2.0, 16, beta_fast=0.5)}, "beta_slow is 1.0; it must lie between 0 and beta_fast 0.5"),
    (
        {"rope_scaling": dataclasses.replace(LONG, long_factor=(1.0,) * 3)},
        "rope scaling long_factor has 3 numbers, the least 1.0; rotary size 8 needs 4, all above 0",
    ),
    (
        {"rope_scaling": dataclasses.replace(LONG, short_factor=(1.0, 1.0, 0.0, 1.0))},
        "rope scaling short_factor has 4 numbers, the least 0.0; rotary size 8 needs 4, all above 0",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_what_no_decoder_can_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rotary_fields_are_not_read_where_nothing_turns() -> None:
    assert config(position="alibi", head_size=7).head_size == 7


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 64),
        (LinearRope(4.0), 256),
        (DynamicRope(1.5), 96),
        (LinearRope(1.99), 127),  # part of a token is no token
        (Llama3Rope(8.0, 1.0, 4.0, 8), 64),
        (YarnRope(4.0, 16), 64),
        (LONG, 64),
    ],
)
def test_longest_text(scaling: RopeScaling | None, longest: int) -> None:
    assert config(rope_scaling=scaling).longest == longest


def test_frozen_and_equal_by_content() -> None:
    one = config(rope_scaling=LONG)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.context = 128  # type: ignore[misc]
    for other in (config(rope_scaling=LONG), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other == one and hash(other) == hash(one)
    assert dataclasses.replace(one, context=65) != one


def test_sizes_that_follow_from_others() -> None:
    assert config().rotary_dim == 8 and config(rotary_size=2).rotary_dim == 2
    assert config(num_heads=6, num_kv_heads=2).heads_per_group == 3


def test_cache_bytes_of_falcon_7b() -> None:
    # 2 (keys and values) * 32 layers * 1 head * 64 numbers * 2 bytes
    falcon = config(num_layers=32, num_heads=71, num_kv_heads=1, head_size=64)
    assert falcon.cache_bytes_per_token(2) == 8192
    assert dataclasses.replace(falcon, num_kv_heads=71).cache_bytes_per_token(2) == 71 * 8192
