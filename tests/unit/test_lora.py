"""Adapters on our own models: any base, any choice of them, off again; what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm import lora
from minillm.checkpoint.load import without_memory
from minillm.config import DecoderConfig
from minillm.errors import CheckpointError, InputError, MinillmError
from minillm.lora.layer import LoraLinear
from minillm.lora.peft_format import CONFIG, WEIGHTS
from minillm.model import Decoder
from minillm.ops import int8
from minillm.quant.convert import Quantisation, quantize_linears
from tests.decoders import SHAPES, decoder
from tests.error import assert_near, assert_rule_of_two, distance

TOKENS = torch.randint(0, 131, (3, 7), generator=torch.Generator().manual_seed(0))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def shaken(model: Decoder, name: str = "default", seed: int = 0) -> Decoder:
    """Random numbers for all of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters(model, name):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS)
    return found


def adapted(shape: str = "llama", **fields: Any) -> Decoder:
    family = "falcon" if shape.startswith("falcon") else "llama"
    model = decoder(**SHAPES[shape], hidden_size=64, head_size=16, ffn_size=128, family=family)
    lora.add(model, **{"targets": ATTENTION, "generator": seeded(), **fields})
    return shaken(model)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def kinds(model: Decoder) -> list[str]:
    """What the model is made of, and what of it is trained."""
    trained = [name for name, x in model.named_parameters() if x.requires_grad]
    return [type(module).__name__ for module in model.modules()] + trained


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora"])
def test_a_fresh_adapter_changes_nothing(shape: str, init: str) -> None:
    model = decoder(**SHAPES[shape])
    before = logits(model)
    assert lora.add(model, targets="all-linear", rank=4, init=init)
    assert_near(logits(model), before, 1e-6)
    with lora.disabled(model):
        assert torch.equal(logits(model), before)


def test_only_the_adapter_is_trained() -> None:
    model = adapted()
    model(TOKENS).square().mean().backward()
    with_gradient = [name for name, x in model.named_parameters() if x.grad is not None and float(x.grad.abs().max())]
    assert len(with_gradient) == 2 * 4 * 2
    assert all(".adapters.default." in name for name in with_gradient)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"init": "pissa"}, {"lora_bias": True}], ids=str)
def test_on_a_quantised_base(kind: str, fields: dict[str, Any]) -> None:
    model = decoder(hidden_size=64, head_size=16, ffn_size=128)
    quantize_linears(model, Quantisation(kind, threshold=0.0))
    before, codes = logits(model), model.blocks[0].attention.q_proj.weight.clone()
    lora.add(model, targets=ATTENTION, generator=seeded(), **fields)
    shaken(model)
    model(TOKENS).square().mean().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in lora.parameters(model, "default"))
    float_base = decoder(hidden_size=64, head_size=16, ffn_size=128)
    for path, layer in model.named_modules():
        if hasattr(layer, "dequantised"):
            float_base.get_submodule(path.replace(".base", "")).weight.data = layer.dequantised(torch.float32)
    lora.add(float_base, targets=ATTENTION, **fields)
    shaken(float_base)
    for ours, theirs in zip(lora.parameters(model, "default"), lora.parameters(float_base, "default"), strict=True):
        theirs.data = ours.data.clone()
    with lora.disabled(float_base):
        bound = 1e-4 + 3 * distance(before, logits(float_base)) * (kind == "int8")  # which rounds the activations too
    assert_near(logits(model), logits(float_base), bound)
    assert float((logits(model) - before).abs().max()) > 5 * float((logits(model) - logits(float_base)).abs().max())
    merged = lora.merged(model, tokens=TOKENS)
    assert_near(logits(merged.model), logits(float_base), bound)
    with lora.disabled(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(model.blocks[0].attention.q_proj.base.weight, codes)


def test_int8_with_an_adapter_is_its_formula() -> None:
    model = decoder(hidden_size=64, head_size=16, ffn_size=128)
    quantize_linears(model, "int8")
    lora.add(model, targets=["q_proj"], rank=3, alpha=5)
    shaken(model)
    layer, x = model.blocks[0].attention.q_proj, torch.randn(5, 64)
    adapter = layer.adapters["default"]
    plain = int8.linear_ref(x, int8.Weight(layer.base.weight, layer.base.scale)) + x @ adapter.a.T @ adapter.b.T * 5 / 3
    exact = layer.base(x).double() + (x.double() @ adapter.a.double().T @ adapter.b.double().T) * 5 / 3
    assert_rule_of_two(layer(x), plain, exact.detach(), "int8 and adapter")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_of_a_16_bit_base_are_fp32(dtype: torch.dtype) -> None:
    model = decoder().to(dtype)
    lora.add(model, targets=ATTENTION)
    assert {x.dtype for x in lora.parameters(model, "default")} == {torch.float32}
    assert logits(model).dtype == dtype


def test_several_adapters_are_added_up_and_chosen_by_row() -> None:
    model = adapted()
    lora.add(model, name="other", targets=["v_proj", "down_proj"], rank=2)
    shaken(model, "other", seed=1)
    alone = {"other": logits(model)}
    lora.activate(model, "default")
    alone["default"] = logits(model)
    with lora.disabled(model):
        base = logits(model)
    with lora.for_rows(model, ["other", None, "default"]):
        mixed = logits(model)
    for row, expected in enumerate((alone["other"], base, alone["default"])):
        assert_near(mixed[row], expected[row], 1e-5)
    lora.activate(model, "default", "other")
    both = logits(model)
    merged = lora.merged(model).model
    assert_near(logits(merged), both)
    lora.remove(model, "default")
    assert_near(logits(model), alone["other"], 0.0)
    lora.remove(model, "other")
    assert torch.equal(logits(model), base) and not any(isinstance(m, LoraLinear) for m in model.modules())
    assert set(model.state_dict()) == set(decoder().state_dict())


def test_a_copy_has_adapters_of_its_own() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    with lora.disabled(twin):
        assert not torch.equal(logits(model), logits(twin))
    lora.remove(twin, "default")
    assert lora.adapters(model) == ["default"] and lora.adapters(twin) == []


def test_dropout_is_for_training_and_the_adapter_alone() -> None:
    model = adapted(dropout=0.5)
    still = logits(model)
    assert torch.equal(still, logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    with lora.disabled(model):
        assert torch.equal(logits(model), logits(model))


def test_generating_goes_through_adapters() -> None:
    from minillm.generation.generate import decode_step, prefill

    model = adapted().eval()
    cache = model.new_cache(3, 9)
    prefill(model, TOKENS[:, :-1], None, cache)
    assert_near(decode_step(model, TOKENS[:, -1], cache), logits(model)[:, -1])


def test_merging_leaves_the_model_alone_and_says_what_got_lost() -> None:
    model = adapted().to(torch.bfloat16)
    for parameter in lora.parameters(model, "default"):
        parameter.data = parameter.data.float()
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    merged = lora.merged(model, tokens=TOKENS)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), before)
    assert set(merged.layers) == {f"blocks.{n}.attention.{name}" for n in (0, 1) for name in ATTENTION}
    assert all(0 < change.lost < 0.1 and change.size > 0 for change in merged.layers.values())
    assert merged.logits_max is not None and merged.logits_mean is not None
    assert 0 < merged.logits_mean < merged.logits_max


def test_merging_a_tied_embedding_unties_it() -> None:
    model = decoder(tied_embeddings=True)
    lora.add(model, targets=["embed"], rank=2)
    shaken(model)
    merged = lora.merged(model).model
    assert not merged.config.tied_embeddings and model.config.tied_embeddings
    assert_near(logits(merged), logits(model))


@pytest.mark.parametrize("chosen", [("q_proj",), ("q_proj", "v_proj"), ("k_proj", "v_proj", "o_proj")])
def test_parts_of_a_fused_weight_go_to_disk_and_back(chosen: tuple[str, ...], tmp_path: Path) -> None:
    model = adapted("falcon", targets=chosen, rank_pattern={"v_proj": 3}, alpha_pattern={"k_proj": 1})
    expected = logits(model)
    lora.save(model, tmp_path)
    again = decoder(**SHAPES["falcon"], hidden_size=64, head_size=16, ffn_size=128, family="falcon")
    lora.load(again, tmp_path)
    assert_near(logits(again), expected, 2e-6)
    a = load_file(tmp_path / WEIGHTS)["base_model.model.transformer.h.0.self_attention.query_key_value.lora_A.weight"]
    ranks = {"q_proj": 8, "k_proj": 8, "v_proj": 3}
    assert len(a) == sum(ranks.get(name, 0) for name in chosen)


def test_nothing_of_the_model_is_changed_by_an_adapter_that_does_not_fit(tmp_path: Path) -> None:
    lora.save(adapted(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    model = adapted()
    before = logits(model)
    with pytest.raises(CheckpointError, match="lacks base_model"):
        lora.load(model, tmp_path, name="other")
    assert torch.equal(logits(model), before) and lora.adapters(model) == ["default"]


def _rename(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    key = next(key for key in tensors if key.endswith("layers.0.self_attn.q_proj.lora_B.weight"))
    tensors[key.replace("q_proj", "q_porj")] = tensors.pop(key)


def _extra(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(8, 64)


def _shape(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    tensors[key] = tensors[key][:-1].clone()


def _rank(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["r"] = 4


def _set(**fields: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, config: config.update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rename, r"lacks .*q_proj.lora_B.weight \(nearest: .*q_porj"),
        (_extra, "holds base_model.model.model.layers.7"),
        (_shape, "has shape"),
        (_rank, "another base model or rank"),
        (_set(peft_type="IA3"), "peft_type is 'IA3'"),
        (_set(use_dora=True), "lacks .*lora_magnitude_vector"),
        (_set(fan_in_fan_out=True), "fan_in_fan_out asks for"),
        (_set(loftq_config={"loftq_bits": 4}), "loftq_config asks for"),
        (_set(layer_replication=[[0, 1]]), "layer_replication asks for"),
        (_set(trainable_token_indices=[3]), "trainable_token_indices asks for"),
        (_set(init_lora_weights="pissa_niter_4"), "cannot be repeated"),
        (_set(init_lora_weights="loftq"), "cannot be repeated"),
        (_set(use_rsloar=True), r"field 'use_rsloar' is unknown \(nearest: use_rslora"),
        (_set(target_modules=["q_porj"]), r"fits no layer of this model \(nearest: q_proj"),
        (_set(target_modules="(a+)+"), "fits no layer"),
        (_set(target_modules=r"(.)\1.*"), r"uses '\\\\1', which minillm does not have"),
        (_set(r=0), "rank is 0"),
        (_set(r=10**9), "has no tensor of rank 1000000000"),
        (_set(target_modules=5), "target_modules is 5; it must be a text or a list of texts"),
        (_set(target_modules=[5]), r"target_modules is \[5\]"),
        (_set(modules_to_save="lm_head"), "modules_to_save is 'lm_head'; it must be a list"),
        (_set(rank_pattern=[8]), "rank_pattern is"),
        (_set(layers_to_transform=["1"]), "layers_to_transform is"),
        (_set(lora_dropout="0.1"), "lora_dropout is '0.1'"),
        (_set(use_dora="no"), "use_dora is 'no'"),
        (_set(enable_lora=[True, False]), "enable_lora asks for"),
        (lambda tensors, _: tensors.update({k: x.int() for k, x in tensors.items()}), "is torch.int32"),
        (_set(bias="some"), "biases is 'some'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_file_that_does_not_fit_is_refused(change: Callable[..., None], words: str, tmp_path: Path) -> None:
    lora.save(adapted(), tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    change(tensors, config)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(MinillmError, match=words):
        lora.load(decoder(hidden_size=64, head_size=16, ffn_size=128), tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    lora.save(adapted(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        lora.load(decoder(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"targets": ["q_porj"]}, r"targets 'q_porj' fits no layer of this model \(nearest: q_proj"),
        ({"targets": "q_proj"}, "fits no layer"),  # a regular expression has to match the whole name
        ({"targets": "("}, "is no regular expression"),
        ({"targets": r"(.)\1.*"}, r"uses '\\\\1', which minillm does not have"),
        ({"exclude": ["gate"]}, "exclude 'gate' fits no layer"),
        ({"exclude": ["q_proj", "v_proj"]}, "no layer is left"),
        ({"layers": [9]}, "no layer is left"),
        ({"rank": 0}, "rank is 0; give a whole number"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"init": "pisa"}, r"init is 'pisa' \(nearest: pissa"),
        ({"init": "pissa", "rank": 40}, "40 directions out of a weight"),
        ({"dora": True, "lora_bias": True}, "leave lora_bias out"),
        ({"rnak": 4}, r"rnak is no setting of an adapter \(nearest: rank"),
        ({"retrain": ["lm_haed"]}, r"retrain 'lm_haed' fits no module of this model \(nearest: lm_head"),
        ({"retrain": ["mlp"]}, "has modules within"),
        ({"name": "a.b"}, "cannot be called"),
        ({"name": "keys"}, "cannot be called"),
        ({"alpha": 10**400}, "alpha"),
        ({"init": "pissa", "rank_pattern": {"1.*v_proj": 40}}, "40 directions"),
        ({"targets": ["q_proj", "embed"], "init": "pissa"}, "init pissa is for linears"),
        ({"targets": ["embed"], "dora": True}, "dora is for linears"),
        ({"targets": ["embed"], "init": "olora"}, "init olora is for linears"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], words: str) -> None:
    model = decoder()
    with pytest.raises(InputError, match=words):
        lora.add(model, **fields)
    assert kinds(model) == kinds(decoder()) and lora.adapters(model) == []


def test_names_of_adapters_are_checked() -> None:
    model = adapted()
    with pytest.raises(InputError, match="has an adapter 'default' already"):
        lora.add(model)
    for call in (lora.activate, lora.remove, lora.config_of):
        with pytest.raises(InputError, match=r"no adapter 'defualt' \(nearest: default"):
            call(model, "defualt")
    with pytest.raises(InputError, match="it has none; add one first"):
        lora.activate(decoder(), "default")
    with pytest.raises(InputError, match="no adapter is active"):
        lora.merged(decoder())
    with lora.disabled(model), pytest.raises(InputError, match="no adapter is active"):
        lora.merged(model)
    with (
        pytest.raises(ValueError, match="1 rows have an adapter chosen, and the batch has 3"),
        lora.for_rows(model, [None]),
    ):
        logits(model)


def test_the_size_of_a_launch_post() -> None:
    """An adapter of rank 16 on every linear of a Falcon-7B takes 65 MB in 16 bits, the model 14.4 GB."""
    model = without_memory(
        DecoderConfig(vocab_size=65_024, hidden_size=4544, num_layers=32, num_heads=71, num_kv_heads=1, head_size=64,
                      ffn_size=18_176, context=2048, norm="layer", mlp="plain", activation="gelu", block="parallel",
                      tied_embeddings=True, family="falcon")
    )  # fmt: skip
    base = sum(x.numel() for x in model.parameters()) * 2
    lora.add(model, targets="all-linear", rank=16)
    size = sum(x.numel() for x in lora.parameters(model, "default")) * 2
    assert base == pytest.approx(13.84e9, rel=1e-3) and size == pytest.approx(65e6, rel=0.01)


def test_a_fused_weight_named_as_one_has_one_a(tmp_path: Path) -> None:
    fields = {**SHAPES["falcon"], "hidden_size": 64, "head_size": 16, "ffn_size": 128, "family": "falcon"}
    model = decoder(**fields)
    lora.add(model, targets=["query_key_value"], dora=True, init="linear")
    shaken(model)
    q, k, v = (getattr(model.blocks[0].attention, f"{name}_proj").adapters["default"] for name in "qkv")
    assert q.a is k.a is v.a and len(lora.parameters(model, "default")) == 2 * 7
    lora.save(model, tmp_path)
    again = decoder(**fields)
    lora.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    twin = copy.deepcopy(again).blocks[0].attention
    assert twin.q_proj.adapters["default"].a is twin.k_proj.adapters["default"].a


def test_a_failed_load_leaves_what_is_trained_alone(tmp_path: Path) -> None:
    lora.save(adapted(), tmp_path)
    model = adapted()
    model.requires_grad_(False)  # as after a load that is not to be trained
    before = kinds(model)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors.popitem()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="lacks"):
        lora.load(model, tmp_path, name="other")
    assert kinds(model) == before
    with pytest.raises(InputError, match="already"):
        lora.load(model, tmp_path)
    assert kinds(model) == before and lora.adapters(model) == ["default"]


@pytest.mark.parametrize("first", ["retrain", "targets"])
def test_one_adapter_retrains_what_another_adapts(first: str, tmp_path: Path) -> None:
    model = decoder()
    base = logits(model)
    fields = {"retrain": {"targets": ["q_proj"], "retrain": ["lm_head"]}, "targets": {"targets": ["lm_head", "q_proj"]}}
    alone = {}
    for name in sorted(fields, key=lambda each: each != first):
        lora.add(model, name=name, **fields[name])
        alone[name] = logits(shaken(model, name, seed=len(name)))
    for name, expected in alone.items():
        lora.activate(model, name)
        assert torch.equal(logits(model), expected)
        lora.save(model, tmp_path / name, name=name)
        fresh = decoder()
        lora.load(fresh, tmp_path / name)
        assert_near(logits(fresh), expected, 0.0)
    lora.activate(model, *fields)
    assert_near(logits(lora.merged(model).model), logits(model))
    with lora.disabled(model):
        assert torch.equal(logits(model), base)
    lora.remove(model, first)
    rest = next(name for name in fields if name != first)
    lora.activate(model, rest)
    assert torch.equal(logits(model), alone[rest])
    lora.remove(model, rest)
    assert torch.equal(logits(model), base) and kinds(model) == kinds(decoder())


def test_biases_of_all_and_then_another_adapter() -> None:
    model = decoder(**SHAPES["falcon_rw"])
    fields: list[dict[str, Any]] = [
        {"targets": ["q_proj"], "biases": "all", "retrain": ["norm"]},
        {"targets": ["q_proj", "up_proj"], "biases": "all", "lora_bias": True},
        {"targets": ["up_proj"], "biases": "lora_only"},
    ]
    for place, each in enumerate(fields):
        lora.add(model, name=f"{place}", **each)
        shaken(model, f"{place}", seed=place)
    assert set(model.norm.adapters["0"]) == {"weight", "bias"}  # the bias is not all of it
    lora.activate(model, "1", "2")
    assert_near(logits(lora.merged(model).model), logits(model))
    for name in "102":
        lora.remove(model, name)
    assert kinds(model) == kinds(decoder(**SHAPES["falcon_rw"]))


def test_by_row_and_retrained() -> None:
    model = adapted()
    lora.add(model, name="other", targets=["q_proj"], retrain=["norm"])
    shaken(model, "other")
    with pytest.raises(InputError, match=r"retrains blocks\.0\.attention_norm, which"), lora.for_rows(model, ["other"]):
        pass
    with lora.disabled(model):
        base = logits(model)
    with lora.for_rows(model, ["default", None, "default"]):
        assert_near(logits(model)[1], base[1])
        with lora.disabled(model):
            assert torch.equal(logits(model), base)


def test_generating_goes_through_retrained_linears() -> None:
    from minillm.generation.generate import decode_step, prefill

    model = decoder(hidden_size=64, head_size=16, ffn_size=128)
    lora.add(model, targets=["lm_head"], retrain=[*ATTENTION, "gate_proj", "up_proj", "down_proj"])
    shaken(model)
    with torch.inference_mode():
        cache = model.new_cache(3, 9)
        prefill(model, TOKENS[:, :-1], None, cache)
        assert_near(decode_step(model, TOKENS[:, -1], cache), logits(model)[:, -1])


def test_quantised_weights_are_not_retrained() -> None:
    model = decoder(hidden_size=64, head_size=16, ffn_size=128)
    quantize_linears(model, "int8")
    with pytest.raises(InputError, match="q_proj is quantised and cannot be retrained"):
        lora.add(model, targets=["v_proj"], retrain=["q_proj"])
    lora.add(model, targets=["q_proj"])
    shaken(model)
    trained = {name for name, x in lora.merged(model).model.named_parameters() if x.requires_grad}
    assert not any(name.endswith("scale") for name in trained) and "norm.weight" in trained


def test_the_start_of_pissa_is_part_of_the_state() -> None:
    model, other = adapted(init="pissa", rank=4), decoder(1, hidden_size=64, head_size=16, ffn_size=128)
    lora.add(other, targets=ATTENTION, init="pissa", rank=4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_an_adapter_counts_once() -> None:
    model = adapted()
    alone = logits(model)
    lora.activate(model, "default", "default")
    assert torch.equal(logits(model), alone)


def test_adding_while_disabled() -> None:
    model = decoder()
    base = logits(model)
    with lora.disabled(model):
        lora.add(model, init="linear")
        assert torch.equal(logits(model), base)
    assert not torch.equal(logits(model), base)


def test_dora_of_rows_that_are_zero() -> None:
    model = decoder()
    with torch.no_grad():
        model.lm_head.weight[100:] = 0  # type: ignore[union-attr, index]
    before = logits(model)
    lora.add(model, targets=["lm_head"], dora=True)
    assert torch.equal(logits(model), before)
    shaken(model)
    assert bool(logits(lora.merged(model).model).isfinite().all())


def test_biases_of_a_part_of_a_fused_weight_go_to_disk(tmp_path: Path) -> None:
    model = adapted("falcon_rw", targets=["q_proj"], biases="lora_only")
    lora.save(model, tmp_path)
    again = decoder(**SHAPES["falcon_rw"], hidden_size=64, head_size=16, ffn_size=128, family="falcon")
    lora.load(again, tmp_path)
    assert_near(logits(again), logits(model))


@pytest.mark.parametrize("fields", [{"dora": True}, {"lora_bias": True}, {"alpha_pattern": {"q_proj": 0}}], ids=str)
def test_what_a_part_of_a_fused_weight_has_beside_a_and_b(fields: dict[str, Any], tmp_path: Path) -> None:
    model = adapted("falcon", targets=["q_proj", "v_proj"], **fields)
    lora.save(model, tmp_path)
    again = decoder(**SHAPES["falcon"], hidden_size=64, head_size=16, ffn_size=128, family="falcon")
    lora.load(again, tmp_path)
    assert_near(logits(again), logits(model), 2e-6)


@pytest.mark.parametrize("ranks", ["[1]", "[16, 0]", "[-8, 16, 8]", "[1e400, 8, 8]", "9"])
def test_broken_metadata_are_refused(ranks: str, tmp_path: Path) -> None:
    lora.save(adapted("falcon", targets=["q_proj", "v_proj"]), tmp_path)
    module = "transformer.h.0.self_attention.query_key_value"
    metadata = {"format": "pt", "minillm.ranks": f'{{"{module}": {ranks}}}'}
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata)
    model = decoder(**SHAPES["falcon"], hidden_size=64, head_size=16, ffn_size=128, family="falcon")
    with pytest.raises(CheckpointError, match=r"metadata minillm\.ranks are broken"):
        lora.load(model, tmp_path)


def test_a_config_of_an_early_peft(tmp_path: Path) -> None:
    model = adapted(targets=["q_proj", "v_proj"])
    lora.save(model, tmp_path)
    old = {
        "base_model_name_or_path": "base", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": 8, "lora_dropout": None, "merge_weights": True, "modules_to_save": None,
        "peft_type": "LORA", "r": 8, "target_modules": None, "task_type": "CAUSAL_LM", "layers_to_transform": [],
        "init_lora_weights": None, "rank_pattern": None, "use_dora": None,
    }  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(old))
    again = decoder(hidden_size=64, head_size=16, ffn_size=128)
    lora.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
