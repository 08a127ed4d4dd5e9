"""A verification as table, picture and JSON: what must be in them, how wide, and which JSON is refused."""

from __future__ import annotations

import copy
import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console

from minillm.errors import InputError
from minillm.model import Decoder
from minillm.verify.compare import ULPS, Between, Errors, Result, Verdict
from minillm.verify.heatmap import draw
from minillm.verify.operations import Operation
from minillm.verify.report import Fault, Report
from minillm.verify.run import examine, own_formula, record
from minillm.verify.table import describe, sentence
from tests.decoders import decoder

NAMES = ("minillm 0.1.0", "transformers 5.23.0")
ABOUT = {"dtype": "bfloat16", "tokens": "2 x 12"}
KINDS = ("equal", "ours", "theirs", "infinite", "partial")


def scale(factor: float, *parameters: str) -> Callable[[Decoder], None]:
    def plant(model: Decoder) -> None:
        with torch.no_grad():
            for name in parameters:
                model.get_parameter(name).mul_(factor)

    return plant


def verified(plant: Callable[[Decoder], None] | None = None, *, side: str = "ours", without: str = "") -> Report:
    """Two runs of a tiny Llama of three layers in bf16; one of them changed, or not recorded in part."""
    right = decoder(num_layers=3).bfloat16()
    wrong = copy.deepcopy(right)
    if plant is not None:
        plant(wrong)
    tokens = torch.randint(131, (2, 12), generator=torch.Generator().manual_seed(0))
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[1, :5] = False
    traces = [record(wrong, tokens, keep), record(right, tokens, keep)]
    if without:
        traces[0].tensors = {name: x for name, x in traces[0].items() if without not in name}
    ours, theirs = traces if side == "ours" else traces[::-1]
    return examine(ours, theirs, own_formula(right, tokens, keep), names=NAMES, about=ABOUT)


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return {
        "equal": verified(),
        "ours": verified(scale(1.25, "blocks.1.attention.k_proj.weight", "blocks.2.mlp_norm.weight")),
        "theirs": verified(scale(1.25, *(f"blocks.{n}.attention.o_proj.weight" for n in range(3))), side="theirs"),
        "infinite": verified(scale(math.inf, "blocks.1.mlp.down_proj.weight")),
        "partial": verified(without="scores"),
    }


def deep(report: Report, layers: int) -> Report:
    """The last layer's results over and over."""
    within = [r for r in report.results if r.operation.layer is not None]
    last = max(r.operation.layer for r in within)
    more = [
        replace(r, operation=replace(r.operation, name=r.operation.name.replace(f".{last}", f".{n}", 1), layer=n))
        for n in range(last + 1, layers)
        for r in within
        if r.operation.layer == last
    ]
    return replace(report, results=(*report.results[:-2], *more, *report.results[-2:]))


def errors(times: float) -> Errors:
    return Errors(local=times * 1e-3, allowed=1e-3, chain=2e-3, largest=1.0)


def one(ours: Errors | None, theirs: Errors | None, verdict: Verdict, apart: float = 0.5) -> Report:
    """A report of one operation."""
    between = None if ours is None or theirs is None else Between(apart, apart, 1.0, (4,) + (0,) * len(ULPS))
    return Report(*NAMES, {}, (Result(Operation("logits", "logits"), (1, 2), ours, theirs, between, verdict),))


# --- table


def printed(report: Report, width: int = 80, *, full: bool = False, colour: bool = False) -> str:
    file = io.StringIO()
    system = "truecolor" if colour else None
    console = Console(file=file, width=width, color_system=system, force_terminal=colour)  # type: ignore[arg-type]
    console.print(describe(report, full=full))
    return file.getvalue()


def words(text: str) -> str:
    """Without line breaks."""
    return " ".join(text.split())


def rows(report: Report, label: str) -> list[list[str]]:
    return [line.split() for line in printed(report).splitlines() if line.split()[:1] == [label]]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("kind", KINDS)
def test_no_line_is_too_long_and_no_name_cut(reports: dict[str, Report], kind: str, width: int, full: bool) -> None:
    text = printed(deep(reports[kind], 80), width, full=full)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    if full:
        shorts = {r.operation.short for r in reports[kind].results if r.operation.layer is not None}
        assert {short: sum(line.split()[:1] == [short] for line in text.splitlines()) for short in shorts} == {
            short: 80 for short in shorts
        }


def test_headline(reports: dict[str, Report]) -> None:
    lines = printed(reports["equal"]).splitlines()
    assert lines[:2] == ["minillm 0.1.0 against transformers 5.23.0", "dtype bfloat16, tokens 2 x 12"]


def test_one_line_a_layer(reports: dict[str, Report]) -> None:
    labels = ["before", *map(str, range(80)), "after"]
    found = [line.split()[0] for line in printed(deep(reports["equal"], 80)).splitlines() if line[:6].strip() in labels]
    assert found == labels


def test_a_layer_shows_its_worst_operation_and_its_drift(reports: dict[str, Report]) -> None:
    (layer,) = rows(reports["ours"], "1")
    assert layer[1] == "k_proj"
    times, allowed = float(layer[2]), float(layer[3])
    assert times > 10 and 0 < allowed < 1
    assert float(layer[4]) > 2 * float(layer[5])  # drift, ours and theirs
    assert 0 < float(layer[6]) < 1
    assert layer[7:] == ["OURS", "WRONG"]
    assert rows(reports["ours"], "0")[0][6:] == ["0", "equal", "bits"]


def test_the_layer_of_the_first_fault_is_expanded(reports: dict[str, Report]) -> None:
    report = reports["ours"]
    shorts = {r.operation.short for r in report.results if r.operation.layer == 1}
    text = printed(report)
    assert "\nlayer 1\n" in text and "\nlayer 2\n" not in text
    for short in shorts:
        assert len([line for line in text.splitlines() if line.startswith(short + " ")]) == 1
    assert "layer 1\n" not in printed(reports["equal"])


def test_an_operation_in_full(reports: dict[str, Report]) -> None:
    """error / allowed of both, relative, largest, 1 - cosine, ULPs, verdict."""
    report = reports["ours"]
    line = next(line.split() for line in printed(report).splitlines() if line.startswith("k_proj "))
    between = next(r.between for r in report.results if r.operation.name == "blocks.1.attention.k_proj")
    assert between is not None
    assert float(line[3]) == pytest.approx(between.relative, rel=0.1)
    assert float(line[4]) == pytest.approx(between.largest, rel=0.1)
    assert float(line[5]) < 1e-4 < float(line[3])  # scaled, so of the same direction
    assert len(line[6]) == len(ULPS) + 1
    assert [letter != "." for letter in line[6]] == [count > 0 for count in between.ulps]
    assert line[7:] == ["OURS", "WRONG"]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict", "apart", "word"),
    [
        (errors(0.1), errors(0.2), "equal", 0.0, "equal bits"),
        (errors(0.1), errors(0.2), "noise", 0.5, "noise"),
        (errors(7.0), errors(7.0), "noise", 0.0, "both alike"),
        (errors(7.0), errors(0.1), "ours", 0.5, "OURS WRONG"),
        (errors(0.1), errors(7.0), "theirs", 0.5, "THEIRS WRONG"),
        (errors(7.0), errors(9.0), "both", 0.5, "BOTH WRONG"),
        (errors(0.1), None, "noise", 0.5, "ours only"),
        (None, errors(0.1), "noise", 0.5, "theirs only"),
        (None, None, "unknown", 0.5, "not recorded"),
    ],
)
def test_verdicts_in_words(
    ours: Errors | None, theirs: Errors | None, verdict: Verdict, apart: float, word: str
) -> None:
    report = one(ours, theirs, verdict, apart)
    for full in (False, True):
        lines = [line for line in printed(report, full=full).splitlines() if " logits " in f" {line}"]
        assert sum(line.endswith("  " + word) for line in lines) == 1 + full
    assert ("both alike: " in printed(report)) == (word == "both alike")


def test_the_worst_is_wrong_first_and_then_by_its_worse_side() -> None:
    kinds: list[tuple[float, float, Verdict]] = [(0.5, 0.5, "noise"), (0.9, 0.1, "noise"), (7.0, 7.0, "noise")]
    level, uneven, alike = (one(errors(ours), errors(theirs), verdict).results for ours, theirs, verdict in kinds)
    wrong = one(errors(0.1), errors(3.0), "theirs")
    assert rows(replace(wrong, results=level + uneven), "after")[0][2:4] == ["0.90", "0.10"]
    assert rows(replace(wrong, results=alike + wrong.results), "after")[0][2:4] == ["0.10", "3.00"]


def test_a_layer_wrong_on_both_sides_in_different_places() -> None:
    first, second = one(errors(7.0), errors(0.1), "ours"), one(errors(0.1), errors(9.0), "theirs")
    (row,) = rows(replace(first, results=first.results + second.results), "after")
    assert row[1:4] == ["logits", "0.10", "9.00"] and row[-2:] == ["BOTH", "WRONG"]


def test_colour_adds_no_word(reports: dict[str, Report]) -> None:
    for report in reports.values():
        coloured = printed(report, colour=True)
        assert "\x1b[" in coloured
        console = Console(file=io.StringIO(), width=80)
        plain = "\n".join(console.render_str("").from_ansi(line).plain for line in coloured.splitlines())
        assert plain.split() == printed(report).split()


def test_markup_in_names_is_printed_as_it_is(reports: dict[str, Report]) -> None:
    report = replace(reports["equal"], ours="[red]model[/red]", remarks=("norm_eps is [1]",))
    assert "[red]model[/red] against" in printed(report) and "norm_eps is [1]" in printed(report)


def test_what_was_not_recorded_is_said(reports: dict[str, Report]) -> None:
    total = len(reports["partial"].results)
    assert f"3 of {total} operations were not recorded on both sides." in printed(reports["partial"])
    assert "not recorded" not in printed(reports["equal"])


def test_gradients_have_a_table_of_their_own(reports: dict[str, Report]) -> None:
    backward = tuple(reversed(reports["equal"].results))
    text = printed(replace(reports["equal"], gradients=backward))
    table = text[text.index("Gradients, in the order of the backward pass") :].splitlines()
    assert [line.split()[0] for line in table[3:8]] == ["after", "2", "1", "0", "before"]


def test_the_gradient_of_the_embedding_stands_before_the_layers(reports: dict[str, Report]) -> None:
    embed = reports["equal"].results[0]
    weight = replace(embed, operation=Operation("embed.weight", "gradient"))
    text = printed(replace(reports["equal"], gradients=(embed, weight)), full=True)
    table = text[text.index("Gradients, in the order of the backward pass") :]
    assert "W embed" in table and "after" not in table


# --- verdict


def test_no_difference(reports: dict[str, Report]) -> None:
    assert "No operation differs beyond rounding. Logits: equal bits." in words(printed(reports["equal"]))
    apart = words(printed(one(errors(0.1), errors(0.2), "noise", 0.015)))
    assert "No operation differs beyond rounding. Logits: largest difference 1.5e-2, relative 1.5e-2." in apart


def test_the_first_difference_is_told_and_the_others_in_short(reports: dict[str, Report]) -> None:
    report = reports["ours"]
    assert [fault.operation for fault in report.faults] == ["blocks.1.attention.k_proj", "blocks.2.mlp_norm"]
    text = words(printed(replace(report, remarks=("something else",), seconds={"compare": 1.5})))
    assert words(sentence(report.faults[0], report)) in text
    assert "Also: blocks.2.mlp_norm, ours: " in text
    assert text.endswith("Remark: something else Seconds: compare 1.50")


def test_sentence(reports: dict[str, Report]) -> None:
    fault = Fault("blocks.0.attention.scores", "theirs", error=4e2, allowed=1e-3, layers=(0, 1, 2), cause="alibi")
    report = replace(reports["equal"], faults=(fault,))
    start = "First difference: blocks.0.attention.scores, theirs (transformers 5.23.0): "
    none = " None of the causes that are tried gives these numbers."
    assert sentence(fault, report) == start + "4.0e5 times what rounding allows, in every layer." + none

    some = replace(fault, layers=(0, 2), error=0.012, where="only head 3", text="with ALiBi times 2")
    assert sentence(some, replace(report, faults=(some,))) == (
        start + "12 times what rounding allows, only head 3, in layers 0, 2. It equals the formula with ALiBi times 2."
    )

    backward = replace(fault, layers=(2, 1))
    assert ", in layers 1-2." in sentence(backward, replace(report, faults=(backward,)))

    known = replace(fault, layers=(0,), error=math.inf, known="falcon-eager-alibi")
    text = sentence(known, report)  # not the first one of this report
    assert text.startswith("blocks.0.attention.scores, theirs (transformers 5.23.0): not finite, or of another shape. ")
    assert "Known fault falcon-eager-alibi: ALiBi is added twice" in text
    assert 'Instead: load with attn_implementation="sdpa"' in text


# --- picture


def size(path: Path) -> tuple[int, int]:
    """Width and height out of the PNG's header."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def panels(path: Path) -> Any:
    """The coloured cells of a picture of few layers, as numbers (rows, columns, red green blue) from 0 to 1."""
    from matplotlib.image import imread

    picture = imread(path)[:, :, :3]
    height, width = picture.shape[:2]
    return picture[height // 8 : height // 3, : int(0.92 * width)]  # the colour bar is right of them


def reddish(path: Path) -> tuple[int, int]:
    """How many pixels beyond 1 (orange to dark red) the left and the right panel have."""
    cells = panels(path)
    red = (cells[..., 0] > 0.45) & (cells[..., 2] < 0.3)
    half = cells.shape[1] // 2
    return int(red[:, :half].sum()), int(red[:, half:].sum())


@pytest.mark.parametrize("kind", ["theirs", "infinite", "partial"])
def test_the_picture_shows_the_side_that_is_wrong(reports: dict[str, Report], kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(reports[kind], tmp_path / "verify.png")
    assert size(tmp_path / "verify.png") == (1800, 780)
    ours, theirs = reddish(tmp_path / "verify.png")
    assert (ours > 500) == (kind == "infinite")
    assert (theirs > 500) == (kind == "theirs")


def test_the_first_fault_is_circled(reports: dict[str, Report], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(reports["theirs"], tmp_path / "circled.png")
    draw(replace(reports["theirs"], faults=()), tmp_path / "plain.png")
    circled, plain = (panels(tmp_path / name) for name in ("circled.png", "plain.png"))
    black = [int((picture.max(-1) < 0.2).sum()) for picture in (circled, plain)]
    assert 200 < black[0] - black[1] < 800  # a ring, not a disc


def test_the_picture_of_many_layers_is_higher_within_reason(reports: dict[str, Report], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(deep(reports["theirs"], 80), tmp_path / "deep.png")
    width, height = size(tmp_path / "deep.png")
    assert width == 1800 and 1500 < height < 2100


def test_the_picture_of_next_to_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(one(errors(0.1), None, "noise"), tmp_path / "one.png")
    draw(one(None, None, "unknown"), tmp_path / "none.png")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["none.png", "one.png"]


def test_without_matplotlib(reports: dict[str, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r'^drawing needs matplotlib; pip install "minillm\[plot\]"$'):
        draw(reports["equal"], tmp_path / "verify.png")
    assert not [*tmp_path.iterdir()]


# --- JSON


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads((files("minillm.verify") / "schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def valid(schema: dict[str, Any]) -> Callable[[Any], bool]:
    validators = pytest.importorskip("jsonschema").Draft202012Validator
    validators.check_schema(schema)
    return validators(schema).is_valid


def written(report: Report) -> Any:
    return json.loads(json.dumps(report.as_json(), allow_nan=False))


@pytest.mark.parametrize("kind", KINDS)
def test_reports_fit_the_schema(reports: dict[str, Report], kind: str, valid: Callable[[Any], bool]) -> None:
    report = reports[kind]
    assert valid(written(report))
    assert valid(written(replace(report, gradients=report.results, remarks=("x",))))


BROKEN: dict[str, Callable[[Any], Any]] = {
    "a field too many": lambda r: r.update(more=1),
    "a field too few": lambda r: r.pop("remarks"),
    "another format": lambda r: r.update(format="minillm verify 2"),
    "an unknown verdict": lambda r: r.update(verdict="perhaps"),
    "equal with faults": lambda r: r.update(verdict="equal"),
    "a fault without faults": lambda r: r.update(faults=[]),
    "about with numbers": lambda r: r["about"].update(tokens=24),
    "negative seconds": lambda r: r["seconds"].update(compare=-1.0),
    "other edges": lambda r: r["ulp_edges"].pop(),
    "an unknown side": lambda r: r["faults"][0].update(side="both"),
    "a fault with a field too many": lambda r: r["faults"][0].update(more=1),
    "a layer twice": lambda r: r["faults"][0].update(layers=[1, 1]),
    "an unknown verdict of an operation": lambda r: r["operations"][0].update(verdict="wrong"),
    "no name": lambda r: r["operations"][0].update(name=""),
    "an operation with a field too few": lambda r: r["operations"][0].pop("between"),
    "half an error": lambda r: r["operations"][0]["ours"].pop("chain"),
    "an error with a field too many": lambda r: r["operations"][0]["ours"].update(more=1),
    "a negative error": lambda r: r["operations"][0]["ours"].update(local=-0.1),
    "infinity in other words": lambda r: r["operations"][0]["ours"].update(local="Infinity"),
    "a bin too few": lambda r: r["operations"][0]["between"]["ulps"].pop(),
    "a cosine of two": lambda r: r["operations"][0]["between"].update(cosine=2.0),
    "a broken gradient": lambda r: r["gradients"].append({}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_reports_are_refused(reports: dict[str, Report], name: str, valid: Callable[[Any], bool]) -> None:
    report = written(reports["ours"])
    assert valid(report)
    BROKEN[name](report)
    assert not valid(report)


def test_the_schema_knows_the_fields_of_the_classes(schema: dict[str, Any]) -> None:
    parts = schema["$defs"]
    for name, kind in {"fault": Fault, "errors": Errors, "between": Between}.items():
        assert [*parts[name]["properties"]] == parts[name]["required"] == [field.name for field in fields(kind)]
    assert parts["operation"]["properties"]["verdict"]["enum"] == [*get_args(Verdict)]
    assert schema["properties"]["ulp_edges"]["const"] == [*ULPS]
    assert parts["between"]["properties"]["ulps"]["minItems"] == len(ULPS) + 1
    assert [*schema["properties"]] == schema["required"]
