"""Adapters against peft: forward, gradients, merged weights, files in both directions, on Llama and Falcon.

Weights of the adapters are drawn at random, B and magnitudes too, so that every part shows. Files go from peft to us
and back; warnings are errors in these tests, peft's about missing keys included.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import minillm
from minillm import lora
from minillm.lora.peft_format import sites
from minillm.model import Decoder
from tests.error import assert_near
from tests.tiny import VARIANTS, build, save

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),  # on a layer without a bias
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # between peft and transformers
]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
FUSED = ["query_key_value"]

LLAMA: dict[str, dict[str, Any]] = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "the architecture's own": {},
    "all linear": {"target_modules": "all-linear", "r": 3},
    "every name": {"target_modules": ATTENTION + MLP, "lora_alpha": 32},
    "regex": {"target_modules": r".*layers\.[01]\.self_attn\.(q|o)_proj"},
    "full name": {"target_modules": ["model.layers.1.mlp.down_proj", "layers.0.self_attn.k_proj"]},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "one layer by pattern": {"target_modules": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"},
    "exclude": {"target_modules": ATTENTION, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "exclude by regex": {"target_modules": ATTENTION, "exclude_modules": r".*\.0\..*"},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True, "r": 4, "lora_alpha": 3},
    "dora": {"target_modules": ATTENTION + MLP, "use_dora": True},
    "dora and rslora": {"target_modules": ["v_proj"], "use_dora": True, "use_rslora": True},
    "rank pattern": {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 5}},
    "alpha pattern": {"target_modules": ATTENTION, "alpha_pattern": {"^model.layers.0.self_attn.o_proj": 1}},
    "both patterns": {
        "target_modules": MLP, "rank_pattern": {"up_proj": 16}, "alpha_pattern": {"up_proj": 64}, "use_rslora": True,
    },
    "retrained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "retrained norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "retrained embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "bias of B": {"target_modules": ATTENTION, "lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "embedding alone": {"target_modules": ["embed_tokens"], "use_rslora": True},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "gaussian": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "default init of linears": {"target_modules": ATTENTION, "init_lora_weights": False},
    "pissa": {"target_modules": ATTENTION, "init_lora_weights": "pissa", "r": 4},
    "olora": {"target_modules": MLP, "init_lora_weights": "olora", "r": 4},
}  # fmt: skip
BIASED: dict[str, dict[str, Any]] = {
    "biases of all": {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "biases of adapted": {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    "dora beside a bias": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "bias of B beside a bias": {"target_modules": ["q_proj"], "lora_bias": True},
}
FALCON: dict[str, dict[str, Any]] = {
    "fused": {"target_modules": FUSED},
    "the architecture's own": {},
    "all linear": {"target_modules": "all-linear", "r": 5},
    "fused dora": {"target_modules": FUSED, "use_dora": True},
    "fused rslora": {"target_modules": [*FUSED, "dense_h_to_4h"], "use_rslora": True},
    "fused bias of B": {"target_modules": FUSED, "lora_bias": True},
    "patterns": {"target_modules": [*FUSED, "dense"], "rank_pattern": {r"h\.1\..*value": 2}},
    "one layer": {"target_modules": FUSED, "layers_to_transform": [1], "layers_pattern": "h"},
    "retrained norm": {"target_modules": FUSED, "modules_to_save": ["ln_f"]},
    "biases": {"target_modules": FUSED, "bias": "all"},
    "biases of adapted": {"target_modules": [*FUSED, "dense"], "bias": "lora_only"},
    "fused pissa": {"target_modules": FUSED, "init_lora_weights": "pissa", "r": 4},
    "fused olora": {"target_modules": "all-linear", "init_lora_weights": "olora", "r": 4},
}
STARTS = ("fused pissa", "fused olora")
CASES = [
    *[("llama", name, fields) for name, fields in LLAMA.items()],
    *[("llama_bias", name, fields) for name, fields in BIASED.items()],
    *[("falcon", name, fields) for name, fields in FALCON.items()],
    *[("falcon_new", name, FALCON[name]) for name in ("fused", "fused dora", "all linear", "fused bias of B")],
    *[("falcon_rw", name, FALCON[name]) for name in ("fused", "biases", "biases of adapted", "fused dora")],
    *[("falcon_new", name, FALCON[name]) for name in STARTS],
    *[("falcon_rw", name, FALCON[name]) for name in STARTS],
]
#: Shapes by a short name.
NAMES = {
    "llama": "llama_gqa_8_2",
    "llama_bias": "llama_all_bias",
    "falcon": "falcon_7b_untied",
    "falcon_new": "falcon_40b_untied",
    "falcon_rw": "falcon_rw_untied",
}
TOKENS = torch.randint(0, 131, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}: {case[1]}")
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Path]:
    """A peft model with random adapters, and the folders of its base and of its adapter."""
    variant, _, fields = request.param
    base = build(VARIANTS[NAMES[variant]])
    save(base, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about biases of B, and tables that are saved too
        model = peft.get_peft_model(base, peft.LoraConfig(**fields)).eval()
        shake(model)
        model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path


def shake(model: nn.Module) -> None:
    """Random numbers for all that is trained; what has a start of its own is moved by a little."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spread = 0.02 if "magnitude" in name or "lora_embedding" in name else 0.1
            parameter.data += spread * torch.randn(parameter.shape, generator=generator)


def ours(folder: Path, adapter: str = "adapter", **options: Any) -> Decoder:
    model = minillm.load_model(folder / "base", dtype="float32")
    lora.load(model, folder / adapter, **options)
    return model


def theirs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


def test_forward_merge_and_files_both_ways(case: tuple[Any, Path]) -> None:
    model, folder = case
    found, expected = ours(folder), theirs(model)
    base = minillm.load_model(folder / "base", dtype="float32")
    with torch.no_grad():
        assert_near(found(TOKENS), expected, 1e-5)
        with lora.disabled(found):
            assert torch.equal(found(TOKENS), base(TOKENS))
        assert float((base(TOKENS) - expected).abs().max()) > 1e-3  # the adapter shows
        merged = lora.merged(found, tokens=TOKENS)
        assert_near(merged.model(TOKENS), expected, 1e-5)
        assert merged.logits_max is not None and merged.logits_max < 1e-4
        lora.save(found, folder / "again")
        again = ours(folder, "again")(TOKENS)
        starts_elsewhere = lora.config_of(found, "default").init in ("pissa", "olora")  # written with twice the rank
        assert_near(again, found(TOKENS), 1e-6 if starts_elsewhere else 0.0)


def test_peft_loads_what_we_save(case: tuple[Any, Path]) -> None:
    model, folder = case
    found = ours(folder)
    lora.save(found, folder / "again")
    base = make_again(folder)
    again = peft.PeftModel.from_pretrained(base, folder / "again").eval()
    assert_near(theirs(again), theirs(model), 1e-5)


def make_again(folder: Path) -> nn.Module:
    import transformers

    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return model.eval()


def test_gradients(case: tuple[Any, Path]) -> None:
    model, folder = case
    found = ours(folder, trainable=True)
    found(TOKENS).square().mean().backward()
    model(TOKENS).logits.square().mean().backward()
    expected = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    checked = 0
    for site in sites(found, "default"):
        adapters = [each for each in site.adapters if each is not None]
        for part, key in site.keys().items():
            name = key if part in ("a", "b", "bias") else f"{key}.weight"
            grads = [getattr(each, part).grad for each in adapters]
            joined = grads[0] if part == "a" else site.rule.join(grads)  # a fused weight has one A here too
            assert_near(joined, expected[name], 2e-5, name)
            checked += 1
    assert checked == sum("lora_" in name for name in expected)


def test_modules_that_are_retrained_by_our_names(tmp_path: Path) -> None:
    save(build(VARIANTS["llama_gqa_8_2"]), tmp_path / "base")
    model = minillm.load_model(tmp_path / "base", dtype="float32")
    lora.add(model, targets=["q_proj"], retrain=["mlp_norm"])
    shake(model)
    lora.save(model, tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(make_again(tmp_path), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_near(theirs(again), model(TOKENS), 1e-5)
        with again.disable_adapter():  # the base's own norms: peft knows that they are the adapter's
            assert_near(theirs(again), theirs(make_again(tmp_path)), 0.0)
