"""Function bodies to learn from, and others to be asked for, out of Python files: first of three steps.

    python scripts/mine_bodies.py --model runs/demo
    python scripts/sft.py --model runs/demo --data runs/bodies/train.jsonl --quantize int8 --output runs/sft
    python scripts/count_bodies.py --model runs/demo --quantize int8 --adapter runs/sft

    files ─┬─ those the model was trained on ─▶ functions ─▶ train.jsonl ─▶ sft.py ─▶ adapter ──┐
           └─ those it has never read        ─▶ functions ─▶ held_out.jsonl ─▶ prompts ─────────┴─▶ answers ─▶ rates

A row is {"prompt": signature and docstring, "completion": body, "source": file and line}, as `minillm.data.functions`
takes them apart.

*No leakage.* Which files are held out is read from the training.json of the model's own pretraining, so it has read
none of them, and the rows to learn from come from the others. No two rows share a prompt or a body, and a held-out
function that shares one with any function of the other files is left out as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm import Tokenizer
from minillm.atomic import write_atomically
from minillm.checkpoint.families import read_config, read_json
from minillm.data.corpus import STDLIB_LEAVE_OUT, Document, read_folder, split, standard_library
from minillm.data.functions import Body, distinct, functions
from minillm.errors import InputError
from minillm.training.progress import Progress
from minillm.training.recipe import run


@dataclass(frozen=True)
class Mine:
    """Where functions come from, and which."""

    model: Path
    """Folder of the model: its tokenizer measures lengths, its training.json knows which files it has not read."""
    text: Path | None = None
    """Folder of Python files; where not given, what the model was trained on, or this Python's standard library."""
    held_out: float | None = None
    """Fraction of the files to ask from; where not given, what the training held out."""
    longest: int = 160
    """Tokens that prompt, body and EOS may have together; never more than the model's context."""
    output: Path = Path("runs/bodies")
    """Where train.jsonl and held_out.jsonl go."""


def main(recipe: Mine) -> dict[str, Any]:
    """Read the files, take their functions apart, write those that fit."""
    tokenizer = Tokenizer.load(recipe.model)
    longest = min(recipe.longest, read_config(recipe.model).longest)
    training, held = divided(recipe)
    read = list(found("functions to learn from", training))
    known = distinct(read)
    asked = distinct(found("functions to ask for", held), apart_from=read)  # not `known`, which has lost some prompts
    result: dict[str, Any] = {"files": len(training), "held_out_files": len(held)}
    recipe.output.mkdir(parents=True, exist_ok=True)
    for name, bodies in (("train", known), ("held_out", asked)):
        fitting = [body for body in bodies if length(body, tokenizer) <= longest]
        if not fitting:
            raise InputError(f"{name}: none of {len(bodies)} functions fits; give other text or raise --longest")
        path = recipe.output / f"{name}.jsonl"
        write_atomically(path, "".join(json.dumps(body._asdict()) + "\n" for body in fitting))
        result |= {name: len(fitting), f"{name}_too_long": len(bodies) - len(fitting), f"{name}_file": str(path)}
    return result


def divided(recipe: Mine) -> tuple[list[Document], list[Document]]:
    """(files the model was trained on, files it has never read), by the record of its pretraining.

    Raises InputError where there is none and no fraction is given, and where more is asked for than was held out.
    """
    record = recipe.model / "training.json"
    past = read_json(record).get("recipe", {}) if record.is_file() else {}
    own = Path(past["text"]) if past.get("text") else None
    text = recipe.text or own
    fraction = past.get("held_out") if recipe.held_out is None else recipe.held_out
    if fraction is None:
        raise InputError(f"{record}: says nothing of what the model has not read; give the fraction as --held-out")
    is_own = recipe.text is None or recipe.text.resolve() == (own or standard_library()).resolve()
    if is_own and fraction > past.get("held_out", 1):
        raise InputError(f"held_out is {fraction}; the model was trained on all but {past['held_out']}: leave it out")
    leave_out = past.get("leave_out", ()) if text else STDLIB_LEAVE_OUT
    return split(read_folder(text or standard_library(), suffixes=(".py",), leave_out=leave_out), fraction)


def found(name: str, documents: Sequence[Document]) -> Iterator[Body]:
    """The functions of the documents, with a bar that moves on by files."""
    with Progress(name, total=len(documents), unit="file") as bar:
        for number, document in enumerate(documents, 1):
            yield from functions([document])
            bar.update(number)


def length(body: Body, tokenizer: Tokenizer) -> int:
    """Tokens, EOS included."""
    return len(tokenizer.encode(body.prompt + body.completion)) + 1


if __name__ == "__main__":
    run(main, Mine)
