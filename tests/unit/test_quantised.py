"""Quantised layers in a model: swapped, loaded on the way, saved and loaded back; what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minillm
from minillm.errors import CheckpointError, ConfigError, InputError
from minillm.model import linear as linear_module
from minillm.ops import int8
from minillm.quant.convert import QUANTISED, Quantisation, quantize_linears
from minillm.quant.int8_linear import LinearInt8
from tests.decoders import SHAPES, decoder
from tests.error import distance

EVERY = pytest.mark.parametrize("shape", SHAPES)
TOKENS = torch.randint(131, (2, 9), generator=torch.Generator().manual_seed(1))


def saved(folder: Path, shape: str, **fields: object) -> Path:
    """A float checkpoint; the ALiBi Llama has no file format."""
    fields = {"separate_bias": shape == "falcon_rw", "family": "llama" if shape == "llama" else "falcon", **fields}
    minillm.save(decoder(**{**SHAPES[shape], **fields}), folder)
    return folder


FILES = [shape for shape in SHAPES if shape != "grouped_alibi"]


KINDS = pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTISED)}


# -- the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_layer_is_the_operation(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(40, 24).to(dtype)
    layer, x = LinearInt8.from_float(plain), torch.randn(3, 5, 40).to(dtype)
    expected = int8.linear(x, int8.Weight(layer.weight, layer.scale, plain.bias.detach()))
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        assert distance(layer(x), plain(x)) < 0.02  # 1/127 of the largest, twice, over sums of 40


def test_train_and_eval_are_the_same_bits_and_the_gradient_too() -> None:
    layer = LinearInt8.from_float(nn.Linear(40, 24))
    x = torch.randn(9, 40, requires_grad=True)
    x.data[0, 3] = 20.0
    outputs = [layer.train(mode)(x) for mode in (True, False)]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in outputs]
    assert torch.equal(*gradients)


def test_threshold_zero_is_plain_vector_wise() -> None:
    plain = nn.Linear(40, 24)
    x = torch.randn(9, 40)
    x[0, 3] = 20.0
    found = LinearInt8.from_float(plain, threshold=0.0)(x)
    assert torch.equal(found, int8.linear(x, LinearInt8.from_float(plain)._weight(x), math.inf))
    assert not torch.equal(found, LinearInt8.from_float(plain)(x))


def test_casting_never_rounds_the_scale() -> None:
    layer = LinearInt8.from_float(nn.Linear(40, 24))
    weight, scale = layer.weight.clone(), layer.scale.clone()
    for cast in (layer.to(torch.bfloat16), layer.half(), layer.double()):
        assert torch.equal(cast.weight, weight) and torch.equal(cast.scale, scale)
        assert cast.scale.dtype == torch.float32
    assert layer.bias.dtype == torch.float64
    assert layer.to("meta").scale.device.type == "meta"


@pytest.mark.parametrize("after_a_forward", [False, True])
def test_state_loads_into_a_fresh_layer(after_a_forward: bool) -> None:
    layer, x = LinearInt8.from_float(nn.Linear(40, 24)), torch.randn(2, 40)
    expected = layer(x)
    fresh = LinearInt8(40, 24)
    if after_a_forward:
        fresh.take_weight(torch.zeros(24, 40))
        fresh(x)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), expected)


def test_nothing_is_trained_in_it() -> None:
    assert not any(parameter.requires_grad for parameter in LinearInt8(4, 3).parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite(bad: float) -> None:
    plain = nn.Linear(4, 3)
    plain.weight.data[1, 2] = bad
    with pytest.raises(InputError, match="holds a NaN or infinity"):
        LinearInt8.from_float(plain)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_a_threshold_that_is_none(bad: float) -> None:
    with pytest.raises(InputError, match="threshold is"):
        LinearInt8(4, 3, threshold=bad)


# -- in a model --------------------------------------------------------------------------------------------------------


@EVERY
@KINDS
def test_linears_but_the_head_are_swapped(shape: str, kind: str) -> None:
    model = decoder(**SHAPES[shape])
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert set(quantize_linears(model, kind)) == linears == set(layers(model))
    rounded = decoder(**SHAPES[shape])
    for name, layer in layers(model).items():
        rounded.get_submodule(name).weight.data = layer.dequantised(torch.float32)
    # int8 rounds its inputs too, to 1/127 of the largest; 4 bits multiply by the rounded weights as they are
    assert distance(model(TOKENS), rounded(TOKENS)) < (0.1 if kind == "int8" else 1e-5)


@EVERY
def test_together_is_each_alone(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v share what is made of x; the same bits as each for itself, and hooks still see every layer."""
    model = decoder(**SHAPES[shape])
    quantize_linears(model, "int8")
    with torch.no_grad():
        found = model(TOKENS)
        seen: list[str] = []
        for name, layer in layers(model).items():
            layer.register_forward_hook(lambda *_, name=name: seen.append(name))
        assert torch.equal(model(TOKENS), found)
        assert set(seen) == set(layers(model))
        monkeypatch.setattr(linear_module, "project", lambda x, *linears: [linear(x) for linear in linears])
        assert torch.equal(model(TOKENS), found)


def test_layers_of_unequal_thresholds_are_not_run_together() -> None:
    model = decoder()
    quantize_linears(model, "int8")
    attention = model.blocks[0].attention
    attention.k_proj.threshold = 0.5
    x = torch.randn(4, 32)
    with torch.no_grad():
        found = linear_module.project(x, attention.q_proj, attention.k_proj, attention.v_proj)
        for y, layer in zip(found, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
            assert torch.equal(y, layer(x))


def test_skip() -> None:
    model = decoder()
    names = quantize_linears(model, Quantisation("int8", skip=("lm_head", "down_proj", "blocks.0.attention")))
    assert names and not any("down_proj" in name or name.startswith("blocks.0.attention") for name in names)


def test_skip_of_nothing_is_named() -> None:
    with pytest.raises(InputError, match=r"skip names 'down_prj', .* \(nearest: down_proj"):
        quantize_linears(decoder(), Quantisation("int8", skip=("down_prj",)))


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(InputError, match=r"quantisation 'int9' is unknown \(nearest: int8\)"):
        quantize_linears(decoder(), "int9")


# -- loading and saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", FILES)
@KINDS
def test_quantised_while_loading_is_quantised_after(shape: str, kind: str, tmp_path: Path) -> None:
    saved(tmp_path, shape)
    loaded, swapped = minillm.load_model(tmp_path, quantize=kind), minillm.load_model(tmp_path)
    quantize_linears(swapped, kind)
    expected = swapped.state_dict()
    assert {name: (x.dtype, x.shape) for name, x in loaded.state_dict().items()} == {
        name: (x.dtype, x.shape) for name, x in expected.items()
    }
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_four_bits_saved_and_loaded_back(kind: str, double: bool, tmp_path: Path) -> None:
    how = Quantisation(kind, double_quant=double)
    model = minillm.load_model(saved(tmp_path / "float", "llama"), quantize=how)
    minillm.save(model, tmp_path / "four")
    again = minillm.load_model(tmp_path / "four")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("shape", ["falcon", "falcon_rw"])
def test_four_bits_of_a_fused_weight(shape: str, tmp_path: Path) -> None:
    """Saved fused with fp32 scales, which split by rows: the weights that were there, bit for bit."""
    how, wide = Quantisation("nf4"), {"hidden_size": 64, "head_size": 16}
    model = minillm.load_model(saved(tmp_path / "float", shape, **wide), quantize=how)
    minillm.save(model, tmp_path / "four")
    again = minillm.load_model(tmp_path / "four")
    for name, layer in layers(model).items():
        assert torch.equal(layer.dequantised(torch.float32), layers(again)[name].dequantised(torch.float32))
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS))
    minillm.save(again, tmp_path / "twice")
    twice, once = (load_file(tmp_path / part / "model.safetensors") for part in ("twice", "four"))
    fused = [name for name in once if "query_key_value" in name]
    assert len(fused) >= 8 and all(torch.equal(twice[name], once[name]) for name in fused)


def test_blocks_that_cross_the_rows_of_a_fused_weight(tmp_path: Path) -> None:
    model = minillm.load_model(saved(tmp_path / "float", "falcon"), quantize="nf4")
    with pytest.raises(CheckpointError, match="blocks of 64 that cross rows"):
        minillm.save(model, tmp_path / "four")


@pytest.mark.parametrize("shape", FILES)
@pytest.mark.parametrize("shards", [1, 3])
def test_int8_saved_and_loaded_back_is_bitwise_the_same(shape: str, shards: int, tmp_path: Path) -> None:
    model = minillm.load_model(saved(tmp_path / "float", shape), quantize=Quantisation("int8", threshold=4.5))
    size = sum(x.nbytes for x in model.state_dict().values())
    minillm.save(model, tmp_path / "int8", max_shard_bytes=size // shards + 4000)
    again = minillm.load_model(tmp_path / "int8")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    assert {layer.threshold for layer in layers(again).values()} == {4.5}
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS))


def test_some_layers_float(tmp_path: Path) -> None:
    """Which ones are, the file says by itself."""
    how = Quantisation("int8", skip=("lm_head", "down_proj"))
    model = minillm.load_model(saved(tmp_path / "float", "llama"), quantize=how)
    minillm.save(model, tmp_path / "int8")
    again = minillm.load_model(tmp_path / "int8")
    assert set(layers(again)) == set(layers(model)) and isinstance(again.blocks[0].mlp.down_proj, nn.Linear)


def test_part_of_a_fused_weight_cannot_be_saved(tmp_path: Path) -> None:
    model = minillm.load_model(saved(tmp_path / "float", "falcon"), quantize=Quantisation("int8", skip=("k_proj",)))
    with pytest.raises(CheckpointError, match=r"query_key_value.*only some of .*k_proj.* are quantised"):
        minillm.save(model, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An int8 checkpoint."""
    minillm.save(minillm.load_model(saved(tmp_path / "float", "llama"), quantize="int8"), tmp_path / "int8")
    return tmp_path / "int8"


def change(folder: Path, spoil: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(f"{KEY}.SCB"), f"tensor {KEY}.weight is int8, its scales {KEY}.SCB are missing"),
        (lambda t: t.update({f"{KEY}.SCB": torch.ones(3)}), rf"tensor {KEY}.SCB is torch.float32 \(3,\), not"),
        (lambda t: t.update({f"{KEY}.SCB": torch.ones(48).half()}), rf"tensor {KEY}.SCB is torch.float16"),
        (lambda t: t[f"{KEY}.SCB"].fill_(math.nan), rf"tensor {KEY}.SCB holds scales that are no sizes"),
        (lambda t: t[f"{KEY}.weight_format"].fill_(2), f"{KEY}.weight_format is 2, a layout of old GPUs"),
        (lambda t: t.update({f"{KEY}.weight": torch.zeros(48, 32)}), f"{KEY}.SCB belongs to no quantised weight"),
        (lambda t: t.update({"model.embed_tokens.SCB": torch.ones(131)}), "belongs to no quantised weight"),
        (lambda t: t.pop(f"{KEY}.weight"), "belongs to no quantised weight"),
        (lambda t: t.update({f"{KEY}.weight": torch.zeros(47, 32, dtype=torch.int8)}), "has shape"),
    ],
)
def test_bad_int8_checkpoints(folder: Path, spoil: object, message: str) -> None:
    change(folder, spoil)
    with pytest.raises(CheckpointError, match=message) as caught:
        minillm.load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llm_int8_threshold": "six"}, "llm_int8_threshold is 'six'"),
        ({"llm_int8_threshold": -1}, "llm_int8_threshold is -1"),
        ({"llm_int8_has_fp16_weight": True}, "has llm_int8_has_fp16_weight = True"),
        ({"group_size": 128}, "has group_size = 128"),
    ],
)
def test_bad_settings(folder: Path, fields: dict[str, object], message: str) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"].update(fields)
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message):
        minillm.load_model(folder)


def test_int8_of_int8_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is quantised already"):
        minillm.load_model(folder, quantize=Quantisation("int8", threshold=3.0))
    minillm.load_model(folder, quantize="int8")  # what it is


def test_a_nan_in_a_float_checkpoint_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    change(folder, lambda t: t[f"{KEY}.weight"][3].fill_(math.nan))
    with pytest.raises(CheckpointError, match=rf"tensor {KEY}.weight: a weight holds a NaN"):
        minillm.load_model(folder, quantize="int8")
