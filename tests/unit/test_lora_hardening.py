"""Adapters where other code meddles: recomputation, casts, quantising after the fact, files that lie, long patterns."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillm import lora
from minillm.errors import CheckpointError, InputError
from minillm.lora.peft_format import WEIGHTS
from minillm.model import Decoder
from minillm.quant.convert import Quantisation, quantize_linears
from tests.decoders import SHAPES, decoder
from tests.error import assert_near
from tests.unit.test_lora import ATTENTION, TOKENS, adapted, logits, seeded, shaken

WIDE = {"hidden_size": 64, "head_size": 16, "ffn_size": 128}


def two(*, recompute: bool = False, **fields: Any) -> Decoder:
    """Adapters "a" and "b" on all linears, "a" active."""
    model = decoder(**WIDE).train()
    model.recompute = recompute
    for seed, name in enumerate("ba"):
        lora.add(model, name=name, targets="all-linear", rank=3, init="linear", generator=seeded(), **fields)
        shaken(model, name, seed)
    return model


def gradients(model: Decoder) -> dict[str, Tensor]:
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def train(model: Decoder, base: bool) -> None:
    for name, x in model.named_parameters():
        x.requires_grad_(base or ".adapters." in name)


def then_both(model: Decoder) -> AbstractContextManager[None]:
    lora.activate(model, "a", "b")
    return nullcontext()


MEDDLING: dict[str, tuple[Callable[[Decoder], Any], Callable[[Decoder], Any]]] = {
    "disabled backward": (lambda _: nullcontext(), lora.disabled),
    "by row, then not": (lambda model: lora.for_rows(model, ["a", "b", None]), lambda _: nullcontext()),
    "rows of others": (
        lambda model: lora.for_rows(model, ["a", "b", "a"]), lambda model: lora.for_rows(model, ["b", "a", "b"])
    ),
    "another one too": (lambda _: nullcontext(), then_both),
    "the last block before": (lambda model: lora.for_rows(model, ["b", "b", "b"]), lora.disabled),
}  # fmt: skip


KINDS: list[dict[str, Any]] = [{}, {"dora": True}, {"dropout": 0.3}]


@pytest.mark.parametrize("base", [False, True], ids=["adapters trained", "base trained too"])
@pytest.mark.parametrize(
    ("case", "fields"),
    [(case, fields) for case in MEDDLING for fields in KINDS]
    + [(case, {"retrain": ["mlp_norm"]}) for case in ("disabled backward", "another one too")],
    ids=str,
)
def test_recomputing_uses_the_adapters_of_the_forward_pass(case: str, fields: dict[str, Any], base: bool) -> None:
    forward, backward = MEDDLING[case]
    found = []
    for recompute in (False, True):
        model = two(recompute=recompute, **fields)
        train(model, base)
        torch.manual_seed(0)
        with forward(model):
            loss = model(TOKENS).square().mean()
        with backward(model):
            train(model, base)
            loss.backward(retain_graph=True)
            loss.backward()  # a context is entered once more
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and len(found[0]) >= 28
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_the_base_recomputed_after_its_block_is_the_base() -> None:
    found = []
    for recompute in (False, True):
        model = two(recompute=recompute)
        model.requires_grad_(True)
        with lora.disabled(model):
            loss = model(TOKENS).square().mean()
        loss.backward()
        found.append(gradients(model))
    assert not any(".adapters." in name for name in found[0]) and found[0].keys() == found[1].keys()
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_after_recomputing_the_choice_is_what_it_was() -> None:
    model = two(recompute=True)
    with lora.for_rows(model, ["a", "a", "a"]):
        loss = model(TOKENS).square().mean()
    with lora.disabled(model):
        base = logits(model.eval())
        model.train()
        loss.backward()
        assert torch.equal(logits(model.eval()), base)
    twin = copy.deepcopy(model).train()
    lora.remove(model, "b")
    loss = twin(TOKENS).square().mean()
    lora.activate(twin, "a", "b")
    loss.backward()  # by the choice of the copy, not of the model it was made of


def test_recomputing_for_adapters_that_were_frozen_meanwhile_is_no_silent_matter() -> None:
    model = two(recompute=True)
    loss = model(TOKENS).square().mean()
    lora.activate(model, "b")
    with pytest.raises(RuntimeError, match="different number of tensors"):
        loss.backward()


def test_embeddings_by_row_recomputed() -> None:
    found = []
    for recompute in (False, True):
        model = decoder(**WIDE, tied_embeddings=True).train()
        model.recompute = recompute
        for seed, name in enumerate("ab"):
            lora.add(model, name=name, targets=["embed", "v_proj"], rank=2, init="linear", generator=seeded())
            shaken(model, name, seed)
        model.requires_grad_(True)
        with lora.for_rows(model, ["b", None, "a"]):
            loss = model(TOKENS).square().mean()
        loss.backward()
        found.append(gradients(model))
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items()) and found[0].keys() == found[1].keys()


# --- casts


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", [{"dora": True, "init": "pissa"}, {"retrain": ["norm"], "biases": "all"}], ids=str)
def test_a_cast_of_the_model_rounds_no_adapter(cast: torch.dtype, fields: dict[str, Any]) -> None:
    model = adapted("falcon_rw", **fields)
    before = {name: x.clone() for name, x in model.state_dict().items() if ".adapters." in name}
    model.to(cast)
    state = model.state_dict()
    assert all(torch.equal(state[name], x) and state[name].dtype == torch.float32 for name, x in before.items())
    assert {x.dtype for name, x in state.items() if ".adapters." not in name} == {cast}
    assert logits(model).dtype == cast
    model.double()
    assert {x.dtype for x in model.state_dict().values()} == {torch.float64}
    model.to(cast)
    assert {x.dtype for name, x in model.state_dict().items() if ".adapters." in name} == {torch.float32}


def test_a_cast_keeps_an_a_shared_and_gradients_alike() -> None:
    model = decoder(**SHAPES["falcon"], **WIDE, family="falcon")
    lora.add(model, targets=["query_key_value"])
    shaken(model)
    model(TOKENS).square().mean().backward()
    model.bfloat16().to("cpu")
    q, k = (getattr(model.blocks[0].attention, f"{name}_proj").adapters["default"] for name in "qk")  # type: ignore[union-attr]
    assert q.a is k.a and q.a.grad.dtype == torch.float32


# --- quantising beneath adapters


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"init": "olora"}, {"lora_bias": True}], ids=str)
def test_quantising_after_adapters_is_adapting_after_quantising(kind: str, fields: dict[str, Any]) -> None:
    late, early = adapted(**fields), decoder(**WIDE)
    state = {name: x for name, x in late.state_dict().items() if ".adapters." in name}
    assert all(name.endswith(".base") == ("attention" in name) for name in quantize_linears(late, kind))
    quantize_linears(early, kind)
    with lora.disabled(late):
        assert torch.equal(logits(late), logits(early))
    lora.add(early, targets=ATTENTION, **fields)
    early.load_state_dict(state, strict=False)
    assert torch.equal(logits(late), logits(early))
    assert_near(logits(lora.merged(late).model), logits(lora.merged(early).model), 0.0)
    lora.remove(late, "default")
    lora.remove(early, "default")
    assert torch.equal(logits(late), logits(early))
    trained = {name for name, x in late.named_parameters() if x.requires_grad}
    assert "norm.weight" in trained and not any("_proj" in name for name in trained)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_retrained_weight_is_not_quantised(kind: str) -> None:
    model = adapted(targets=["q_proj"], retrain=["v_proj"])
    before = logits(model)
    with pytest.raises(InputError, match=r"blocks\.0\.attention\.v_proj is retrained by an adapter; name it in skip"):
        quantize_linears(model, kind)
    assert torch.equal(logits(model), before)
    quantize_linears(model, Quantisation(kind, skip=("lm_head", "v_proj")))
    assert logits(model).isfinite().all()
    with_bias = adapted("falcon_rw", targets=["q_proj"], biases="all")
    expected = adapted("falcon_rw", targets=["q_proj"], biases="all")
    quantize_linears(with_bias, kind)  # its own bias beside codes
    quantised = decoder(**SHAPES["falcon_rw"], **WIDE, family="falcon")
    quantize_linears(quantised, kind)
    lora.add(quantised, targets=["q_proj"], biases="all")
    for mine, other in zip(lora.parameters(quantised, "default"), lora.parameters(expected, "default"), strict=True):
        mine.data = other.data.clone()
    assert torch.equal(logits(with_bias), logits(quantised))


# --- files


def _spoiled(**values: Any) -> Callable[[dict[str, Tensor]], str]:
    def spoil(tensors: dict[str, Tensor]) -> str:
        key = next(key for key in tensors if key.endswith(values.get("end", "lora_A.weight")))
        if "number" in values:
            tensors[key].view(-1)[3] = values["number"]
        if "dtype" in values:
            tensors[key] = tensors[key].to(values["dtype"])
        if "shape" in values:
            tensors[key] = torch.zeros(values["shape"])
        return key

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_spoiled(number=float("nan")), "holds a NaN or infinity"),
        (_spoiled(number=float("-inf"), end="lora_B.weight"), "holds a NaN or infinity"),
        (_spoiled(number=float("inf"), end="magnitude_vector"), "holds a NaN or infinity"),
        (_spoiled(dtype=torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
        (_spoiled(dtype=torch.float8_e5m2), "is torch.float8_e5m2"),
        (_spoiled(dtype=torch.int64), "is torch.int64"),
        (_spoiled(shape=(0, 64)), "has no numbers"),
    ],
)
def test_files_that_would_spoil_the_model(spoil: Callable[..., str], words: str, tmp_path: Path) -> None:
    model = adapted(dora=True)
    lora.save(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = spoil(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    fresh = decoder(**WIDE)
    before = logits(fresh)
    with pytest.raises(CheckpointError, match=rf"{re.escape(key)} {words}"):
        lora.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), before) and not lora.adapters(fresh)


def test_a_number_too_large_for_fp32_is_refused(tmp_path: Path) -> None:
    lora.save(adapted(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(iter(tensors))
    tensors[key] = tensors[key].double()
    tensors[key][0, 0] = 1e300
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="holds a NaN or infinity"):
        lora.load(decoder(**WIDE), tmp_path)


def test_magnitudes_of_any_sign_are_the_adapters_own(tmp_path: Path) -> None:
    model = adapted(dora=True)
    with torch.no_grad():
        magnitude = model.blocks[0].attention.q_proj.adapters["default"].magnitude  # type: ignore[union-attr]
        magnitude[0], magnitude[1] = -1.0, 0.0
    lora.save(model, tmp_path)
    again = decoder(**WIDE)
    lora.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert_near(logits(lora.merged(model).model), logits(model))


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(CheckpointError, match=rf"{path}: cannot be written \(.*\); choose another"):
            lora.save(adapted(), path)
    assert file.read_text() == "mine"
    (tmp_path / "adapter" / WEIGHTS).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        lora.save(adapted(), tmp_path / "adapter")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for path in (tmp_path, tmp_path / "below"):
        with pytest.raises(CheckpointError, match=r"cannot be written \(Permission denied\)"):
            lora.save(adapted(), path)


# --- fused weights


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_of_a_fused_weight(init: str) -> None:
    model = decoder(**SHAPES["falcon"], **WIDE, family="falcon")
    before = logits(model)
    lora.add(model, targets=["query_key_value"], init=init, rank=20)  # more than the 16 rows of k or v
    assert_near(logits(model), before, 1e-5)
    shaken(model)
    with lora.disabled(model):
        assert torch.equal(logits(model), before)
    merged = lora.merged(model).model
    assert_near(logits(merged), logits(model))
    with pytest.raises(InputError, match="70 directions out of a weight"):
        lora.add(decoder(**SHAPES["falcon"], **WIDE, family="falcon"), targets=["query_key_value"], init=init, rank=70)


def test_parts_of_a_fused_weight_with_ranks_of_their_own(tmp_path: Path) -> None:
    model = adapted("falcon", targets=["query_key_value"], rank_pattern={"q_proj": 2})
    expected = logits(model)
    lora.save(model, tmp_path)
    again = decoder(**SHAPES["falcon"], **WIDE, family="falcon")
    lora.load(again, tmp_path)
    assert_near(logits(again), expected, 2e-6)


# --- by row


def per_row(model: Decoder, rows: list[str | None]) -> Tensor:
    """Each row through the model that its adapter alone makes."""
    found = []
    for place, name in enumerate(rows):
        if name is None:
            with lora.disabled(model):
                found.append(logits(model)[place])
            continue
        twin = copy.deepcopy(model)
        lora.activate(twin, name)
        found.append(logits(lora.merged(twin).model)[place])
    return torch.stack(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fields", [{"dora": True}, {"dora": True, "init": "pissa"}, {"targets": ["embed", "o_proj"]}])
def test_by_row_is_each_merged_model(shape: str, fields: dict[str, Any]) -> None:
    fields = {"targets": "all-linear", **fields}
    model = decoder(**SHAPES[shape], **WIDE)
    for seed, name in enumerate("ab"):
        lora.add(model, name=name, rank=seed + 2, **fields)
        shaken(model, name, seed)
    rows = ["b", None, "a"]
    expected = per_row(model, rows)
    with lora.for_rows(model, rows):
        assert_near(logits(model), expected, 2e-5)


def test_a_retrained_layer_has_names_for_what_it_shares_with_its_base() -> None:
    model = decoder()
    lora.add(model, name="other", targets=["lm_head"])
    lora.add(model, targets=["q_proj"], retrain=["lm_head", "norm"])
    shaken(model)
    head: Any = model.lm_head
    own: nn.ParameterDict = head.base.adapters["default"]
    assert torch.equal(head.base.weight, own["weight"]) and head.base.bias is None
    with lora.disabled(model):
        assert torch.equal(head.base.weight, head.base.base.weight)
    for name in ("native", "in_features", "anything"):
        with pytest.raises(AttributeError, match=f"'Retrained' object has no attribute '{name}'"):
            getattr(head.base, name)


def test_compiled_blocks_are_recomputed_too() -> None:
    found = []
    for recompute in (False, True):
        model = decoder(**WIDE, num_layers=1).train()
        model.recompute = recompute
        lora.add(model, targets=["v_proj"], init="linear", generator=seeded())
        (torch.compile(model, backend="eager") if recompute else model)(TOKENS).square().mean().backward()
        found.append(gradients(model))
    for name, x in found[0].items():
        assert_near(found[1][name], x, 1e-5, name)
