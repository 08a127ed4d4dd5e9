"""The table between checkpoint and model: exact inverses, every name accounted for, Falcon's fused rows in order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minillm.checkpoint import falcon, llama, meta
from minillm.checkpoint.weight_map import Rule, WeightMap
from minillm.config import DecoderConfig
from minillm.errors import CheckpointError
from minillm.model import Decoder

LLAMA = DecoderConfig(
    vocab_size=19,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    ffn_size=24,
    context=32,
)
FALCON = replace(LLAMA, norm="layer", mlp="plain", activation="gelu", block="parallel", family="falcon")
CONFIGS = {
    "llama": LLAMA,
    "llama tied": replace(LLAMA, tied_embeddings=True),
    "llama biases": replace(LLAMA, attention_bias=True, mlp_bias=True),
    "llama scalar": replace(LLAMA, head="scalar"),
    "falcon 7b": replace(FALCON, num_kv_heads=1, tied_embeddings=True),
    "falcon 40b": replace(FALCON, parallel_norms=2),
    "falcon 11b": FALCON,
    "falcon rw": replace(FALCON, num_kv_heads=4, block="sequential", attention_bias=True, mlp_bias=True),
    "falcon scalar": replace(FALCON, head="scalar"),
}


def table(config: DecoderConfig) -> WeightMap:
    return (falcon if config.family == "falcon" else llama).weight_map(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_one_place(name: str) -> None:
    config = CONFIGS[name]
    places = [parameter for rule in table(config).rules for parameter in rule.ours]
    assert sorted(places) == sorted(name for name, _ in Decoder(config).named_parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_join_is_the_inverse_of_split(name: str) -> None:
    check_inverse(table(CONFIGS[name]), CONFIGS[name])


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_join_is_the_inverse_of_split_in_metas_format(name: str) -> None:
    check_inverse(meta.weight_map(CONFIGS[name]), CONFIGS[name])


def check_inverse(weight_map: WeightMap, config: DecoderConfig) -> None:
    parameters = dict(Decoder(config).named_parameters())
    for rule in weight_map.rules:
        joined = rule.join([parameters[name] for name in rule.ours])
        for ours, part in zip(rule.ours, rule.split(joined), strict=True):
            assert torch.equal(part, parameters[ours]) and part.is_contiguous(), ours


@pytest.mark.parametrize("name", ["falcon 7b", "falcon 40b", "falcon rw"])
def test_parts_of_a_fused_weight_share_no_memory(name: str) -> None:
    """Else training or freeing q would touch or keep k and v."""
    config = CONFIGS[name]
    fused = torch.zeros((config.num_heads + 2 * config.num_kv_heads) * config.head_size, 16)
    parts = falcon.split_qkv(fused, config=config)
    for part in parts:
        assert part.untyped_storage().nbytes() == part.nbytes
        part += 1
    assert not fused.any() and all(bool((part == 1).all()) for part in parts)


def test_falcon_rows_are_grouped_by_key_value_head() -> None:
    """H = 4, G = 2, E = 1: rows q0 q1 k0 v0 | q2 q3 k1 v1."""
    config = replace(FALCON, head_size=1, position="alibi")
    q, k, v = falcon.split_qkv(torch.arange(8.0)[:, None], config=config)
    assert (q.flatten().tolist(), k.flatten().tolist(), v.flatten().tolist()) == ([0, 1, 4, 5], [2, 6], [3, 7])


def test_falcon_rows_of_one_key_value_head() -> None:
    """G = 1 (7B): all queries, then k, then v."""
    config = replace(FALCON, head_size=1, num_kv_heads=1, position="alibi")
    q, k, v = falcon.split_qkv(torch.arange(6.0)[:, None], config=config)
    assert (q.flatten().tolist(), k.flatten().tolist(), v.flatten().tolist()) == ([0, 1, 2, 3], [4], [5])


def test_meta_rows_of_two_heads() -> None:
    """E = 4: pairs (0, 1), (2, 3) of each head become (0, 2), (1, 3)."""
    (rows,) = meta.to_half_split(torch.arange(8.0)[:, None], heads=2)
    assert rows.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


RULES = WeightMap((Rule("body.a", ("a",)), Rule("body.b", ("b",)), Rule("head", ("c",))), "body.", (r"old\.\d+",))
PARAMETERS = {name: torch.zeros(1) for name in "abc"}


def test_match_keeps_the_order_of_the_keys_and_drops_by_name() -> None:
    matched = RULES.match(["head", "old.7", "body.b", "body.a"], PARAMETERS, where="here")
    assert list(matched) == ["head", "body.b", "body.a"]


def test_match_takes_a_body_without_its_prefix() -> None:
    assert list(RULES.match(["a", "b", "head"], PARAMETERS, where="here")) == ["a", "b", "head"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["body.a", "body.b"], "here: the checkpoint lacks head; "),
        (["body.a", "body.b", "head", "old.x"], "here: the checkpoint holds old.x, which the config has no place for"),
        (["body.a", "body.bb", "head"], "lacks body.b (nearest: body.bb); it holds body.bb, "),
        ([], "here: the checkpoint lacks body.a, body.b, head; "),
    ],
)
def test_match_names_what_is_left_over(keys: list[str], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        RULES.match(keys, PARAMETERS, where="here")
    assert message in str(caught.value)


def test_match_finds_a_parameter_without_a_rule() -> None:
    with pytest.raises(CheckpointError, match="here: no rule fills d; "):
        RULES.match(["body.a", "body.b", "head"], {**PARAMETERS, "d": torch.zeros(1)}, where="here")
