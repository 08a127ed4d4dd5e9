"""Which tensor of a checkpoint is which parameter of a `Decoder`, in both directions.

A `Rule` ties one checkpoint tensor to one or more parameters. Most are renames; a fused weight splits into several, and
`join` is the exact inverse of `split`, so that load and save read the same table:

    load   for each rule: parameters = split(checkpoint tensor)
    save   for each rule: checkpoint tensor = join(parameters)

Accounting is strict. Every parameter must be filled; every key of the checkpoint must be used by a rule or match a
pattern that is dropped *by name*. Anything else is an error with the nearest names: a silently unmatched key is a model
that looks loaded and talks nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from minillm.errors import CheckpointError, nearest


def _alone(tensor: Tensor) -> Sequence[Tensor]:
    return (tensor,)


def _only(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


@dataclass(frozen=True)
class Rule:
    """One checkpoint tensor `theirs` and the parameters `ours` that it holds. Default: a rename."""

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]] = _alone
    join: Callable[[Sequence[Tensor]], Tensor] = _only


@dataclass(frozen=True)
class WeightMap:
    """The rules of one model, the prefix of its body's keys, and patterns of keys that are dropped."""

    rules: tuple[Rule, ...]
    prefix: str
    dropped: tuple[str, ...] = ()

    def match(self, keys: Iterable[str], parameters: Mapping[str, Tensor], *, where: str) -> dict[str, Rule]:
        """Checkpoint key -> rule, in the order of `keys`, after the accounting.

        keys: the names in the checkpoint, with or without the body's prefix (`LlamaModel` saves without).
        parameters: the model's, by name. where: the folder, for errors. Raises CheckpointError on any key or parameter
        left over.
        """
        keys = list(keys)
        bare = bool(keys) and not any(key.startswith(self.prefix) for key in keys)
        by_key = {rule.theirs.removeprefix(self.prefix) if bare else rule.theirs: rule for rule in self.rules}
        matched = {key: by_key[key] for key in keys if key in by_key}
        extra = [key for key in keys if key not in by_key and not self._drops(key)]
        missing = [key for key in by_key if key not in matched]
        if extra or missing:
            raise CheckpointError(f"{where}: {_account(missing, extra, by_key)}")
        filled = {name for rule in matched.values() for name in rule.ours}
        unfilled = sorted(set(parameters) - filled)
        if unfilled:
            raise CheckpointError(f"{where}: no rule fills {_some(unfilled)}; the weight map does not fit the config")
        return matched

    def _drops(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.dropped)


def _account(missing: list[str], extra: list[str], known: Iterable[str]) -> str:
    parts = []
    if missing:
        hint = nearest(missing[0], extra)
        parts.append(f"the checkpoint lacks {_some(missing)}{hint}")
    if extra:
        hint = nearest(extra[0], missing or known)
        parts.append(
            f"{'it' if missing else 'the checkpoint'} holds {_some(extra)}, which the config has no place for{hint}"
        )
    return "; ".join(parts) + "; config and weights must come from the same model"


def _some(names: Sequence[str], most: int = 3) -> str:
    """`a, b, c and 5 more`.

    >>> _some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
