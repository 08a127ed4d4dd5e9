"""int8 and 4-bit checkpoints between minillm and transformers with bitsandbytes, in both directions."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minillm
from tests import tiny
from tests.error import distance

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

TOKENS = tiny.tokens(2, 16)


def theirs(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("name", ["llama_gqa_8_2", "llama_all_bias", "llama_tied", "mistral_head_dim"])
def test_theirs_here_and_back(name: str, tmp_path: Path) -> None:
    """Every code and scale, bit for bit; logits as far as their fp16 goes: a code that falls on the other side of a
    rounding is 1/127 of the largest number."""
    tiny.save(tiny.build(tiny.VARIANTS[name]), tmp_path / "float")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    saved = theirs(tmp_path / "float", quantization_config=config, dtype=torch.float16)
    saved.save_pretrained(tmp_path / "theirs")
    ours = minillm.load_model(tmp_path / "theirs")
    assert distance(logits(ours), logits(saved)) < 0.05
    minillm.save(ours, tmp_path / "ours")
    back = theirs(tmp_path / "ours")
    expected, found = saved.state_dict(), back.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], x) for key, x in expected.items())
    assert torch.equal(logits(back), logits(saved))


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", False)])
def test_their_four_bits_here_and_back(kind: str, double: bool, tmp_path: Path) -> None:
    # rows of whole blocks: elsewhere bitsandbytes takes the scales of others (tests/parity/test_nf4_bitsandbytes.py)
    shape = tiny.Variant("Llama", {**tiny.VARIANTS["llama_gqa_8_2"].fields, "intermediate_size": 128})
    tiny.save(tiny.build(shape), tmp_path / "float")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    saved = theirs(tmp_path / "float", quantization_config=config, dtype=torch.float32)
    saved.save_pretrained(tmp_path / "theirs")
    ours = minillm.load_model(tmp_path / "theirs")
    assert distance(logits(ours), logits(saved.train())) < 1e-5  # in eval() their kernel multiplies in bf16
    minillm.save(ours, tmp_path / "ours")
    expected, found = (load_file(tmp_path / part / "model.safetensors") for part in ("theirs", "ours"))
    assert set(found) == set(expected)
    json_too = [key for key in expected if "quant_state" not in key]
    assert all(torch.equal(found[key], expected[key]) for key in json_too)
    assert torch.equal(logits(theirs(tmp_path / "ours").train()), logits(saved))


def test_ours_made_of_float_loads_there(tmp_path: Path) -> None:
    tiny.save(tiny.build(tiny.VARIANTS["llama_gqa_8_2"]), tmp_path / "float")
    ours = minillm.load_model(tmp_path / "float", dtype="float16", quantize="int8")
    minillm.save(ours, tmp_path / "ours")
    back = theirs(tmp_path / "ours")
    assert distance(logits(ours), logits(back)) < 0.05
    state = {name: x for name, x in back.state_dict().items() if name.endswith("SCB")}
    assert len(state) == 14  # seven linears in each of two layers


def test_they_do_not_quantise_falcon(tmp_path: Path) -> None:
    """transformers 5.23 finds no linear in a Falcon (its FalconLinear is a subclass) and leaves it float, but writes a
    quantization_config. Such a folder loads here as the float model it is; when this fails, look what changed."""
    tiny.save(tiny.build(tiny.VARIANTS["falcon_7b"]), tmp_path / "float")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    theirs(tmp_path / "float", quantization_config=config, dtype=torch.float16).save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    ours = minillm.load_model(tmp_path / "theirs")
    assert not [x for x in ours.parameters() if x.dtype == torch.int8]
