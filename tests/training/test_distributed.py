"""One model over two processes: gradients, losses and states are those of one process, whoever holds what.

The tests have two processes of their own (`tests.training.ranked`); those of the command line start torchrun.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillm.training.recipe import Interrupted
from minillm.training.state import read_progress
from scripts.sft import Sft, main
from tests import tiny_checkpoint
from tests.error import assert_near
from tests.training import ranked
from tests.training.ranked import Pair
from tests.training.stopping import stop_at

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as made:
        yield made


@pytest.fixture
def recipe(tmp_path: Path) -> Sft:
    """Ten steps of seven rows, answers of unequal length: neither ranks nor micro-batches divide them evenly."""
    tiny_checkpoint.write(tmp_path / "base")
    rows = [{"prompt": f"{a} + {b} =", "completion": " " + "I" * (a + b + 1)} for a in range(6) for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Sft(
        model=str(tmp_path / "base"), data=(tmp_path / "sums.jsonl",), output=tmp_path / "out", steps=10, batch=7,
        micro_batch=2, rank=4, learning_rate=1e-2, held_out=0.1, evaluations=2, patience=9, samples=1,
    )  # fmt: skip


def history(recipe: Sft) -> dict[str, Any]:
    return json.loads((recipe.output / "training.json").read_text())


def written(recipe: Sft) -> Path:
    name = "model.safetensors" if recipe.method == "full" else "adapter_model.safetensors"
    return recipe.output / name


def assert_same_run(ours: Sft, theirs: Sft, near: float = 1e-6) -> None:
    """The same losses, and what is written to 100 times as much, as Adam divides small numbers by small ones.

    Where activations are rounded to 8 or 16 bits, the last bit of a sum at times decides how: then only losses are
    compared, and gradients above.
    """
    one, other = history(ours), history(theirs)
    assert one["losses"] == pytest.approx(other["losses"], rel=near)
    assert [step for step, _ in one["evaluated"]] == [step for step, _ in other["evaluated"]]
    assert [loss for _, loss in one["evaluated"]] == pytest.approx([loss for _, loss in other["evaluated"]], rel=near)
    assert one["tokens"] == other["tokens"]
    tensors, wanted = load_file(written(ours)), load_file(written(theirs))
    assert tensors.keys() == wanted.keys()
    for name, x in tensors.items():
        assert near > 1e-6 or assert_near(x, wanted[name], 100 * near, name) is None


CASES = [("full", 8, 9, {}), ("lora", 8, 1, {}), ("lora", 7, 2, {}), ("full", 1, 9, {})]
MORE = [
    ("full", 5, 1, {"tied_embeddings": True}), ("bfloat16", 8, 1, {}), ("int8", 8, 1, {}), ("nf4", 7, 1, {}),
    ("dora", 8, 9, {}), ("full", 3, 9, {"position": "alibi"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "count", "size", "fields"), CASES + MORE)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(
    pair: Pair, how: str, kind: str, count: int, size: int, fields: dict[str, Any]
) -> None:
    """batch 8 = 8 x 1 = 2 ranks x 4, also where rows run out on one rank, or it has none at all.

    Where there is more to it than rounding in float64, it is compared with one process that takes the same batches:
    what int8 holds for outlier columns depends on all rows that pass through a layer together.
    """
    near = 1e-6 if kind in ("int8", "nf4", "bfloat16") else 1e-12
    loss, norm, wanted = ranked.gradients("ddp", kind, count, 1 if near == 1e-6 else count, fields)
    for found_loss, found_norm, found in pair.run(ranked.gradients, how, kind, count, size, fields):
        assert found_loss == pytest.approx(loss, rel=near)
        assert found_norm == pytest.approx(norm, rel=near)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert_near(found[name], gradient, near, name)


def test_ddp_sums_once_a_step(pair: Pair) -> None:
    once = pair.run(ranked.sums_of_gradients, 8, 4)
    assert once == pair.run(ranked.sums_of_gradients, 8, 1) and once[0] > 0


@pytest.mark.parametrize("kind", ["full", "int8", "nf4"])
def test_fsdp_keeps_a_half_of_everything(pair: Pair, kind: str) -> None:
    """The odd rows of a tensor, as of rank 3, go to one of the two; single numbers to both."""
    for own, everything in pair.run(ranked.shares, "fsdp", kind):
        assert own < 0.55 * everything
    assert pair.run(ranked.shares, "ddp", kind)[0][0] == everything


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_all_ranks_say_that_a_loss_is_no_number(pair: Pair, how: str) -> None:
    first, second = pair.run(ranked.loss_that_is_none_on_one_rank, how)
    assert first == second == "the loss is nan; lower the learning rate, or warm up longer"


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_where_a_gradient_overflows_on_one_rank_all_leave_the_step_out(pair: Pair, how: str) -> None:
    assert pair.run(ranked.overflow_on_one_rank, how) == [(True, 2.0**15)] * 2


_KINDS: list[dict[str, Any]] = [
    {}, {"method": "full", "schedule": "cosine"}, {"quantize": "int8", "recompute": True},
    {"quantize": "nf4", "dora": True}, {"pack": True, "batch": 3, "context": 40}, {"optimizer": "adamw8"},
    {"precision": "float16"},
]  # fmt: skip
_QUICK = [("ddp", _KINDS[0]), ("fsdp", _KINDS[0]), ("fsdp", _KINDS[1]), ("ddp", _KINDS[2]), ("fsdp", _KINDS[2])]


@pytest.mark.parametrize(
    ("how", "fields"),
    [
        pytest.param(how, fields, marks=() if (how, fields) in _QUICK else pytest.mark.slow)
        for fields in _KINDS
        for how in ("ddp", "fsdp")
    ],
    ids=str,
)
def test_the_losses_of_one_process(pair: Pair, how: Any, fields: dict[str, Any], recipe: Sft) -> None:
    recipe = replace(recipe, **fields)
    alone = replace(recipe, output=recipe.output.with_name("alone"))
    main(alone)
    first, second = pair.run(ranked.fine_tune, replace(recipe, parallel=how))
    assert first == second
    assert_same_run(recipe, alone, 1e-4 if recipe.quantize == "int8" or recipe.precision == "float16" else 1e-6)
    names, wanted = ({path.name for path in each.output.iterdir()} for each in (recipe, alone))
    assert names == wanted - ({"samples.jsonl"} if how == "fsdp" else set())
    lines = [json.loads(line) for line in (recipe.output / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "loss" in line]) == 10  # the first rank alone writes


@pytest.mark.parametrize("fields", [{"dropout": 0.2}, {"method": "full", "parallel": "fsdp"}], ids=str)
def test_interrupted_on_one_rank_and_resumed_equals_uninterrupted(
    pair: Pair, fields: dict[str, Any], recipe: Sft
) -> None:
    """With as many ranks to the last bit; all end at the step that one was asked in."""
    recipe = replace(recipe, **fields)
    straight = replace(recipe, output=recipe.output.with_name("straight"))
    pair.run(ranked.fine_tune, straight)
    told = pair.run(ranked.fine_tune_until, recipe, 3, 1)
    assert [text[:15] for text in told] == ["step 3 is saved"] * 2
    pair.run(ranked.fine_tune, replace(recipe, resume=True))
    assert written(recipe).read_bytes() == written(straight).read_bytes()
    assert history(recipe)["losses"] == history(straight)["losses"]


@pytest.mark.parametrize(
    ("before", "after", "fields"),
    [
        ("ddp", None, {}), (None, "fsdp", {}),
        pytest.param("fsdp", None, {"method": "full"}, marks=pytest.mark.slow),
        pytest.param("fsdp", "ddp", {}, marks=pytest.mark.slow),
        pytest.param(None, "fsdp", {"method": "full"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_resumed_by_others(
    pair: Pair, before: Any, after: Any, fields: dict[str, Any], recipe: Sft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state knows nothing of ranks: begun by two and ended by one, or the other way round, or by whom holds less."""
    recipe = replace(recipe, **fields)
    straight = replace(recipe, output=recipe.output.with_name("straight"))
    main(straight)
    if before is None:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            stop_at(4, patch)
            main(recipe)
    else:
        pair.run(ranked.fine_tune_until, replace(recipe, parallel=before), 4, 0)
    if after is None:
        main(replace(recipe, resume=True))
    else:
        pair.run(ranked.fine_tune, replace(recipe, parallel=after, resume=True))
    assert_same_run(recipe, straight)


def test_a_run_of_minutes_is_over_for_all_at_once(pair: Pair, recipe: Sft) -> None:
    """Each rank for itself would look at its own clock, and make another step, at another rate, than the other."""
    first, second = pair.run(ranked.fine_tune, replace(recipe, steps=None, minutes=0.03))
    assert first == second and first["steps"] > 1 and 1.8 <= first["seconds"] < 10


@pytest.mark.slow
def test_learning_by_heart_ends_all_ranks(pair: Pair, recipe: Sft) -> None:
    recipe = replace(recipe, learning_rate=0.5, steps=40, evaluations=20, patience=2, warmup=0.0)
    first, second = pair.run(ranked.fine_tune, recipe)
    assert first == second and first["ended_early"] and first["steps"] < 40


def test_adamw8_has_the_codes_of_one_process(pair: Pair) -> None:
    """Blocks are those of the whole parameter, wherever it is cut."""
    [alone] = [ranked.codes("ddp", 64)]
    for how in ("ddp", "fsdp"):
        for found in pair.run(ranked.codes, how, 64):
            assert found.keys() == alone.keys() and any(key.endswith("codes") for key in found)
            for name, x in alone.items():
                if x.dtype == torch.uint8:
                    assert float((x != found[name]).float().mean()) < 1e-3, name  # sums in another order: a tie or two
                else:
                    assert_near(found[name], x, 1e-5, name)


def test_what_adamw8_cannot_cut_is_named(pair: Pair) -> None:
    for text in pair.run(ranked.why_no_codes, 33):
        assert text.startswith("parameter 0 of group 0, (128, 33), cannot be cut into 2 equal parts of whole blocks")


def torchrun(recipe: Sft, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(ROOT / "scripts/sft.py"), *arguments(recipe), *more],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def arguments(recipe: Sft) -> list[str]:
    names = ("model", "output", "steps", "batch", "micro_batch", "rank", "learning_rate", "held_out", "evaluations")
    given = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(recipe, name)))]
    return [*given, "--data", *map(str, recipe.data)]


def test_torchrun(recipe: Sft) -> None:
    """One line of JSON, one of each message."""
    done = torchrun(recipe, "--parallel", "fsdp")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 10
    assert len(re.findall("numbers are trained", done.stderr)) == 1


@pytest.mark.slow
def test_errors_are_said_once(recipe: Sft) -> None:
    """Before the ranks have joined, by all of them at once, and by the first alone."""
    for more, words in (
        (("--batch", "0"), "error: batch is 0"),
        (("--rank", "0"), "error: rank is 0"),
        (("--output", str(recipe.data[0])), "cannot be written"),
        (("--device", "cuda:0"), "error: device cuda:0 cannot be shared by 2 processes"),
    ):
        done = torchrun(recipe, *more)
        assert done.returncode and not done.stdout
        assert done.stderr.count(words) == 1, done.stderr


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(recipe: Sft) -> None:
    """The agent hands the signal on; all ranks end the same step, and the state that is left goes on alone."""
    recipe = replace(recipe, steps=100_000)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*command, str(ROOT / "scripts/sft.py"), *arguments(recipe)],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as child:  # fmt: skip
        metrics = recipe.output / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.is_file() and b'"step": 3' in metrics.read_bytes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        child.terminate()
        told = child.communicate(timeout=60)[1]
    found = re.search(r"interrupted\. step (\d+) is saved; go on with: (.*)", told)
    assert found and told.count("interrupted.") == 1, told
    assert "-m torch.distributed.run --nproc-per-node 2 " in found[2]
    assert read_progress(recipe.output / "state.safetensors")["step"] == int(found[1]) >= 3
