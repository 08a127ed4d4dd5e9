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

from minillm.checkpoint.load import load_model
from minillm.model import Decoder
from minillm.verify.checkpoints import Settings
from minillm.verify.checkpoints import verify as verify_folder
from tests import tiny
from tests.conftest import Pair

pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from minillm.verify import transformers_oracle  # noqa: E402
from minillm.verify.report import Report  # noqa: E402
from minillm.verify.run import verify_models  # noqa: E402

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
    from minillm.errors import InputError

    folder, trace = tiny.save(pair("llama_mha").theirs, tmp_path / "model"), tmp_path / "trace.safetensors"
    verify_folder(folder, save_trace=trace)
    with pytest.raises(InputError, match="holds no gradients; save it again with --gradients"):
        verify_folder(folder, Settings(gradients=True), against=trace)
