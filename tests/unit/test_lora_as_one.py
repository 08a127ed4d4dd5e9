"""Linears with adapters as one step of autograd: the numbers of the modules one by one, in every kind and format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import lora
from minillm.lora import as_one
from minillm.lora.layer import LoraLinear
from minillm.model import Decoder
from minillm.quant.convert import quantize_linears
from tests.decoders import SHAPES, decoder
from tests.error import assert_near, assert_rule_of_two

TOKENS = torch.randint(0, 131, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS = ("float", "int8", "nf4")


def adapted(kind: str = "float", **fields: Any) -> Decoder:
    """Adapters that change something, on every linear."""
    model = decoder(**fields)
    if kind != "float":
        quantize_linears(model, kind)
    lora.add(model, targets="all-linear", rank=4, alpha=6, init="linear", generator=torch.Generator().manual_seed(1))
    return model.train()


def results(model: Decoder) -> dict[str, Tensor]:
    """Logits, and every gradient of a loss that all logits enter."""
    logits = model(TOKENS)
    logits.log_softmax(-1)[..., ::3].mean().backward()
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found | {"logits": logits.detach()}


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(as_one, "serves", lambda *_: False)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linears each step had."""
    found: list[int] = []
    original = as_one.linears

    def counted(layers: Any, *inputs: Tensor) -> list[Tensor]:
        found.append(len(layers))
        return original(layers, *inputs)

    monkeypatch.setattr(as_one, "linears", counted)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients(shape: str, kind: str, steps: list[int], one_by_one: Callable[[], None]) -> None:
    model = adapted(kind, **SHAPES[shape])
    ours = results(model)
    gated = hasattr(model.blocks[0].mlp, "gate_proj")
    assert steps == [3, 1, *([2, 1] if gated else [1, 1])] * 2 if not gated else [3, 1, 2, 1] * 2
    one_by_one()
    theirs = results(model)
    assert set(ours) == set(theirs) and any(name.endswith(".a") for name in ours)
    # int8: a rounding of x that falls the other way is 1 / 127 of its largest value; else roundings of two blocks
    for name, right in theirs.items():
        assert_near(ours[name], right, 0.03 if kind == "int8" else 5e-5, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_of_two(kind: str, dtype: torch.dtype) -> None:
    """y, dx, dA and dB of one layer against float64, beside the plain formula in that format."""
    draw = torch.Generator().manual_seed(0)
    model = decoder(hidden_size=64, num_heads=4, num_kv_heads=4, head_size=16)
    with torch.no_grad():
        model.blocks[0].attention.q_proj.weight.normal_(0, 0.1, generator=draw)
    if kind != "float":
        quantize_linears(model, kind)
    lora.add(model, targets=["q_proj"], rank=8, alpha=12, init="linear", generator=draw)
    layer = model.to(dtype).blocks[0].attention.q_proj
    assert isinstance(layer, LoraLinear)
    x = torch.randn(2, 20, 64, generator=draw).to(dtype)
    g = torch.randn(2, 20, 64, generator=draw).to(dtype)
    adapter = layer.adapters["default"]

    def formula(wide: torch.dtype) -> list[Tensor]:
        base = layer.base.dequantised(wide) if kind != "float" else layer.base.weight.detach().to(wide)
        leaves = [each.detach().to(wide).requires_grad_() for each in (x, adapter.a, adapter.b)]
        y = leaves[0] @ base.T + (leaves[0] @ leaves[1].T) @ leaves[2].T * adapter.scale
        y.backward(g.to(wide))
        return [y, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    leaf = x.clone().requires_grad_()
    assert as_one.serves([layer], leaf)
    (y,) = as_one.linears([layer], leaf)
    y.backward(g)
    found = (y, leaf.grad, adapter.a.grad, adapter.b.grad)
    for name, ours, plain, exact in zip(
        "y dx dA dB".split(), found, formula(dtype), formula(torch.float64), strict=True
    ):
        assert ours is not None
        if name == "y" and kind == "int8":  # x is rounded to 8 bits there, which is not what this test is about
            continue
        assert_rule_of_two(ours, plain, exact, name)
    assert found[2].dtype == found[3].dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_and_some_without(kind: str, one_by_one: Callable[[], None]) -> None:
    model = decoder()
    if kind != "float":
        quantize_linears(model, kind)
    draw = torch.Generator().manual_seed(1)
    lora.add(model, name="one", targets=["q_proj", "v_proj", "k_proj"], rank=4, init="linear", generator=draw)
    lora.add(model, name="two", targets=["q_proj", "k_proj"], rank=3, alpha=5, init="linear", generator=draw)
    for active in (["one", "two"], ["two"], ["one"]):
        lora.activate(model, *active)
        found = results(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(as_one, "serves", lambda *_: False)
            theirs = results(model)
        assert set(found) == set(theirs)
        for name, right in theirs.items():
            assert_near(found[name], right, 0.03 if kind == "int8" else 1e-5, name)


def test_without_gradients_the_same_bits() -> None:
    model = adapted()
    with torch.no_grad():
        base = model(TOKENS)
    model.requires_grad_(False)
    assert torch.equal(model(TOKENS), base)


def test_recomputed_blocks_have_the_same_gradients() -> None:
    model = adapted("int8")
    found = results(model)
    model.recompute = True
    again = results(model)
    assert all(torch.equal(again[name], x) for name, x in found.items())


def unusual() -> dict[str, Callable[[Decoder], Any]]:
    first = "blocks.0.attention.q_proj"
    return {
        "dora": lambda model: lora.add(model, name="x", targets=["q_proj"], dora=True),
        "pissa": lambda model: lora.add(model, name="x", targets=["q_proj"], init="pissa"),
        "a bias of B": lambda model: lora.add(model, name="x", targets=["q_proj"], lora_bias=True),
        "dropout": lambda model: lora.add(model, name="x", targets=["q_proj"], dropout=0.5),
        "a hook": lambda model: model.get_submodule(first).base.register_forward_hook(lambda *_: None),
        "a trained base": lambda model: model.get_submodule(first).base.requires_grad_(),
        "a hook on the way back": lambda model: model.get_submodule(first).base.register_full_backward_hook(
            lambda *_: None
        ),
        "a hook on the adapter": lambda model: (
            model.get_submodule(first).adapters["default"].register_forward_hook(lambda *_: None)
        ),
    }


@pytest.mark.parametrize("what", unusual())
def test_what_is_unusual_goes_one_by_one(what: str) -> None:
    model = adapted()
    layer: Any = model.blocks[0].attention.q_proj
    x = torch.zeros(1, 2, 32)
    assert as_one.serves([layer], x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not as_one.serves([layer], x)
    with lora.disabled(model):
        assert not as_one.serves([layer], x)
    unusual()[what](model)
    if "x" in layer.adapters:
        lora.activate(model, "x")
    assert not as_one.serves([layer], x)


def test_rows_of_several_adapters_go_one_by_one() -> None:
    model = adapted()
    with lora.for_rows(model, ["default", None]):
        assert not as_one.serves([model.blocks[0].attention.q_proj], torch.zeros(2, 1, 32))


def test_hooks_on_a_wrapped_layer_see_its_call() -> None:
    model, seen = adapted(), []
    model.blocks[0].attention.k_proj.register_forward_hook(lambda *_: seen.append(1))
    model.blocks[1].attention.q_proj.register_full_backward_hook(lambda *_: seen.append(2))
    model.blocks[1].mlp.down_proj.register_full_backward_hook(lambda *_: seen.append(3))
    model(TOKENS).sum().backward()
    assert seen == [1, 3, 2]


def one_layer(kind: str) -> tuple[LoraLinear, Tensor]:
    """A linear (96, 96) with an adapter, and an x of as many rows as the native kernels want."""
    layer = adapted(kind, hidden_size=96, head_size=24, num_kv_heads=4).blocks[0].attention.q_proj
    assert isinstance(layer, LoraLinear)
    x = torch.randn(2, 40, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert as_one.serves([layer], x)
    return layer, x


@pytest.mark.parametrize("kind", KINDS)
def test_results_may_be_changed_in_place(kind: str) -> None:
    layer, x = one_layer(kind)
    right = torch.autograd.grad(layer(x).sum(), x)[0]
    y = layer(x)
    y *= 2
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * right)
    one, two = as_one.linears([layer, layer], x)
    one += two
    assert_near(torch.autograd.grad(one.sum(), x)[0], 2 * right, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_pass_within_autocast_has_the_forwards_formats(kind: str) -> None:
    layer, x = one_layer(kind)
    leaves = [x, *layer.adapters.parameters()]
    right = torch.autograd.grad(layer(x).square().sum(), leaves)
    loss = layer(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_by_the_weights_of_the_forward_pass(kind: str) -> None:
    """`functional_call` puts a module's own back before the gradients are taken."""
    layer, x = one_layer(kind)
    right = torch.autograd.grad(layer(x).sum(), x)[0]
    name = "base.weight" if kind == "float" else "base.scale" if kind == "int8" else "base.nested_absmax"
    own, other = layer.get_parameter(name), torch.zeros_like(layer.get_parameter(name))
    y = torch.func.functional_call(layer, {name: other}, (x,))
    found = torch.autograd.grad(y.sum(), x)[0]
    layer.get_submodule("base").register_parameter(name.removeprefix("base."), torch.nn.Parameter(other, False))
    assert torch.equal(found, torch.autograd.grad(layer(x).sum(), x)[0]) and not torch.equal(found, right)
    assert own.any()


def test_weights_changed_before_the_backward_pass_are_seen() -> None:
    layer, x = one_layer("float")
    y = layer(x)
    with torch.no_grad():
        layer.base.weight.mul_(2)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_on_the_meta_device_and_in_float16() -> None:
    layer, x = one_layer("float")
    assert not as_one.serves([layer], x.half()), "adapters in fp32 are faster"
    assert layer.to("meta")(x.to("meta")).shape == x.shape
