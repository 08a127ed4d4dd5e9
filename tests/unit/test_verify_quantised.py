"""`minillm verify FLOAT --against QUANTISED`: what rounding to 8 and 4 bits changes is named as that."""

from __future__ import annotations

from pathlib import Path

import pytest

import minillm
from minillm.errors import InputError
from minillm.quant.convert import Quantisation
from minillm.verify.checkpoints import verify
from tests.decoders import decoder


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (Quantisation("int8"), "by LLM.int8() with outliers from 6 on"),
        (Quantisation("int8", threshold=0.0), "by LLM.int8() without outliers"),
        (Quantisation("nf4"), "with its weight in NF4, doubly quantised"),
        (Quantisation("nf4", double_quant=False), "with its weight in NF4"),
        (Quantisation("fp4", double_quant=False), "with its weight in FP4"),
    ],
)
def test_every_linear_is_named_as_quantised_and_nothing_else(how: Quantisation, text: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "head_size": 16, "norm_eps": 1e-5}
    model = decoder(**wide)
    for block in model.blocks:  # activations with outliers
        block.attention_norm.weight.data[3] = 9.0
        block.mlp_norm.weight.data[5] = -9.0
    minillm.save(model, tmp_path / "float")
    minillm.save(minillm.load_model(tmp_path / "float", quantize=how), tmp_path / "small")
    report = verify(tmp_path / "float", against=tmp_path / "small")
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {fault.operation.split(".")[-1] for fault in report.faults} == linears
    assert {fault.side for fault in report.faults} == {"theirs"}
    first = report.first
    assert first is not None
    assert (first.operation, first.cause, first.text) == ("blocks.0.attention.q_proj", "quantised", text)
    assert {fault.cause for fault in report.faults} == {"quantised"}


def test_a_quantised_model_is_not_compared_with_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    minillm.save(decoder(), tmp_path / "float")
    minillm.save(minillm.load_model(tmp_path / "float", quantize="int8"), tmp_path / "small")
    with pytest.raises(InputError, match="is quantised; verify the float model, with this one as --against"):
        verify(tmp_path / "small")
