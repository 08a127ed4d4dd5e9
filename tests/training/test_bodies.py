"""The two scripts about function bodies, end to end: what is mined, that nothing leaks, what is counted and said."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minillm import lora
from minillm.data.bodies import judge
from minillm.data.corpus import Document, read_folder, split
from minillm.data.examples import make_examples
from minillm.data.records import read_records
from minillm.errors import InputError, MinillmError
from minillm.generation.generate import Completion
from minillm.training.recipe import run
from scripts import count_bodies, mine_bodies
from scripts.count_bodies import Count
from scripts.mine_bodies import Mine
from tests import tiny_checkpoint

FRACTION = 0.3


def function(name: str, body: str) -> str:
    return f'def {name}(a):\n    """About {name}."""\n    {body}\n\n\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Mine:
    """Forty files of three functions each; of these one is the same in every file, and one body is."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        own = function(f"own_{i}", f"return a + {i}")
        (text / f"m{i}.py").write_text(own + function("everywhere", f"return {i}") + function(f"f{i}", "return a.b"))
    (text / "latin.py").write_bytes(function("latin", "return 'ä'").encode("latin-1"))
    (text / "broken.py").write_text("def f(:\n")
    tiny_checkpoint.write(tmp_path / "base")
    record = {"recipe": {"text": str(text), "held_out": FRACTION, "leave_out": []}}
    (tmp_path / "base/training.json").write_text(json.dumps(record))
    return Mine(model=tmp_path / "base", output=tmp_path / "bodies")


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(bodies: list[dict[str, str]]) -> set[str]:
    return {body["source"].partition(":")[0] for body in bodies}


def sides(recipe: Mine) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return rows(recipe.output / "train.jsonl"), rows(recipe.output / "held_out.jsonl")


def test_nothing_that_is_asked_for_has_been_read(recipe: Mine) -> None:
    result = mine_bodies.main(recipe)
    train, held = sides(recipe)
    assert (result["train"], result["held_out"]) == (len(train), len(held))
    read, unread = split(read_folder(recipe.model.parent / "text", suffixes=(".py",)), FRACTION)
    assert files(train) <= {document.path for document in read}
    assert files(held) == {document.path for document in unread if document.path.startswith("m")}
    for key in ("prompt", "completion"):
        assert not {body[key] for body in train} & {body[key] for body in held}, key
        for side in (train, held):
            assert len({body[key] for body in side}) == len(side), key
    # what both sides have is asked of nobody: `everywhere` is learnt once, `return a.b` too
    assert all(body["prompt"].startswith("def own_") for body in held)
    assert sum("everywhere" in body["prompt"] for body in train) == 1
    assert all(judge(body["prompt"], body["completion"]).parses for body in [*train, *held])


def test_a_function_too_long_to_be_learnt_is_still_not_asked_for(recipe: Mine) -> None:
    """The held-out copy is shorter than the limit, the one that was learnt from is not."""
    text = recipe.model.parent / "text"
    read, unread = ({document.path for document in side} for side in split(read_folder(text, suffixes=(".py",)), 0.3))
    twin = 'def twin(a):\n    """Twin."""\n'
    with open(text / min(read & {f"m{i}.py" for i in range(40)}), "a") as file:
        file.write(twin + "    return a" + " + 1" * 200)
    with open(text / min(unread & {f"m{i}.py" for i in range(40)}), "a") as file:
        file.write(twin + "    return a - 1")
    result = mine_bodies.main(recipe)
    assert result["train_too_long"] == 1
    assert not [body for side in sides(recipe) for body in side if "twin" in body["prompt"]]


def test_a_function_that_is_not_learnt_has_been_read_all_the_same(recipe: Mine) -> None:
    """Its body is another's and so it is no row to learn from; the model has read it, and is not asked for it."""
    text = recipe.model.parent / "text"
    read, unread = ({document.path for document in side} for side in split(read_folder(text, suffixes=(".py",)), 0.3))
    with open(text / min(read & {f"m{i}.py" for i in range(40)}), "a") as file:
        file.write(function("twin", "return a.b"))
    with open(text / min(unread & {f"m{i}.py" for i in range(40)}), "a") as file:
        file.write(function("twin", "return a - 1"))
    mine_bodies.main(recipe)
    assert not [body for side in sides(recipe) for body in side if "twin" in body["prompt"]]


def test_more_than_was_held_out_is_refused_of_a_folder_by_name_too(recipe: Mine) -> None:
    text = recipe.model.parent / "text"
    with pytest.raises(InputError, match=r"held_out is 0\.5; the model was trained on all but 0\.3"):
        mine_bodies.main(replace(recipe, text=text / "../text", held_out=0.5))


def test_mining_repeats(recipe: Mine) -> None:
    mine_bodies.main(recipe)
    first = [(recipe.output / name).read_bytes() for name in ("train.jsonl", "held_out.jsonl")]
    mine_bodies.main(recipe)
    assert [(recipe.output / name).read_bytes() for name in ("train.jsonl", "held_out.jsonl")] == first


def test_rows_are_what_sft_teaches_and_generation_sees(recipe: Mine) -> None:
    """The taught tokens begin where the prompt's own end: what is asked is what was taught to be gone on from."""
    mine_bodies.main(recipe)
    tokenizer = tiny_checkpoint.tokenizer()
    train, _ = sides(recipe)
    examples, tally = make_examples(read_records(recipe.output / "train.jsonl"), tokenizer, context=160)
    assert tally.used == len(train) and not tally.unusable
    for body, example in zip(train, examples, strict=True):
        prompt = tokenizer.encode(body["prompt"])
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert int(example.taught.sum()) == len(example) - len(prompt)
        assert len(example) == mine_bodies.length(mine_bodies.Body(**body), tokenizer)


def test_the_standard_library_is_what_is_left_out_of_its_own_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pretrain.py reads it: without a folder, the same files, the same side of the split."""
    seen: dict[str, Any] = {}

    def folder(path: Path, **options: Any) -> list[Document]:
        seen.update(options, path=path)
        return [Document(f"{i}.py", "x = 1") for i in range(400)]

    monkeypatch.setattr(mine_bodies, "read_folder", folder)
    read, unread = mine_bodies.divided(Mine(model=Path("nowhere"), held_out=0.2))
    assert (len(read) + len(unread), seen["path"]) == (400, mine_bodies.standard_library())
    assert seen["leave_out"] == mine_bodies.STDLIB_LEAVE_OUT and {*unread} == {*split([*read, *unread], 0.2)[1]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"held_out": 0.5}, r"held_out is 0\.5; the model was trained on all but 0\.3"),
        ({"longest": 3}, "train: none of .* fits"),
        ({"text": Path("nowhere")}, "nowhere: no such folder"),
        ({"model": Path("nowhere")}, "nowhere"),
    ],
)
def test_mining_says_what_is_wrong(recipe: Mine, change: dict[str, Any], words: str) -> None:
    with pytest.raises(MinillmError, match=words):
        mine_bodies.main(replace(recipe, **change))


def test_a_broken_record_is_named(recipe: Mine) -> None:
    (recipe.model / "training.json").write_text("[")
    with pytest.raises(MinillmError, match=r"training\.json"):
        mine_bodies.main(recipe)


def test_a_model_without_a_record_has_read_what_nobody_knows(recipe: Mine) -> None:
    (recipe.model / "training.json").unlink()
    with pytest.raises(InputError, match="says nothing of what the model has not read; give the fraction"):
        mine_bodies.main(recipe)
    mine_bodies.main(replace(recipe, text=recipe.model.parent / "text", held_out=0.2))


@pytest.fixture
def counting(recipe: Mine, tmp_path: Path) -> Count:
    """Ten prompts, an adapter that changes every layer."""
    import minillm

    mine_bodies.main(recipe)
    model = minillm.load_model(recipe.model, quantize="int8")
    lora.add(model, rank=4, init="gaussian")
    for name, parameter in model.named_parameters():
        if name.endswith(".b") or ".b." in name:
            parameter.data.normal_()
    lora.save(model, tmp_path / "adapter", base=str(recipe.model))
    return Count(
        model=str(recipe.model), adapter=tmp_path / "adapter", quantize="int8", data=recipe.output / "held_out.jsonl",
        output=tmp_path / "answers.jsonl", prompts=10, max_new_tokens=8, batch=4, temperature=1.0,
    )  # fmt: skip


def test_counting_repeats_and_sees_base_and_adapter(counting: Count, capsys: pytest.CaptureFixture[str]) -> None:
    result = count_bodies.main(counting)
    answers = rows(counting.output or Path())
    assert len(answers) == result["before"]["prompts"] == result["after"]["prompts"] == 10
    assert all(row["before"] != row["after"] for row in answers)
    assert "function bodies at temperature 1" in capsys.readouterr().out
    count_bodies.main(counting)
    assert rows(counting.output or Path()) == answers
    count_bodies.main(replace(counting, adapter=None))
    assert [row["before"] for row in rows(counting.output or Path())] == [row["before"] for row in answers]
    count_bodies.main(replace(counting, seed=1, prompts=99))
    other = {row["prompt"]: row["before"] for row in rows(counting.output or Path())}
    assert sum(other[row["prompt"]] != row["before"] for row in answers) > 5


#: Answer, why it ended, and what it counts for: success, cut, best, trivial.
ANSWERS = [
    ("\n    return a", "eos", "success cut best"),
    ("\n    pass", "eos", "success cut best trivial"),
    ("\n    return a", "length", "cut best"),
    ("\n    return a\nclass B:", "eos", "cut best"),
    ("\n    a = 1\n    return (", "eos", "best"),
    ("\n    return (", "eos", ""),
    ("", "eos", ""),
]


def test_what_is_counted(counting: Count, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The base writes nonsense, the adapter one of each kind, and the figures are those of the list."""
    answered: list[str] = []

    def write(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[Completion]:
        answered.extend(prompts)
        if len(answered) <= 7:
            return [Completion("\n    return (", [1] * 8, finish_reason="length") for _ in prompts]
        texts = ANSWERS[len(answered) - len(prompts) - 7 :]
        return [Completion(text, [1, 2], finish_reason=end) for (text, end, _), _ in zip(texts, prompts, strict=False)]

    monkeypatch.setattr(count_bodies, "generate", write)
    result = count_bodies.main(replace(counting, prompts=7))
    assert answered[:7] == answered[7:]
    after = result["after"]
    for kind in ("success", "cut", "best", "trivial"):
        assert after[kind] == sum(kind in kinds for _, _, kinds in ANSWERS), kind
        assert result["before"][kind] == 0
    assert (after["distinct"], after["ended"], after["mean_tokens"], after["mean_lines"]) == (2, 6, 2.0, 1.0)
    assert after["success_rate"] == 2 / 7 and result["before"]["mean_tokens"] == 8
    assert [result["change"][kind]["gained"] for kind in ("success", "cut", "best")] == [2, 4, 5]
    told = capsys.readouterr().out
    assert "28.6% (8.2 to 64.1)" in told and "2 prompts gained, 0 lost, McNemar's p 0.5" in told
    assert told.count("--- prompt") == 4 and "prompt 1, after: succeeds" in told
    saved = rows(counting.output or Path())
    assert saved[1]["after"] == {"text": "\n    pass", "ended": True, "parses": True, "trivial": True}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": Path("nowhere.jsonl")}, "nowhere.jsonl"),
        ({"adapter": Path("nowhere")}, "nowhere"),
        ({"temperature": -1.0}, "temperature is -1"),
    ],
)
def test_counting_says_what_is_wrong(counting: Count, change: dict[str, Any], words: str) -> None:
    with pytest.raises(MinillmError, match=words):
        count_bodies.main(replace(counting, **change))
    with pytest.raises(InputError, match="prompts is 0; it must be at least 1"):
        replace(counting, prompts=0)


def test_data_without_prompts_is_named(counting: Count) -> None:
    counting.data.write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r"held_out\.jsonl: a row has no `prompt`"):
        count_bodies.main(counting)


def test_the_command_line_ends_in_json(
    recipe: Mine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mine", "--model", str(recipe.model), "--output", str(recipe.output)])
    with pytest.raises(SystemExit) as stop:
        run(mine_bodies.main, Mine)
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["held_out"] == len(sides(recipe)[1])
