"""How many function bodies a model gets right, without its adapter and with it: last of three steps (mine_bodies.py).

    python scripts/count_bodies.py --model runs/demo --quantize int8 --adapter runs/sft

    prompts ─┬─ base alone   ─▶ answers ─▶ rate ─┬─▶ change, prompt by prompt
             └─ with adapter ─▶ answers ─▶ rate ─┘

*Success* (`minillm.data.bodies`): the answer ends by itself within the budget, and prompt and answer parse as that one
function. Trifles such as `pass` succeed, and are counted apart.

*Stopping.* A model that was never taught to stop cannot succeed, so two more rates say how much of a success is that
alone: what parses if the answer is cut at its first line that is not indented, as a reader would cut it; and if it is
cut at the best of its line ends, which only one who knows the outcome can find.

*Chance.* Answers are sampled, each prompt with a random stream of its own, the same before and after: what PPO will
raise is the rate of samples, not of the most likely answer, and greedy answers of a small model run in circles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from minillm import Decoder, Tokenizer, generate, load, lora
from minillm.atomic import write_atomically
from minillm.data.bodies import Verdict, judge, some_beginning_parses, until_dedent
from minillm.data.records import read_records
from minillm.data.seeded import permutation
from minillm.errors import InputError
from minillm.generation.generate import Completion
from minillm.training.progress import Progress
from minillm.training.rates import change, wilson
from minillm.training.recipe import run


@dataclass(frozen=True)
class Count:
    """Which model, asked for what, and how."""

    model: str
    """Folder or id of the base."""
    adapter: Path | None = None
    """Folder of an adapter for it."""
    quantize: Literal["int8", "nf4"] | None = None
    """Round the base, as the adapter was trained on."""
    data: Path = Path("runs/bodies/held_out.jsonl")
    """The prompts, as mine_bodies.py wrote them."""
    output: Path | None = None
    """Where every answer goes, one prompt a line, with what became of it."""
    prompts: int = 300
    """The most to ask, drawn by the seed."""
    max_new_tokens: int = 128
    """Budget of an answer, EOS included."""
    temperature: float = 0.7
    """Of sampling; 0 takes the most likely token."""
    batch: int = 64
    """Prompts at once."""
    show: int = 2
    """How many prompts to print with their answers: the first ones, whatever became of them."""
    seed: int = 0
    """Of the prompts drawn and of the sampling."""
    device: str = "cpu"
    """Where to generate: cpu, cuda, cuda:1 ..."""

    def __post_init__(self) -> None:
        for name in ("prompts", "max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")


class Answer(NamedTuple):
    """One answer and what became of it. cut, best: whether it parses if cut at its first dedent, at the best line."""

    text: str
    tokens: int
    ended: bool
    verdict: Verdict
    cut: bool
    best: bool

    @property
    def succeeds(self) -> bool:
        """Whether it is a body, and ended by itself."""
        return self.ended and self.verdict.parses


Sides = Mapping[str, Sequence[Answer]]

#: What is counted: its name in the result, in the table, and of each answer.
RATES: tuple[tuple[str, str, Callable[[Answer], bool]], ...] = (
    ("success", "end by themselves and parse", lambda answer: answer.succeeds),
    ("cut", "parse if cut at first dedent", lambda answer: answer.cut),
    ("best", "parse if cut at best line", lambda answer: answer.best),
)


def main(recipe: Count) -> dict[str, Any]:
    """Load the base once, ask without and with the adapter, compare."""
    rows = [dict(record.fields) for record in read_records(recipe.data)]
    if any(not isinstance(row.get("prompt"), str) for row in rows):
        raise InputError(f"{recipe.data}: a row has no `prompt`; give the held_out.jsonl of mine_bodies.py")
    rows = [rows[i] for i in sorted(permutation(len(rows), recipe.seed, "prompts")[: recipe.prompts])]
    prompts = [str(row["prompt"]) for row in rows]
    model, tokenizer = load(recipe.model, quantize=recipe.quantize, device=recipe.device)
    sides: dict[str, list[Answer]] = {}
    if recipe.adapter is not None:
        lora.load(model, recipe.adapter)
    with nullcontext() if recipe.adapter is None else lora.disabled(model):
        sides["before"] = ask(recipe, model, tokenizer, prompts, "before")
    if recipe.adapter is not None:
        sides["after"] = ask(recipe, model, tokenizer, prompts, "after")
    if recipe.output is not None:
        write_answers(recipe.output, rows, sides)
    result: dict[str, Any] = {side: figures(answers) for side, answers in sides.items()}
    if recipe.adapter is not None:
        pairs = {name: [list(map(of, answers)) for answers in sides.values()] for name, _, of in RATES}
        result["change"] = {name: change(*outcomes)._asdict() for name, outcomes in pairs.items()}
    show(recipe, prompts, sides, result)
    return result


def ask(recipe: Count, model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], side: str) -> list[Answer]:
    """An answer to every prompt, judged. Prompt r draws from stream (seed, r), so that both sides share their luck."""
    how = {"do_sample": recipe.temperature > 0, "temperature": recipe.temperature or 1.0, "top_k": 0, "top_p": 1.0}
    answers: list[Answer] = []
    with Progress(f"answers {side}", total=len(prompts), unit="prompt") as bar:
        for begin in range(0, len(prompts), recipe.batch):
            asked = prompts[begin : begin + recipe.batch]
            seed = recipe.seed * len(prompts) + begin  # row r of a batch draws from stream seed + r
            written = generate(model, tokenizer, asked, seed=seed, max_new_tokens=recipe.max_new_tokens, **how)
            for prompt, answer in zip(asked, written, strict=True):
                answers.append(judged(prompt, answer))
            bar.update(len(answers), tokens=sum(len(answer.tokens) for answer in written))
    return answers


def judged(prompt: str, answer: Completion) -> Answer:
    """What became of it."""
    cut, best = judge(prompt, until_dedent(answer.text)).parses, some_beginning_parses(prompt, answer.text)
    return Answer(answer.text, len(answer.tokens), answer.finish_reason == "eos", judge(prompt, answer.text), cut, best)


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """What the answers of one side come to: counts, and Wilson's intervals of their rates.

    trivial, distinct and mean_lines are of the successes.
    """
    good = [answer for answer in answers if answer.succeeds]
    result: dict[str, Any] = {"prompts": len(answers)}
    for name, _, of in RATES:
        counted = sum(map(of, answers))
        result |= {name: counted, f"{name}_rate": counted / len(answers)}
        result |= {f"{name}_interval": wilson(counted, len(answers))}
    return result | {
        "trivial": sum(answer.verdict.trivial for answer in good),
        "distinct": len({answer.text for answer in good}),
        "mean_lines": sum(answer.text.strip().count("\n") + 1 for answer in good) / max(len(good), 1),
        "ended": sum(answer.ended for answer in answers),
        "mean_tokens": sum(answer.tokens for answer in answers) / len(answers),
    }


def write_answers(path: Path, rows: Sequence[Mapping[str, Any]], sides: Sides) -> None:
    """One line a prompt: the row it came from, and each side's answer."""
    lines = []
    for number, row in enumerate(rows):
        told = {side: answers[number] for side, answers in sides.items()}
        given = {side: {"text": x.text, "ended": x.ended, **x.verdict._asdict()} for side, x in told.items()}
        lines.append(json.dumps({**row, **given}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines))


def show(recipe: Count, prompts: Sequence[str], sides: Sides, result: Mapping[str, Any]) -> None:
    """Samples, the table and the change, on standard output."""
    out = Console(highlight=False, markup=False, soft_wrap=True)
    for number in range(min(recipe.show, len(prompts))):
        for side, answers in sides.items():
            answer = answers[number]
            fate = "succeeds" if answer.succeeds else "does not parse" if answer.ended else "does not end"
            out.print(f"\n--- prompt {number + 1}, {side}: {fate}\n{prompts[number]}{answer.text}")
    out.print()
    out.print(drawn(f"function bodies at temperature {recipe.temperature:g}, 95% intervals", sides, result))
    for name, words, _ in RATES if "change" in result else ():
        x = result["change"][name]
        ends = f"95% interval {100 * x['low']:+.1f} to {100 * x['high']:+.1f}"
        trials = f"{x['gained']} prompts gained, {x['lost']} lost, McNemar's p {x['p']:.1g}"
        out.print(f"{words}: {100 * x['difference']:+.1f} points ({ends}); {trials}")


def drawn(title: str, sides: Sides, result: Mapping[str, Any]) -> Table:
    """The rates side by side, each with its interval."""
    table = Table(f"of {result['before']['prompts']} answers", *sides, title=title)
    told = [result[side] for side in sides]
    for name, words, _ in RATES:
        table.add_row(words, *(rate(x[name], x["prompts"]) for x in told), end_section=name != "success")
        if name == "success":
            table.add_row("  do nothing (pass, ...)", *(str(x["trivial"]) for x in told))
            table.add_row("  differ from one another", *(str(x["distinct"]) for x in told))
            table.add_row("  lines, mean", *(f"{x['mean_lines']:.1f}" for x in told), end_section=True)
    table.add_row("end by themselves", *(rate(x["ended"], x["prompts"]) for x in told))
    table.add_row("tokens, mean", *(f"{x['mean_tokens']:.0f}" for x in told))
    return table


def rate(successes: int, count: int) -> str:
    """In per cent, with its interval.

    >>> rate(81, 263)
    '30.8% (25.5 to 36.6)'
    """
    low, high = wilson(successes, count)
    return f"{successes / count:.1%} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    run(main, Count)
