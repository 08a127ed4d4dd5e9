"""The script end to end on a tiny checkpoint: every method, stop and continue, and what it says to bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import minillm
from minillm import lora
from minillm.data.batches import Batches, collate
from minillm.data.examples import make_examples
from minillm.data.records import read_records
from minillm.errors import CheckpointError, InputError
from minillm.training.loop import accumulate
from minillm.training.metrics import read_lines
from minillm.training.recipe import Interrupted
from scripts import sft
from scripts.sft import Sft, main
from tests import tiny_checkpoint
from tests.error import assert_near
from tests.training.stopping import stop_at


@pytest.fixture
def recipe(tmp_path: Path) -> Sft:
    """Eight steps of rank 4 on forty sums, answers of unequal length."""
    tiny_checkpoint.write(tmp_path / "base")
    rows = [{"prompt": f"{a} + {b} =", "completion": " " + "I" * (a + b)} for a in range(8) for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Sft(
        model=str(tmp_path / "base"), data=(tmp_path / "sums.jsonl",), output=tmp_path / "out", steps=8, batch=5,
        micro_batch=2, rank=4, learning_rate=1e-2, held_out=0.2, evaluations=2, patience=9,
    )  # fmt: skip


def adapter(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"quantize": "int8"}, {"quantize": "nf4"}, {"dora": True, "rslora": True, "dropout": 0.1},
        {"recompute": True}, {"optimizer": "adamw8"}, {"precision": "bfloat16"}, {"dtype": "bfloat16"},
        {"init": "pissa"}, {"pack": True, "batch": 2},
        {"precision": "float16"}, {"targets": ("q_proj", "v_proj"), "schedule": "cosine"},
    ],
    ids=str,
)  # fmt: skip
def test_adapters_learn(fields: dict[str, Any], recipe: Sft) -> None:
    recipe = replace(recipe, **fields)
    result = main(recipe)
    assert result["steps"] == 8 and result["held_out"] < 0.9 * result["held_out_before"]
    assert sorted(path.name for path in recipe.output.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "curve.png", "metrics.jsonl"),
        *("samples.jsonl", "tokenizer.json", "tokenizer_config.json", "training.json"),
    ]
    assert [step for step, _ in json.loads((recipe.output / "training.json").read_text())["evaluated"]] == [0, 4, 8]
    model = minillm.load_model(recipe.model, dtype=None if recipe.dtype == "auto" else recipe.dtype)
    base = model(torch.tensor([[1, 2, 3]]))
    lora.load(model, recipe.output)
    assert not torch.equal(model(torch.tensor([[1, 2, 3]])), base)


def test_all_weights_learn(recipe: Sft) -> None:
    result = main(replace(recipe, method="full"))
    assert result["held_out"] < 0.9 * result["held_out_before"]
    assert result["trained"] == sum(x.numel() for x in minillm.load_model(recipe.output).parameters())


@pytest.mark.parametrize(
    "fields",
    [{"dropout": 0.2}, {"optimizer": "adamw8"}, {"method": "full"}, {"quantize": "int8"}, {"precision": "float16"}],
    ids=str,
)
def test_interrupted_and_resumed_equals_uninterrupted(
    fields: dict[str, Any], recipe: Sft, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, **fields)
    straight = replace(recipe, output=recipe.output.with_name("straight"))
    main(straight)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(Interrupted, match=r"step 3 is saved; go on with: .*--resume"):
            main(recipe)
    main(replace(recipe, resume=True))
    name = "model.safetensors" if recipe.method == "full" else "adapter_model.safetensors"
    assert (recipe.output / name).read_bytes() == (straight.output / name).read_bytes()
    ours, theirs = (json.loads((each.output / "training.json").read_text()) for each in (recipe, straight))
    assert ours["losses"] == theirs["losses"] and ours["evaluated"] == theirs["evaluated"]
    assert not (recipe.output / "state.safetensors").exists()
    assert written(recipe.output) == written(straight.output)


#: What differs from run to run: they measure the machine.
CLOCKS = ("seconds", "tokens_per_second", "memory")


def written(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """metrics.jsonl without the clocks, and samples.jsonl."""
    lines = read_lines(folder / "metrics.jsonl")
    timeless = [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]
    return timeless, read_lines(folder / "samples.jsonl")


def test_every_step_and_every_look_is_a_line(recipe: Sft) -> None:
    result = main(recipe)
    told = json.loads((recipe.output / "training.json").read_text())
    lines = read_lines(recipe.output / "metrics.jsonl")
    steps, looks = [each for each in lines if "loss" in each], [each for each in lines if "held_out" in each]
    assert [(each["step"], each["loss"]) for each in steps] == list(enumerate(told["losses"], 1))
    assert [[each["step"], each["held_out"]] for each in looks] == told["evaluated"]
    assert steps[-1]["tokens"] == result["tokens"]
    assert steps[3]["learning_rate"] == pytest.approx(1e-2 * (1 - 3.5 / 8) / 0.95)
    assert all(0 < each["gradient_norm"] < 100 and each["memory"] > 1e7 for each in steps)
    assert all(each["tokens_per_second"] > 0 for each in steps)
    assert [each["step"] for each in lines] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


def test_samples_continue_held_out_prompts_greedily(recipe: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    main(replace(recipe, learning_rate=3e-2, steps=24))
    samples = read_lines(recipe.output / "samples.jsonl")
    assert [each["step"] for each in samples] == [0, 0, 12, 12, 24, 24]
    for each in samples:
        a, b = each["prompt"].removesuffix(" =").split(" + ")
        assert each["wanted"].strip() == "I" * (int(a) + int(b))
    assert f"{samples[-1]['prompt']} → {samples[-1]['text'].strip()}"[:60] in capsys.readouterr().err
    model, tokenizer = minillm.load(recipe.model)
    lora.load(model, recipe.output)
    (answer,) = minillm.generate(model, tokenizer, samples[-1]["prompt"], do_sample=False, max_new_tokens=48)
    assert samples[-1]["text"] == answer.text


def test_looking_changes_nothing(recipe: Sft) -> None:
    """Dropout draws from the stream that samples must leave alone."""
    found = []
    for samples in (0, 3):
        main(replace(recipe, samples=samples, dropout=0.3, overwrite=True))
        found.append(adapter(recipe.output))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_a_killed_run_goes_on_without_the_lines_after_its_state(recipe: Sft, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = replace(recipe, output=recipe.output.with_name("straight"))
    main(straight)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(5, patch)
        main(recipe)
    for name in ("metrics.jsonl", "samples.jsonl"):  # it went on to step 6, and was killed in the middle of a line
        with open(recipe.output / name, "a") as file:
            file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    main(replace(recipe, resume=True, samples=3))
    (ours, our_samples), (theirs, their_samples) = written(recipe.output), written(straight.output)
    assert ours == theirs and our_samples[:4] == their_samples[:4] and len(our_samples) == 7


def test_starting_anew_starts_the_lines_anew(recipe: Sft) -> None:
    main(recipe)
    main(replace(recipe, overwrite=True, steps=2, samples=0))
    assert [each["step"] for each in read_lines(recipe.output / "metrics.jsonl")] == [0, 1, 1, 2, 2]
    assert not (recipe.output / "samples.jsonl").exists()


def test_gradients_do_not_depend_on_how_rows_are_batched(recipe: Sft) -> None:
    """8 = 8 x 1 = 3 + 5, with rows of unequal length."""
    model, tokenizer = sft.make_model(replace(recipe, dropout=0.0))
    examples, _ = make_examples(read_records(recipe.data), tokenizer, context=64)
    rows = Batches(examples, size=8, seed=0).rows(0)
    assert len({len(example) for row in rows for example in row}) > 1
    found = []
    for cuts in ([8], [1] * 8, [3, 5]):
        parts, begin = [], 0
        for size in cuts:
            parts.append(collate(rows[begin : begin + size], pad_id=7))
            begin += size
        accumulate(model, parts)
        found.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
        model.zero_grad()
    for name, gradient in found[0].items():
        if ".b" in name or float(gradient.abs().max()):
            for other in found[1:]:
                assert_near(other[name], gradient, 1e-6, name)


def test_recomputing_gives_every_adapter_its_gradient(recipe: Sft) -> None:
    found = []
    for recompute in (False, True):
        model, tokenizer = sft.make_model(replace(recipe, recompute=recompute))
        examples, _ = make_examples(read_records(recipe.data), tokenizer, context=64)
        accumulate(model, [collate(Batches(examples, size=4, seed=0).rows(0))])
        found.append({name: x.grad for name, x in model.named_parameters() if x.requires_grad})
    assert all(x is not None and float(x.abs().max()) > 0 for name, x in found[1].items() if name.endswith(".b"))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_learning_by_heart_ends_the_run(recipe: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    result = main(replace(recipe, learning_rate=0.5, steps=40, evaluations=20, patience=2, warmup=0.0))
    assert result["ended_early"] and result["steps"] < 40
    losses = [loss for _, loss in json.loads((recipe.output / "training.json").read_text())["evaluated"]]
    rises = sum(loss > min(losses[:at]) for at, loss in enumerate(losses) if at)
    assert rises >= 2 and capsys.readouterr().err.count("learning by heart begins") == rises


@pytest.mark.parametrize("stopped", [None, 3, 6])
@pytest.mark.parametrize("fields", [{}, {"method": "full"}], ids=str)
def test_what_was_best_is_kept(
    fields: dict[str, Any], stopped: int | None, recipe: Sft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out loss is least after 4 of 8 steps: the result is what was trained by then, in a continued run too."""
    recipe, seen = replace(recipe, evaluations=8, samples=0, **fields), {}

    def evaluate(run: sft.Run) -> float:
        seen[run.clock.step] = [x.detach().clone() for x in run.model.parameters() if x.requires_grad]
        return float(abs(run.clock.step - 4))

    monkeypatch.setattr(sft.Run, "evaluate", evaluate)
    if stopped is not None:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            stop_at(stopped, patch)
            main(recipe)
    made: list[sft.Run] = []
    finish = sft.finish
    monkeypatch.setattr(sft, "finish", lambda run, result: (made.append(run), finish(run, result)))
    result = main(replace(recipe, resume=stopped is not None))
    assert (result["kept_step"], result["steps"], result["held_out"]) == (4, 8, 0.0)
    kept = [x for x in made[0].model.parameters() if x.requires_grad]
    assert all(torch.equal(x, then) for x, then in zip(kept, seen[4], strict=True))
    assert not all(torch.equal(x, then) for x, then in zip(kept, seen[8], strict=True))
    assert not (recipe.output / "best.safetensors").exists()


def test_a_slip_of_the_pen_leaves_an_earlier_run(recipe: Sft) -> None:
    main(recipe)
    before = {path.name: path.read_bytes() for path in recipe.output.iterdir()}
    with pytest.raises(InputError):
        main(replace(recipe, overwrite=True, data=(Path("nowhere.jsonl"),)))
    with pytest.raises(InputError):
        main(replace(recipe, overwrite=True, targets=("q_porj",)))
    assert {path.name: path.read_bytes() for path in recipe.output.iterdir()} == before
    main(replace(recipe, overwrite=True, rank=2))
    assert (recipe.output / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]


@pytest.mark.oracle
def test_the_losses_of_transformers_and_peft(recipe: Sft) -> None:
    """Ten steps of the same batches, in fp32, with torch's AdamW and a linear fall: the same losses to 1e-5."""
    import warnings

    import peft
    import transformers

    recipe = replace(recipe, steps=10, micro_batch=None, held_out=0.0)
    model, tokenizer = sft.make_model(recipe)
    lora.save(model, recipe.output / "start")
    main(recipe)
    ours = json.loads((recipe.output / "training.json").read_text())["losses"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, recipe.output / "start", is_trainable=True).train()
    trained = [x for x in theirs.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01)
    examples, _ = make_examples(read_records(recipe.data), tokenizer, context=128)
    batches, losses = Batches(examples, size=recipe.batch, seed=recipe.seed), []
    for step in range(10):
        batch = batches.batch(step)
        labels = batch.tokens.masked_fill(~batch.taught, -100)
        loss = theirs(input_ids=batch.tokens, attention_mask=batch.keep.long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        done = (step + 0.5) / 10
        optimizer.param_groups[0]["lr"] = 1e-2 * (done / 0.05 if done < 0.05 else (1 - done) / 0.95)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert ours == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"targets": ("q_porj",)}, r"fits no layer of this model \(nearest: q_proj"),
        ({"data": (Path("nowhere.jsonl"),)}, "nowhere.jsonl"),
        ({"context": 4}, "nothing to learn from: 0 of 40 records are used; 40 cannot be"),
        ({"format": "chat"}, "nothing to learn from"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_one_line(fields: dict[str, Any], words: str, recipe: Sft) -> None:
    with pytest.raises((InputError, CheckpointError), match=words):
        main(replace(recipe, **fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "full", "quantize": "int8"}, "weights in int8 cannot be trained"),
        ({"steps": 3, "minutes": 1.0}, "in steps or in minutes, not in both"),
        ({"batch": 0}, "batch is 0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"samples": -1}, "samples is -1"),
    ],
)
def test_choices_that_make_no_sense(fields: dict[str, Any], words: str, recipe: Sft) -> None:
    with pytest.raises(InputError, match=words):
        replace(recipe, **fields)


def test_a_continued_run_is_the_same_run(recipe: Sft, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(2, patch)
        main(recipe)
    with pytest.raises(InputError, match="holds an unfinished run"):
        main(recipe)
    with pytest.raises(InputError, match="rank is 8, the run began with 4"):
        main(replace(recipe, resume=True, rank=8))
    recipe.data[0].write_text(recipe.data[0].read_text().replace("7 + 4", "7 - 4"))
    with pytest.raises(InputError, match="examples have changed"):
        main(replace(recipe, resume=True))
