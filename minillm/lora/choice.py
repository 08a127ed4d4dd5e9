"""What a model knows of its adapters, and the choice among them that all its wrapped layers look at."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from minillm.lora.config import LoraConfig
from minillm.model import Decoder


@dataclass
class Choice:
    """What the layers of one model do, until it is changed.

    active: adapters that are added up. rows: the adapter of each row of the batch instead, None for the base alone.
    """

    active: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None
    enabled: bool = True

    def names(self) -> tuple[str, ...]:
        """The active ones; none while adapters are disabled."""
        return self.active if self.enabled else ()

    def contexts(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """For `Decoder.contexts`: what a block runs in now, and when it is computed again: by the choice of now."""
        return nullcontext(), _Again(self)


class _Again:
    """A choice as it was when this was made, while this is entered; that may happen any number of times."""

    def __init__(self, choice: Choice) -> None:
        self.choice, self.then = choice, dict(vars(choice))
        self.before: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        self.before.append(dict(vars(self.choice)))
        vars(self.choice).update(self.then)

    def __exit__(self, *_: object) -> None:
        vars(self.choice).update(self.before.pop())


@dataclass
class State:
    """Kept on the decoder itself, so that a copy of the model has its own.

    configs: adapter -> settings, in the order they came. trained: names of the parameters that were trained before.
    """

    choice: Choice = field(default_factory=Choice)
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    trained: tuple[str, ...] = ()


def state_of(model: nn.Module) -> State:
    """That of the model, from now on if it had none; of one that wraps a decoder (`minillm.prompt`), the decoder's."""
    decoder = next((each for each in model.modules() if isinstance(each, Decoder)), model)
    found: State = vars(decoder).setdefault("_lora", State())
    return found
