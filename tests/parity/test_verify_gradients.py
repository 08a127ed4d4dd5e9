"""`minillm verify --gradients`: wrong derivatives are found where they are made, and right ones are never accused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from minillm import cli
from minillm.checkpoint.load import load_model
from minillm.errors import InputError
from minillm.model import Decoder
from minillm.verify.checkpoints import Settings
from minillm.verify.checkpoints import verify as verify_folder
from minillm.verify.trace import Trace
from tests import tiny
from tests.conftest import Pair

pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from minillm.verify import transformers_oracle  # noqa: E402
from minillm.verify.report import Report  # noqa: E402
from minillm.verify.run import examine, oracle_formula, record, verify_models  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def verify(ours: Decoder, theirs: Any, length: int = 24) -> Report:
    tokens = tiny.tokens(2, length)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[1, : length // 4] = False
    oracle = theirs if isinstance(theirs, transformers_oracle.Oracle) else transformers_oracle.Oracle(theirs)
    return verify_models(ours, oracle, tokens, keep, gradients=True)


class _Backward(torch.autograd.Function):
    """x, with its gradient changed on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


def reads_with(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """The module sends a changed gradient to what it reads."""
    module.register_forward_pre_hook(lambda _, args: (_Backward.apply(args[0], change), *args[1:]))


def parameter_with(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """The module's weight gets a changed gradient."""
    module.weight.register_hook(change)


@dataclass(frozen=True)
class Fault:
    variant: str
    side: Literal["ours", "theirs"]
    module: str
    plant: Callable[[nn.Module, Callable[[Tensor], Tensor]], None]
    change: Callable[[Tensor], Tensor]
    operation: str
    cause: str = ""


def one_late(gradient: Tensor) -> Tensor:
    return gradient.roll(1, dims=1)


def _spoilt_row(gradient: Tensor) -> Tensor:
    changed = gradient.clone()
    changed[0, 3] *= 1.5
    return changed


FAULTS = {
    "detached up": Fault(
        "llama_gqa_8_2", "ours", "blocks.1.mlp.up_proj", reads_with, torch.zeros_like, "blocks.1.mlp_norm",
        "term_missing",
    ),
    "detached key": Fault(
        "falcon_40b", "ours", "blocks.0.attention.k_proj", reads_with, torch.zeros_like, "blocks.0.attention_norm",
        "term_missing",
    ),
    "value counted twice": Fault(
        "llama_mha", "ours", "blocks.0.attention.v_proj", reads_with, lambda g: 2 * g, "blocks.0.attention_norm",
        "term_twice",
    ),
    "attention detached from the stream": Fault(
        "falcon_7b", "ours", "blocks.1.attention_norm", reads_with, torch.zeros_like, "blocks.0", "term_missing"
    ),
    "half a gradient": Fault(
        "falcon_rw", "ours", "blocks.0.mlp.up_proj", reads_with, lambda g: g / 2, "blocks.0.mlp_norm", "scaled"
    ),
    "one token late": Fault(
        "llama_gqa_8_4", "ours", "lm_head", reads_with, one_late, "norm", "shifted"
    ),
    "clipped": Fault(
        "llama_mha", "ours", "lm_head", reads_with, lambda g: g.clamp(-1e-3, 1e-3), "norm"
    ),
    "one token in one row": Fault("llama_mha", "ours", "norm", reads_with, _spoilt_row, "blocks.1"),
    "a weight's gradient doubled": Fault(
        "llama_mqa", "ours", "blocks.1.mlp.gate_proj", parameter_with, lambda g: 2 * g, "blocks.1.mlp.gate_proj.weight",
        "scaled",
    ),
    "a weight without gradient": Fault(
        "falcon_7b", "ours", "blocks.0.attention_norm", parameter_with, torch.zeros_like,
        "blocks.0.attention_norm.weight", "zero",
    ),
    "tied embedding, only one use": Fault(
        "falcon_7b", "ours", "lm_head_of_tied", reads_with, torch.zeros_like, "embed.weight", "term_missing"
    ),
    "their key detached": Fault(
        "llama_gqa_8_2", "theirs", "model.layers.0.self_attn.k_proj", reads_with, torch.zeros_like,
        "blocks.0.attention_norm", "term_missing",
    ),
    "their fused qkv halved": Fault(
        "falcon_40b", "theirs", "transformer.h.1.self_attention.query_key_value", reads_with, lambda g: g / 2,
        "blocks.1.attention_norm", "scaled",
    ),
    "1% more": Fault(
        "llama_deep", "ours", "blocks.3.mlp.down_proj", reads_with, lambda g: g * 1.01, "blocks.3.mlp.up_proj", "scaled"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault(pair: Callable[[str], Pair], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, made = FAULTS[name], pair(FAULTS[name].variant)
    ours, theirs = copy.deepcopy(made.ours), copy.deepcopy(made.theirs)
    if fault.module == "lm_head_of_tied":  # the head multiplies with the embedding, detached
        monkeypatch.setattr(
            type(ours), "head", lambda self, hidden: nn.functional.linear(hidden, self.embed.weight.detach())
        )
    else:
        fault.plant((ours if fault.side == "ours" else theirs).get_submodule(fault.module), fault.change)
    report = verify(ours, theirs)
    first = report.first
    assert first is not None, "not found"
    assert (first.backward, first.operation, first.side, first.cause) == (
        True,
        fault.operation,
        fault.side,
        fault.cause,
    )
    assert first.what == f"gradient of {fault.operation}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if turn % 6 == 0 else pytest.mark.slow) for turn, name in enumerate(tiny.VARIANTS)],
)
def test_no_correct_variant_is_called_faulty(
    pair: Callable[[str], Pair], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    """Every gradient of every variant is there on both sides, and right."""
    folder = tiny.save(pair(name).theirs, tmp_path)
    theirs = transformers_oracle.load(folder, dtype=dtype)
    for length in (5, 60):
        ours = load_model(folder, dtype=dtype)
        report = verify(ours, theirs, length)
        assert report.first is None, report.first
        parameters = {name for name, _ in ours.named_parameters()}
        assert parameters <= {result.operation.name for result in report.gradients}
        assert all(result.ours is not None and result.theirs is not None for result in report.gradients)
        assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_short_texts_with_falcons_softmax_in_16_bits(
    pair: Callable[[str], Pair], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Eager Falcon keeps its weights rounded, and takes w (g - sum w g) from those: with few keys all is rounding."""
    folder = tiny.save(pair("falcon_7b").theirs, tmp_path)
    ours, theirs = load_model(folder, dtype=dtype), transformers_oracle.load(folder, dtype=dtype, attention="eager")
    keep = torch.ones(2, 4, dtype=torch.bool)
    keep[1, 0] = False
    for seed in range(8, 14):
        report = verify_models(ours, theirs, tiny.tokens(2, 4, seed), keep, gradients=True)
        assert report.first is None, report.first


def test_a_fault_in_the_forward_is_not_one_of_the_backward(pair: Callable[[str], Pair]) -> None:
    """Its own derivatives are right, and differ because what they are of differs."""
    made = pair("llama_gqa_8_2")
    ours = copy.deepcopy(made.ours)
    ours.blocks[1].mlp.register_forward_hook(lambda _, args, out: out * 1.01)
    report = verify(ours, copy.deepcopy(made.theirs))
    assert [(fault.operation, fault.backward) for fault in report.faults][:1] == [("blocks.1", False)]
    assert "inherited" in {result.verdict for result in report.gradients}


def test_folders_and_saved_traces(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    folder, trace = tiny.save(pair("falcon_7b").theirs, tmp_path / "model"), tmp_path / "trace.safetensors"
    settings = Settings(gradients=True)
    report = verify_folder(folder, settings, save_trace=trace)
    assert report.verdict == "equal" and report.gradients
    again = verify_folder(folder, settings, against=trace)
    assert len(again.gradients) == len(report.gradients)
    assert {result.verdict for result in again.gradients} == {"equal"}
    assert not verify_folder(folder, against=trace).gradients


def test_a_trace_without_gradients_is_refused(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    folder, trace = tiny.save(pair("llama_mha").theirs, tmp_path / "model"), tmp_path / "trace.safetensors"
    verify_folder(folder, save_trace=trace)
    with pytest.raises(InputError, match="holds no gradients; save it again with --gradients"):
        verify_folder(folder, Settings(gradients=True), against=trace)


# --- frozen parameters


def freeze(model: nn.Module, frozen: Callable[[str], bool]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name))
    return model


FROZEN: dict[str, Callable[[str], bool]] = {
    "none": lambda name: False,
    "embedding": lambda name: "embed" in name,
    "all but the head": lambda name: "lm_head" not in name,
}


@pytest.mark.parametrize("theirs", FROZEN)
@pytest.mark.parametrize("ours", FROZEN)
def test_what_is_frozen_is_passed_over(pair: Callable[[str], Pair], ours: str, theirs: str) -> None:
    made = pair("llama_gqa_8_2")
    mine, other = (
        freeze(copy.deepcopy(model), FROZEN[frozen]) for model, frozen in ((made.ours, ours), (made.theirs, theirs))
    )
    report = verify(mine, other)
    assert report.first is None, report.first
    found = {result.operation.name: result for result in report.gradients}
    for side, kept in (("ours", ours), ("theirs", theirs)):
        recorded = {name for name, result in found.items() if getattr(result, side) is not None}
        assert "lm_head.weight" in recorded
        assert ("embed.weight" in recorded) == (kept == "none")


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_all_of_it_frozen_is_refused(pair: Callable[[str], Pair], side: str) -> None:
    made = {name: copy.deepcopy(getattr(pair("llama_mha"), name)) for name in ("ours", "theirs")}
    freeze(made[side], lambda name: True)
    with pytest.raises(InputError, match="every parameter is frozen"):
        verify(**made)


# --- what is said


def test_one_token_of_every_head_is_located(pair: Callable[[str], Pair]) -> None:
    """The first token's gradient of q is all rounding, which is not what the others are measured by."""
    made = pair("llama_gqa_8_2")
    ours = copy.deepcopy(made.ours)
    reads_with(ours.blocks[0].attention.o_proj, _spoilt_row)
    where = {fault.operation: fault.where for fault in verify(ours, copy.deepcopy(made.theirs)).faults}
    assert where["blocks.0.attention.q_rotated"] == "only token 3"


def _without_rows(gradient: Tensor) -> Tensor:
    changed = gradient.clone()
    changed[:40] = 0
    return changed


def test_zeros_in_a_weights_gradient_are_numbers_that_should_be_none(pair: Callable[[str], Pair]) -> None:
    made = pair("llama_gqa_8_2")
    ours = copy.deepcopy(made.ours)
    parameter_with(ours.embed, _without_rows)
    report = verify(ours, copy.deepcopy(made.theirs))
    first, second = tiny.tokens(2, 24)[:, :-1].tolist()  # the last token of a row predicts nothing
    rows = {token for token in (*first, *second[6:]) if token < 40}
    assert report.first is not None and 0 < len(rows) < 40
    assert report.first.text == f"with {64 * len(rows)} of {131 * 64} numbers zero"


def test_parameters_have_their_own_shape(pair: Callable[[str], Pair]) -> None:
    made = pair("falcon_40b")
    shapes = {result.operation.name: result.shape for result in verify(made.ours, made.theirs).gradients}
    assert all(shapes[name] == tuple(parameter.shape) for name, parameter in made.ours.named_parameters())


def test_what_was_not_recorded_is_no_difference(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    """Gradients that differ by rounding do not inherit it from what nobody recorded."""
    folder = tiny.save(pair("falcon_7b").theirs, tmp_path)
    oracle = transformers_oracle.load(folder, dtype=torch.bfloat16)
    tokens = tiny.tokens(2, 24)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    ours = record(load_model(folder, dtype=torch.bfloat16), tokens, keep, gradients=True)
    theirs = oracle.record(tokens, keep, gradients=True)
    formula = oracle_formula(oracle, tokens, keep)
    seen = [{result.verdict for result in examine(ours, theirs, formula, names=("a", "b")).results}]
    del theirs.tensors["blocks.0.mlp.inner"]
    report = examine(ours, theirs, formula, names=("a", "b"))
    assert "inherited" not in seen[0] and "unknown" in {result.verdict for result in report.results}
    assert "inherited" not in {result.verdict for result in report.gradients}


# --- what cannot be compared


def test_a_trace_of_another_shape_within(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    folder, trace = tiny.save(pair("falcon_7b").theirs, tmp_path / "falcon"), tmp_path / "trace.safetensors"
    other = tiny.save(pair("llama_gqa_8_2").theirs, tmp_path / "llama")
    verify_folder(other, Settings(gradients=True), save_trace=trace)
    report = verify_folder(folder, Settings(gradients=True), against=trace)
    assert {"shape"} < {fault.cause for fault in report.faults if fault.backward}
    assert {fault.side for fault in report.faults} == {"theirs"}


def test_a_trace_of_nothing_is_refused(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    folder = tiny.save(pair("llama_mha").theirs, tmp_path / "model")
    Trace().save(tmp_path / "trace.safetensors")
    with pytest.raises(InputError, match="holds no whole forward"):
        verify_folder(folder, against=tmp_path / "trace.safetensors")


def test_a_scalar_head(tmp_path: Path) -> None:
    """Of a reward model: against another run, whole or saved; it predicts no token, and transformers has no such."""
    import transformers

    config = transformers.LlamaConfig(**tiny.VARIANTS["llama_gqa_8_2"].fields, num_labels=1)
    folder = tiny.save(transformers.LlamaForSequenceClassification(config), tmp_path / "model")
    trace = tmp_path / "trace.safetensors"
    assert verify_folder(folder, against=folder, save_trace=trace).verdict == "equal"
    assert verify_folder(folder, against=trace).verdict == "equal"
    with pytest.raises(InputError, match="has a scalar head, and --gradients"):
        verify_folder(folder, Settings(gradients=True), against=folder)
    with pytest.raises(InputError, match="transformers loads to compare has none"):
        verify_folder(folder)


@pytest.mark.parametrize("option", ["--json", "--png", "--save-trace"])
def test_a_missing_folder_is_said_first(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path), option, str(tmp_path / "none" / "file")]) == 2
    assert "there is no folder" in capsys.readouterr().err
