"""The errors minillm raises on purpose.

Each message is one line that says *what* is wrong, *where* (file, tensor, field or argument) and *how to mend it*. The
command line prints that line and exits with status 2; only `--debug` shows a traceback. Anything else that reaches a
user as a traceback is a bug in minillm.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MinillmError(Exception):
    """Base of every error that is the input's fault, not the program's."""


class ConfigError(MinillmError):
    """A config field is unknown, contradictory, or asks for maths that minillm does not have."""


class CheckpointError(MinillmError):
    """A file of a checkpoint is missing, broken, unsafe, or does not fit the config."""


class TokenizerError(MinillmError):
    """A tokenizer or chat template is missing, unsafe, or does not fit the model."""


class InputError(MinillmError):
    """A prompt, sampling option or argument is out of range."""


class NumericsError(MinillmError):
    """A computation produced NaN where a number was needed."""


def nearest(name: str, candidates: Iterable[str], *, most: int = 3) -> str:
    """` (nearest: a, b)` for an error message, or an empty string where nothing is alike.

    >>> nearest("k_porj", ["q_proj", "k_proj", "norm"], most=1)
    ' (nearest: k_proj)'
    >>> nearest("k_proj", ["zzz"])
    ''
    """
    found = difflib.get_close_matches(name, list(candidates), n=most, cutoff=0.6)
    return f" (nearest: {', '.join(found)})" if found else ""
