"""What `minillm adapter` says of an adapter, and `scripts/merge.py` of a merge."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import minillm
from minillm import cli, lora
from minillm.errors import CheckpointError, InputError
from minillm.lora.describe import describe, singular_values
from scripts.merge import Merge
from scripts.merge import main as merge
from tests import tiny_checkpoint
from tests.error import assert_near


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and an adapter of ranks 3 and 5 on it."""
    tiny_checkpoint.write(tmp_path / "base")
    model = minillm.load_model(tmp_path / "base")
    lora.add(model, targets=["q_proj", "down_proj"], rank=3, alpha=6, rank_pattern={"down_proj": 5}, rslora=True)
    lora.save(model, tmp_path / "fresh")
    with torch.no_grad():
        for parameter in lora.parameters(model, "default"):
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    lora.save(model, tmp_path / "trained", base="someone/base")
    return tmp_path


def test_singular_values_are_those_of_the_product() -> None:
    a, b = torch.randn(4, 9), torch.randn(6, 4)
    assert_near(singular_values(a, b), torch.linalg.svdvals(b @ a)[:4], 1e-5)
    assert_near(singular_values(torch.randn(7, 5), torch.zeros(3, 7)), torch.zeros(3), 1e-5)


def test_every_module_is_described(folder: Path) -> None:
    model = minillm.load_model(folder / "base")
    found = describe(folder / "trained", model)
    assert found.base == "someone/base" and not found.does_nothing and not found.others
    assert [each.rank for each in found.modules if "down" in each.module] == [5, 5]
    layer = model.blocks[1].attention.q_proj
    change = next(each for each in found.modules if each.module == "model.layers.1.self_attn.q_proj")
    delta = layer.adapters["described"].delta()
    sigma = torch.linalg.svdvals(delta)[:3]
    p = sigma / sigma.sum()
    assert change.scale == pytest.approx(6 / math.sqrt(3))
    assert change.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert change.largest == pytest.approx(float(sigma[0]), rel=1e-5)
    assert change.effective_rank == pytest.approx(math.exp(float(-(p * p.log()).sum())), rel=1e-4)
    assert change.relative == pytest.approx(float(delta.norm() / layer.weight.norm()), rel=1e-5)
    assert describe(folder / "trained").modules[0].relative is None


def test_a_fresh_adapter_does_nothing(folder: Path) -> None:
    found = describe(folder / "fresh")
    assert found.does_nothing and all(each.effective_rank == 0 for each in found.modules)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["adapter", str(folder / "trained"), "--json", str(folder / "x.json")]) == 0
    output = capsys.readouterr().out
    assert "model.layers.0.mlp.down_proj" in output and "rsLoRA" in output and "someone/base" in output
    assert json.loads((folder / "x.json").read_text())["modules"][0]["rank"] in (3, 5)
    assert cli.main(["adapter", str(folder / "fresh")]) == 0
    assert "never trained" in capsys.readouterr().out
    tiny_checkpoint.write(folder / "other", hidden_size=48)
    assert cli.main(["adapter", str(folder / "trained"), "--base", str(folder / "other")]) == 2
    assert "another base model or rank" in capsys.readouterr().err
    assert cli.main(["adapter", str(folder / "base")]) == 2
    assert "adapter_config.json: missing" in capsys.readouterr().err


def test_merging_writes_the_model_with_its_change(folder: Path) -> None:
    result = merge(Merge(str(folder / "base"), folder / "trained", folder / "merged"))
    model = minillm.load_model(folder / "base")
    lora.load(model, folder / "trained")
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert_near(minillm.load_model(folder / "merged")(tokens), model(tokens))
    assert result["layers"] == 4 and result["logits_max"] < 1e-3
    with pytest.raises(InputError, match="holds a model; give --overwrite"):
        merge(Merge(str(folder / "base"), folder / "trained", folder / "merged"))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: missing"):
        merge(Merge(str(folder / "base"), folder / "base", folder / "elsewhere"))
