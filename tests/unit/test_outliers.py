"""Outliers found where they are, planted where they are wanted, and what keeping them in float changes."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from minillm import cli
from minillm.errors import InputError, NumericsError
from minillm.model import Decoder
from minillm.ops import int8
from minillm.quant.convert import Quantisation, quantize_linears
from minillm.quant.outlier_picture import draw
from minillm.quant.outlier_table import describe
from minillm.quant.outliers import Outliers, find
from minillm.quant.plant import Where, plant
from scripts.bench import outliers as bench
from tests import decoders, tiny_checkpoint
from tests.error import assert_near

_FALCON = decoders.SHAPES["falcon"]
#: Every topology: one norm for two branches, one each, sequential; gated, plain and relu; groups of 1, 2 and 4 heads.
SHAPES: dict[str, dict[str, Any]] = {
    **decoders.SHAPES,
    "falcon_7b": {**_FALCON, "mlp_bias": True, "attention_bias": True},
    "falcon_40b": {**_FALCON, "num_kv_heads": 2, "parallel_norms": 2, "tied_embeddings": False},
    "relu": {**decoders.SHAPES["falcon_rw"], "activation": "relu", "num_kv_heads": 1},
}


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(131, (rows, length), generator=torch.Generator().manual_seed(1))


def inputs_of(model: Decoder, ids: Tensor) -> dict[str, Tensor]:
    """What each linear reads, recorded plainly: name -> (B, T, K)."""
    read: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: read.__setitem__(name, inputs[0].detach())

    hooks = [
        module.register_forward_pre_hook(remember(name))
        for name, module in model.named_modules()
        if name.endswith("_proj")
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return read


@pytest.fixture(scope="module")
def model() -> Decoder:
    return decoders.decoder()


@pytest.fixture(scope="module")
def found(model: Decoder) -> Outliers:
    return find(model, tokens(), threshold=2.5, sweep=(2.0, 4.0))


def test_statistics_are_those_of_the_plain_recording(model: Decoder, found: Outliers) -> None:
    ids = tokens()
    read = inputs_of(model, ids)
    assert [linear.name for linear in found.linears] == [n for n, _ in model.named_modules() if n.endswith("_proj")]
    for linear in found.linears:
        size = read[linear.name].abs()  # (B, T, K)
        outlier = size >= 2.5
        assert torch.equal(linear.largest, size.amax(dim=(0, 1)))
        assert torch.equal(linear.hits, outlier.sum(dim=(0, 1)))
        assert linear.columns == outlier.any(dim=1).any(dim=0).nonzero().flatten().tolist()
        assert linear.kept == pytest.approx(outlier.any(dim=1).double().mean())  # a row is a call
        disturbed = outlier.any(dim=2)
        assert linear.disturbed == pytest.approx(disturbed.double().mean())
        raised = ids[disturbed].tolist()
        assert linear.raised == {i: raised.count(i) for i in set(raised)}
    every = torch.stack([(x.abs() >= 2.5).any(dim=2) for x in read.values()]).double()  # (linears, B, T)
    assert torch.allclose(found.positions, every.mean(dim=(0, 1)))
    (top, *_), seen = found.raisers(), ids.flatten().tolist()
    assert top.seen == seen.count(top.token)
    assert top.share == pytest.approx(every[:, ids == top.token].mean())


def test_the_threshold_is_inclusive() -> None:
    model = decoders.decoder(num_layers=1)
    size = float(inputs_of(model, tokens())["blocks.0.attention.q_proj"].abs().max())
    for threshold, count in ((size, 1), (math.nextafter(size, math.inf) * 1.000001, 0)):
        found = find(model, tokens(), threshold=threshold).at(0, "q_proj")
        assert found is not None and len(found.columns) == count


def test_an_int8_model_is_looked_at_the_same_way_and_left_alone(model: Decoder) -> None:
    rounded = copy.deepcopy(model)
    names = quantize_linears(rounded, "int8")
    before, state = rounded(tokens()), copy.deepcopy(rounded.state_dict())
    found = find(rounded, tokens(), threshold=2.5, sweep=(3.0,))
    assert [linear.name for linear in found.linears] == names and found.tokens == tokens().numel()
    assert torch.equal(rounded(tokens()), before)
    assert all(torch.equal(value, state[key]) for key, value in rounded.state_dict().items())
    assert not any(module._forward_pre_hooks for module in rounded.modules())
    assert found.sweep[0].error < 1e-6  # its own weights are the reference


def test_the_sweep_is_the_error_of_the_definition(model: Decoder, found: Outliers) -> None:
    assert [split.threshold for split in found.sweep] == [0.0, 2.0, 4.0, math.inf]
    read, sizes = inputs_of(model, tokens()), {}
    for split in found.sweep:
        errors: dict[str, float] = {}
        kept = products = alone = 0.0
        for name, x in read.items():
            linear: Any = model.get_submodule(name)
            weight = int8.Weight(*int8.quantise_ref(linear.weight.detach())[:2])
            exact = x.double() @ linear.weight.detach().double().T
            rows = torch.stack([int8.linear_ref(row, weight, split.threshold) for row in x])
            errors[name] = float((rows.double() - exact).norm() / exact.norm())
            outlier = x.abs() >= split.threshold
            share, sizes[name] = float(outlier.any(dim=1).double().mean()), linear.weight.numel()
            kept, products = kept + share / len(read), products + share * sizes[name]
            alone += float(outlier.double().mean()) * sizes[name]
        assert split.error == pytest.approx(sum(errors.values()) / len(errors), rel=1e-4)
        assert (split.worst_name, split.worst) == (
            max(errors, key=errors.__getitem__),
            pytest.approx(max(errors.values()), rel=1e-4),
        )
        assert split.columns == pytest.approx(kept)
        assert split.products == pytest.approx(products / sum(sizes.values()))
        assert split.products_alone == pytest.approx(alone / sum(sizes.values()))


def test_systematic_is_a_quarter_of_the_layers_and_six_percent_of_the_tokens() -> None:
    """Column 3 of layer 0 alone: of 4 layers it is systematic, of 5 it is not; nor in too few tokens."""
    for layers, systematic in ((4, True), (5, False)):
        model = decoders.decoder(num_layers=layers)
        with torch.no_grad():
            for block in model.blocks:
                block.attention_norm.weight.fill_(1e-3)
                block.mlp_norm.weight.fill_(1e-3)
            model.blocks[0].attention_norm.weight[3] = 1e4
        (feature,) = find(model, tokens()).features()
        assert (feature.column, feature.layers, feature.systematic) == (3, 1 / layers, systematic)
        assert feature.tokens == pytest.approx(1 / (2 * layers), rel=0.2)  # nearly every token, in one of 2 L inputs


@pytest.mark.parametrize("where", ["norms", "values", "inner"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plant_changes_no_logit_and_is_found_exactly(shape: str, where: Where) -> None:
    """Its size is chosen so that each planted column crosses a threshold that nothing crossed before."""
    model = decoders.decoder(**SHAPES[shape])
    if where == "inner" and model.config.mlp == "plain" and model.config.activation != "relu":
        with pytest.raises(InputError, match="lets no factor pass"):
            plant(model, 2.0, where=(where,))
        return
    ids, planted = tokens(), copy.deepcopy(model)
    before = model(ids)
    largest = {linear.name: linear.largest for linear in find(model, ids).linears}
    threshold = 1.5 * max(float(sizes.max()) for sizes in largest.values())
    columns = plant(planted, 7.0, channels=3, where=(where,), seed=5)
    assert_near(planted(ids), before)
    amount = 2.0 * threshold / min(float(largest[name][list(those)].min()) for name, those in columns.items())
    planted = copy.deepcopy(model)
    assert plant(planted, amount, channels=3, where=(where,), seed=5) == columns
    assert_near(planted(ids), before)
    found = find(planted, ids, threshold=threshold)
    assert {linear.name: tuple(linear.columns) for linear in found.linears if linear.columns} == columns
    heads = model.config.heads_per_group if where == "values" else 1
    assert all(len(those) == 3 * heads for those in columns.values())


def test_a_power_of_two_changes_no_bit() -> None:
    for shape in ("llama", "falcon_7b", "falcon_40b", "falcon_rw"):
        model = decoders.decoder(**SHAPES[shape])
        before = model(tokens())
        plant(model, 64.0, channels=[1, 30])
        assert torch.equal(model(tokens()), before), shape


def test_norms_reach_every_linear_that_reads_them() -> None:
    for shape, count in (("llama", 5), ("falcon_7b", 4), ("falcon_40b", 4), ("falcon_rw", 4)):
        columns = plant(decoders.decoder(**SHAPES[shape]), 8.0, channels=[4])
        assert len(columns) == 2 * count and set(columns.values()) == {(4,)}, shape


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"amount": 0.0}, "amount is 0.0"),
        ({"amount": math.inf}, "amount is inf"),
        ({"channels": 33}, "33 channels of 32"),
        ({"channels": [32]}, "numbers from 0 to 31"),
        ({"channels": []}, "numbers from 0 to 31"),
    ],
)
def test_bad_plants_change_nothing(options: dict[str, Any], said: str) -> None:
    model = decoders.decoder()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=said):
        plant(model, **{"amount": 2.0, **options})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_int8_comes_after_planting() -> None:
    model = decoders.decoder()
    quantize_linears(model, Quantisation("int8", skip=("blocks.0", "lm_head")))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"blocks\.1\.attention\.q_proj is no float linear but LinearInt8"):
        plant(model, 2.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_the_split_saves_what_planted_outliers_cost() -> None:
    """The paper's claim on one model: relative error of the logits, and how it grows from a = 1 to a = 32."""
    model = decoders.decoder(hidden_size=128, ffn_size=192)
    exact, errors = model(tokens()), {}
    for amount in (1.0, 32.0):
        planted = copy.deepcopy(model)
        plant(planted, amount, channels=[7])
        for way in ("split", "exact split", "no split"):
            rounded = copy.deepcopy(planted)
            bench.WAYS[way](rounded, 6.0)
            errors[way, amount] = float((rounded(tokens()) - exact).norm() / exact.norm())
    assert errors["no split", 32.0] > 4 * errors["no split", 1.0], errors
    assert errors["split", 32.0] < errors["no split", 32.0] / 3, errors
    assert errors["exact split", 32.0] < 1.2 * errors["exact split", 1.0], errors


def test_bad_input_is_said(model: Decoder) -> None:
    with pytest.raises(InputError, match=r"threshold is 0\.0"):
        find(model, tokens(), threshold=0.0)
    with pytest.raises(InputError, match=r"threshold is nan"):
        find(model, tokens(), sweep=[math.nan])
    with pytest.raises(InputError, match="no tokens"):
        find(model, tokens(0))
    with pytest.raises(InputError, match="no float or int8 linear"):
        find(model, tokens(), skip=("attention", "mlp", "lm_head"))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.embed.weight.fill_(math.nan)
    with pytest.raises(NumericsError, match=r"blocks\.0\.attention\.q_proj reads a NaN"):
        find(broken, tokens())
    assert not any(module._forward_pre_hooks for module in broken.modules())


def test_a_linear_that_is_passed_by_is_not_silently_empty(model: Decoder) -> None:
    bypassed = copy.deepcopy(model)
    linear: Any = bypassed.blocks[1].attention.v_proj
    bypassed.blocks[1].attention.v_proj = _Bypass(linear)
    with pytest.raises(InputError, match=r"v_proj\.inner read 0 tokens of 12"):
        find(bypassed, tokens())


class _Bypass(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.forward(x)  # no hook sees this


# --- for people


def test_the_table_fits_80_columns_and_names_places(found: Outliers) -> None:
    console = Console(width=200, highlight=False, record=True, file=io.StringIO())  # in 80 long lines would be wrapped
    console.print(describe(found, "a model", lambda i: f"[bold]{i}[/bold]"))
    text = console.export_text()
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    top = found.raisers()[0]
    assert f"[bold]{top.token}[/bold]" in text  # a token is no markup
    feature = found.features()[0]
    assert any(line.split()[:1] == [str(feature.column)] for line in lines)
    worst = max(found.linears, key=lambda linear: float(linear.largest.max()))
    assert f"{int(worst.largest.argmax())} of {worst.projection.removesuffix('_proj')}" in text
    assert "none float" in text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_checkpoint.write(tmp_path / "model")
    text, out, png = tmp_path / "text.txt", tmp_path / "out.json", tmp_path / "out.png"
    text.write_text("def main(): return the other thing\n" * 30)
    arguments = ["outliers", str(folder), "--text", str(text), "--sweep", "--plant", "64", "--channels", "2"]
    assert cli.main([*arguments, "--json", str(out), "--png", str(png)]) == 0
    assert "2 columns of the stream have systematic outliers" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert len(saved["linears"]) == 14 and saved["sweep"][-1]["threshold"] is None
    planted = {column["column"] for column in saved["linears"][0]["columns"]}
    assert len(planted) == 2 and planted == {feature["column"] for feature in saved["features"]}
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--threshold", "0"], "threshold is 0.0"),
        (["--tokens", "0"], "tokens is 0"),
        (["--plant", "-1"], "amount is -1.0"),
        (["--text", "none.txt"], "none.txt: not a readable"),
        (["--png", "nowhere/x.png"], "there is no folder nowhere"),
        (["--plant", "2", "--quantize", "int8"], "plant before quantising"),
    ],
)
def test_bad_commands_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    folder = tiny_checkpoint.write(tmp_path / "model")
    assert cli.main(["outliers", str(folder), *options]) == 2
    assert said in capsys.readouterr().err


def test_the_picture_of_a_model_without_outliers(model: Decoder, tmp_path: Path) -> None:
    draw(find(model, tokens(), threshold=1e6), tmp_path / "none.png", "none")
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_the_bench_says_how_to_make_its_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bash scripts/demo\.sh"):
        bench.main(bench.Outliers(model=tmp_path))


def test_the_ways_of_the_bench_are_what_they_say() -> None:
    """A split with float weights is float where every column is kept; all are int8 otherwise, and KL sees it."""
    model = decoders.decoder()
    for name, threshold, least, most in (
        ("float", 6.0, 0.0, 0.0),
        ("exact split", 1e-9, 0.0, 1e-9),
        ("exact split", 1e9, 1e-7, 1.0),
        ("weights only", 6.0, 1e-7, 1.0),
        ("no split", 6.0, 1e-7, 1.0),
    ):
        changed = copy.deepcopy(model)
        bench.WAYS[name](changed, threshold)
        assert least <= bench.divergence(model, changed, tokens()) <= most, name
