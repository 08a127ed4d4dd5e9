"""What a model that is being trained writes: to be read by whoever watches, and kept in samples.jsonl.

held-out example   7 + 4 = | 11 <eos>          the tokens before the first taught one are the prompt
the model writes   7 + 4 = | 12 <eos>          the most probable token each time, a few dozen at the most
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minillm.data.examples import Example
from minillm.data.tokenizer import Tokenizer
from minillm.generation.generate import token_steps
from minillm.generation.sampling import Sampling
from minillm.model import Decoder
from minillm.training.metrics import Metrics

_NEW_TOKENS = 48
_SHOWN = 60  # letters of prompt and of answer in a line on the terminal; samples.jsonl has all of them


def show_samples(
    model: Decoder,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    step: int,
    *,
    metrics: Metrics,
    say: Callable[[str], Any],
) -> None:
    """Let the model continue the prompt of each example: a line to `say`, a line of samples.jsonl.

    No random number is drawn, so that training goes on as if nobody had looked.
    """
    with evaluating(model):
        for example in examples:
            prompt, wanted = (tokenizer.decode(ids) for ids in prompt_and_answer(example))
            text = tokenizer.decode(continuation(model, tokenizer, prompt_and_answer(example)[0]))
            metrics.sample(step, prompt=prompt, text=text, wanted=wanted)
            say(f"  {_line(prompt)[-_SHOWN:]} → {_line(text)[:_SHOWN]}")


def prompt_and_answer(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before the first taught one, and those taught in one go from there."""
    taught = example.taught.tolist()
    begin = taught.index(True)
    end = taught.index(False, begin) if False in taught[begin:] else len(taught)
    ids = example.tokens.tolist()
    return ids[:begin], ids[begin:end]


def continuation(model: Decoder, tokenizer: Tokenizer, prompt: Sequence[int], *, most: int = _NEW_TOKENS) -> list[int]:
    """At most `most` tokens after `prompt` (S,), each the most probable one, up to and without a special token.

    Not `generate`, which does what the checkpoint's generation_config.json says: a file that asks for beams would end
    the training.
    """
    ids: list[int] = []
    for step in token_steps(model, [prompt], Sampling(), min(most, model.config.longest - len(prompt))):
        if step.tokens[0] in (*tokenizer.special_ids, tokenizer.eos_id):
            break
        ids += step.tokens
    return ids


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout and no gradient; afterwards the mode that was."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def overfitting(evaluated: Sequence[tuple[int, float]]) -> str | None:
    """A word where the newest held-out loss is above the least of those before; pairs of step and loss.

    >>> overfitting([(0, 3.0), (10, 2.0), (20, 2.5)])
    'step 20: the held-out loss is 2.500, above 2.000 at step 10: learning by heart begins'
    >>> overfitting([(0, 3.0), (10, 2.0)])
    """
    if len(evaluated) < 2:
        return None
    (step, loss), (best_step, best) = evaluated[-1], min(evaluated[:-1], key=lambda each: each[1])
    if not loss > best:
        return None
    return (
        f"step {step}: the held-out loss is {loss:.3f}, above {best:.3f} at step {best_step}: learning by heart begins"
    )


def _line(text: str) -> str:
    """Text on one line, without what a terminal would obey."""
    return "".join(each if each.isprintable() else "⏎" if each == "\n" else "·" for each in text.strip())
