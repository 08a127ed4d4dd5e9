"""What a prompt of virtual tokens is: how many, of which kind, how it starts, and what it is made by while training.

    kind        what is trained                                                       source
    "prompt"    P input embeddings (P, D)                                             prompt tuning, 2104.08691 §2
    "p-tuning"  the same, made by an encoder from a table (P, D)                      P-tuning, 2103.10385 §3.2
    "prefix"    keys and values of every layer (P, 2 L N E), or an MLP that makes     prefix tuning, 2101.00190 §4.2,
                them from a table (P, N E)                                            §4.3

N is the number of heads that transformers' cache has (`minillm.prompt.cache.cached_heads`). The fields have the meaning
of peft's configs (0.21); `minillm.prompt.peft_config` has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from minillm.errors import InputError, nearest

Kind = Literal["prompt", "p-tuning", "prefix"]
Init = Literal["random", "vocab", "text", "zero"]
Encoder = Literal["mlp", "lstm"]

#: The first is the default.
INITS: Mapping[str, tuple[Init, ...]] = {
    "prompt": ("random", "vocab", "text"),
    "p-tuning": ("random",),
    "prefix": ("random", "zero"),
}
ENCODERS: Mapping[str, tuple[Encoder | None, ...]] = {
    "prompt": (None,),
    "p-tuning": ("mlp", "lstm"),
    "prefix": (None, "mlp"),
}


@dataclass(frozen=True)
class PromptConfig:
    """Settings of one prompt.

    kind: see above. tokens: P. init: "random" (deviation 1), "vocab" (embeddings of random tokens), "text" (those of
    `text`, cut or repeated), "zero" (prefix only; no no-op, whatever peft's help says: a key of zeros has score 0 and
    takes its share of the softmax). encoder: None is the kind's default: "mlp" for P-tuning, none for a prefix. width:
    hidden size of the encoder; None means that of its table. layers, dropout: of the LSTM.
    """

    kind: Kind = "prompt"
    tokens: int = 20
    init: Init = "random"
    text: str = ""
    encoder: Encoder | None = None
    width: int | None = None
    layers: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, get_args(Kind))
        if self.encoder is None:
            object.__setattr__(self, "encoder", ENCODERS[self.kind][0])
        _check_choice(f"init of a {self.kind}", self.init, INITS[self.kind])
        _check_choice(f"encoder of a {self.kind}", self.encoder, ENCODERS[self.kind])
        for name, count in (("tokens", self.tokens), ("layers", self.layers), ("width", self.width)):
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise InputError(f"{name} is {count!r}; give a whole number of at least 1")
        if (self.init == "text") != bool(self.text):
            raise InputError(f"init is {self.init!r} and text {self.text!r:.40}; a text and init 'text' go together")
        if self.width is not None and self.encoder is None:
            raise InputError(f"width {self.width} is an encoder's, and this {self.kind} has none; leave it out")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout!r}; give a number from 0 up to, but not, 1")
        if self.encoder != "lstm" and (self.layers != 2 or self.dropout):
            raise InputError("layers and dropout are the LSTM encoder's; leave them out or set encoder='lstm'")
        if self.dropout and self.layers == 1:
            raise InputError(f"dropout {self.dropout} lies between the LSTM's layers and there is one; leave it out")


def _check_choice(name: str, given: object, known: tuple[Any, ...]) -> None:
    if given not in known:
        hint = nearest(str(given), [str(each) for each in known])
        raise InputError(f"{name} is {given!r}{hint}; have {', '.join(map(str, known))}")


def settings(config: PromptConfig | None, fields: Mapping[str, Any]) -> PromptConfig:
    """A config, or the default one, with some fields changed; InputError for others."""
    known = PromptConfig.__dataclass_fields__
    for name in fields:
        if name not in known:
            raise InputError(f"{name} is no setting of a prompt{nearest(name, known)}; have {', '.join(known)}")
    return replace(config or PromptConfig(), **fields)
