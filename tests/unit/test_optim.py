"""Which parameters decay, the schedule at its corners, and the weights training starts from."""

from __future__ import annotations

import math

import pytest
import torch

from minillm.config import DecoderConfig
from minillm.model import Decoder
from minillm.model.init import initialise
from minillm.training.optim import adamw, parameter_groups, warmup_cosine

LLAMA = DecoderConfig(
    vocab_size=300, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_size=16, ffn_size=128, context=16
)
FALCON = DecoderConfig(
    **(vars(LLAMA) | {"norm": "layer", "mlp": "plain", "attention_bias": True, "mlp_bias": True, "family": "falcon"})
)


@pytest.mark.parametrize(
    ("done", "expected"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.55, 0.6), (1.0, 0.2), (1.5, 0.2)]
)
def test_schedule_at_its_corners(done: float, expected: float) -> None:
    assert warmup_cosine(done, warmup=0.1, floor=0.2) == pytest.approx(expected, abs=1e-15)


def test_schedule_without_warmup_starts_at_the_peak_and_only_falls() -> None:
    values = [warmup_cosine(step / 100, warmup=0.0) for step in range(101)]
    assert values[0] == 1.0 and values == sorted(values, reverse=True) and values[-1] == 0.0
    assert warmup_cosine(1.0, warmup=1.0) == 1.0


@pytest.mark.parametrize("tied", [False, True])
def test_only_matrices_of_linear_layers_decay(tied: bool) -> None:
    model = Decoder(DecoderConfig(**(vars(FALCON) | {"tied_embeddings": tied})))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert "embed.weight" in spared and ("lm_head.weight" in decayed) != tied
    assert all(name.endswith("proj.weight") or name == "lm_head.weight" for name in decayed)
    assert {name for name in spared if name.endswith("proj.weight")} == set()


def test_frozen_parameters_are_left_alone() -> None:
    model = Decoder(LLAMA)
    model.embed.requires_grad_(False)
    model.blocks[0].attention.q_proj.requires_grad_(False)
    held = {id(p) for group in adamw(model, learning_rate=1.0).param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("config", [LLAMA, FALCON], ids=["llama", "falcon"])
def test_initial_weights_have_the_stated_spread(config: DecoderConfig) -> None:
    model = Decoder(config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    initialise(model, seed=3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert bool((parameter == (0 if name.endswith("bias") else 1)).all()), name
            continue
        branch = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.02 / math.sqrt(2 * config.num_layers) if branch else 0.02
        # mean and spread of n draws are off by std / sqrt(n) and std / sqrt(2 n); five of those
        n = parameter.numel()
        assert abs(parameter.std().item() - expected) < 5 * expected / math.sqrt(2 * n), name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(n), name


def test_initial_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        model = Decoder(LLAMA).to(dtype)
        initialise(model, seed=seed)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    torch.manual_seed(1)
    first = weights(0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    model = Decoder(LLAMA)
    torch.set_rng_state(before)
    initialise(model, seed=0)
    assert torch.equal(torch.get_rng_state(), before), "torch's own random state was touched"
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
    assert torch.equal(first.bfloat16(), weights(0, torch.bfloat16))
