"""The script end to end on a folder of a few files: train, stop, continue, save; and what it says to bad input."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import minillm
from minillm.data.corpus import Windows
from minillm.errors import ConfigError, InputError
from minillm.training.metrics import read_lines
from minillm.training.recipe import Interrupted, run
from scripts import pretrain
from scripts.pretrain import Pretrain, main
from tests.error import assert_near
from tests.training.stopping import stop_at


@pytest.fixture
def recipe(tmp_path: Path) -> Pretrain:
    """Six steps of a model of 10,000 parameters on eight files of arithmetic."""
    text = tmp_path / "text"
    text.mkdir()
    for index in range(8):
        lines = [f"{a} + {index} = {a + index}\n" for a in range(40)]
        (text / f"table_{index}.txt").write_text("".join(lines))
    return Pretrain(
        text=text,
        output=tmp_path / "out",
        held_out=0.3,
        vocabulary=270,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        feed_forward=32,
        context=16,
        steps=6,
        batch=4,
        micro_batch=3,
        precision="float32",
        evaluations=3,
        prompts=("1 + ", "x" * 100),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(minillm.load_model(folder).named_parameters())


def history(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "training.json").read_text()))


def test_a_run_leaves_a_model_a_curve_and_figures(recipe: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    result = main(recipe)
    assert sorted(path.name for path in recipe.output.iterdir()) == [
        *("config.json", "curve.png", "generation_config.json", "metrics.jsonl", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "training.json"),
    ]
    assert (recipe.output / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert result["steps"] == 6 and result["tokens"] == 6 * 4 * 16
    assert result["parameters"] == sum(parameter.numel() for parameter in weights(recipe.output).values())
    assert 3 < result["held_out_loss"] < 6
    assert result["held_out_perplexity"] == pytest.approx(math.exp(result["held_out_loss"]))
    told = history(recipe.output)
    assert len(told["losses"]) == 6 and [step for step, _ in told["evaluated"]] == [2, 4, 6]
    lines = read_lines(recipe.output / "metrics.jsonl")
    assert [line["loss"] for line in lines if "loss" in line] == told["losses"]
    assert [[line["step"], line["held_out"]] for line in lines if "held_out" in line] == told["evaluated"]
    assert [line["tokens"] for line in lines if "tokens" in line] == [64 * step for step in range(1, 7)]
    assert all(0 < line["gradient_norm"] < 100 for line in lines if "loss" in line)
    output = capsys.readouterr().out
    assert output.count("--- greedy\n1 + ") == 1, "the long prompt does not fit the context and is passed over"


def test_bits_per_byte_is_the_loss_in_other_units(recipe: Pretrain) -> None:
    """Without merges every token is one byte, and the joints between files are none: loss / ln 2 * tokens / bytes."""
    result = main(replace(recipe, vocabulary=257, steps=1))
    model, tokenizer = minillm.load(recipe.output)
    held = pretrain.read(replace(recipe, vocabulary=257)).held_out
    windows = Windows(held, context=16, seed=0)
    rows = torch.stack([windows.window(index) for index in range(len(windows))])
    text_bytes = int((rows[:, 1:] != tokenizer.bos_id).sum())
    surprise = torch.nn.functional.cross_entropy(
        model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
    )
    # both are sums of some thousand fp32 numbers, in batches of another size
    assert result["held_out_bits_per_byte"] == pytest.approx(surprise.item() / math.log(2) / text_bytes, rel=1e-5)


@pytest.mark.oracle
def test_transformers_reads_the_model_and_the_text(recipe: Pretrain) -> None:
    transformers = pytest.importorskip("transformers")
    main(recipe)
    model, tokenizer = minillm.load(recipe.output)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(recipe.output)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.output)
    ids = tokenizer.encode("7 + 1 = 8\n")
    assert their_tokenizer("7 + 1 = 8\n").input_ids == ids
    with torch.inference_mode():
        assert_near(model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits)


def test_interrupted_and_resumed_equals_uninterrupted(recipe: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = replace(recipe, output=recipe.output.with_name("straight"))
    main(straight)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(Interrupted, match=r"step 3 is saved; go on with: .*--resume"):
            main(recipe)
    assert not (recipe.output / "config.json").exists()
    main(replace(recipe, resume=True))
    for name, tensor in weights(straight.output).items():
        assert torch.equal(weights(recipe.output)[name], tensor), name
    ours, theirs = history(recipe.output), history(straight.output)
    assert ours["losses"] == theirs["losses"] and ours["evaluated"] == theirs["evaluated"]
    ours, theirs = (read_lines(each.output / "metrics.jsonl") for each in (recipe, straight))
    for key in ("step", "tokens", "loss", "learning_rate", "gradient_norm", "held_out"):
        assert [line.get(key) for line in ours] == [line.get(key) for line in theirs], key
    assert not (recipe.output / "state.safetensors").exists()


def test_an_unfinished_run_is_continued_only_as_it_began(recipe: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(3, patch)
        main(recipe)
    with pytest.raises(InputError, match="unfinished run; give --resume to go on, --overwrite to start anew"):
        main(recipe)
    with pytest.raises(InputError, match=r"learning_rate is 0\.1, the run began with 0\."):
        main(replace(recipe, resume=True, learning_rate=0.1))
    assert recipe.text is not None
    (recipe.text / "table_1.txt").write_text("something else\n" * 30)
    with pytest.raises(InputError, match="the text has changed"):
        main(replace(recipe, resume=True))
    main(replace(recipe, overwrite=True))


def test_overwriting_leaves_no_finished_model_beside_an_unfinished_run(
    recipe: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(recipe)
    stop_at(3, monkeypatch)
    with pytest.raises(Interrupted):
        main(replace(recipe, overwrite=True))
    assert not (recipe.output / "config.json").exists()


def test_a_finished_run_is_not_touched_unasked(recipe: Pretrain) -> None:
    main(recipe)
    before = (recipe.output / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="finished run; give --overwrite"):
        main(recipe)
    with pytest.raises(InputError, match="holds a finished run, so there is nothing to resume"):
        main(replace(recipe, resume=True))
    assert (recipe.output / "model.safetensors").read_bytes() == before
    main(replace(recipe, overwrite=True, seed=1))
    assert (recipe.output / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"text": Path("/nonexistent")}, "/nonexistent: no such folder"),
        ({"suffixes": (".py",)}, "no text in 8 files, 0 of them ending in .py"),
        ({"held_out": 0.0}, "both sides need at least one"),
        ({"context": 1}, "context is 1; it takes 2 tokens"),
        ({"context": 4000}, "tokens, a window 4000; add text or shorten the context"),
        ({"vocabulary": 100}, "vocab_size is 100"),
        ({"steps": -1}, "the run is -1 steps long"),
        ({"steps": None, "minutes": 0.0}, "the run is 0.0 minutes long"),
        ({"resume": True}, "holds no unfinished run"),
        ({"batch": 0}, "batch is 0; it must be above 0"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup": 5.0}, "warmup is 5.0; it is a fraction"),
        ({"device": "gpu9"}, "device 'gpu9' cannot be used"),
    ],
)
def test_bad_input_is_named_in_one_line(recipe: Pretrain, change: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        main(replace(recipe, **change))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_heads_that_do_not_fit_the_width_are_named(recipe: Pretrain) -> None:
    with pytest.raises(ConfigError, match="3 heads cannot share a width of 16"):
        main(replace(recipe, heads=3, kv_heads=1))


def test_an_output_that_cannot_be_made_is_named(recipe: Pretrain) -> None:
    recipe.output.write_text("a file")
    with pytest.raises(InputError, match="cannot be written"):
        main(recipe)


def test_the_command_line_ends_in_json_or_in_one_line_of_error(
    recipe: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--held-out 0.3 --width 16 --layers 1 --heads 2 --kv-heads 1 --feed-forward 32 --context 16 --minutes 0.003"
    command = ["pretrain.py", "--text", str(recipe.text), "--output", str(recipe.output), *flags.split()]
    for more, code in (([], 0), ([], 2), (["--overwrite"], 0), (["--overwrite", "--batch", "0"], 2)):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as stop:
            run(main, Pretrain)
        told = capsys.readouterr()
        assert stop.value.code == code, told.err
        if code == 0:
            assert json.loads(told.out.splitlines()[-1])["steps"] >= 1
        else:
            assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(recipe: Pretrain) -> dict[str, Any]:
        raise Interrupted("go on with: that")

    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(SystemExit) as stop:
        run(interrupted, Pretrain)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted. go on with: that\n"
