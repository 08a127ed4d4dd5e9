"""From a recipe to a command: a frozen dataclass of choices, a `main(recipe) -> dict`, and nothing else.

    if __name__ == "__main__":
        run(main, Pretrain)

The docstring under each field is its help text. Standard output ends with one line of JSON, what `main` returned, so
that people and programs read the same run.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TypeVar

import tyro

from minillm.errors import MinillmError
from minillm.training import ranks

Recipe = TypeVar("Recipe")


class Interrupted(Exception):
    """A run was stopped by the user and left a state; the message says how to go on."""


def resume_command() -> str:
    """What to type to go on with the run that this process began."""
    given = [argument for argument in sys.argv if argument not in ("--overwrite", "--resume")]
    several = ["-m", "torch.distributed.run", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return shlex.join([sys.executable, *(several if ranks.world_planned() > 1 else ()), *given, "--resume"])


def run(main: Callable[[Recipe], dict[str, Any]], recipe: type[Recipe]) -> NoReturn:
    """Read the command line into a `recipe`, call `main`, print its JSON; exits 0, 2 for bad input, 130 for Ctrl-C.

    Of several ranks (`minillm.training.ranks`) the first one prints.
    """
    try:
        result = main(_read(recipe))
    except MinillmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"interrupted. {stop}".rstrip(), file=sys.stderr)
        sys.exit(130)
    if ranks.is_first():
        print(json.dumps(result))
    sys.exit(0)


def _read(recipe: type[Recipe]) -> Recipe:
    """The command line as a recipe. All ranks have the same one: the first one says what is wrong with it."""
    if ranks.is_first():
        return tyro.cli(recipe)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            return tyro.cli(recipe)
        except MinillmError:
            sys.exit(2)
