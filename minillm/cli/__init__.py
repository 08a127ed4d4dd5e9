"""The `minillm` command: generate, chat, info, plan, quantize, adapter, plot, verify, outliers, doctor.

Each subcommand is a dataclass; its fields are the flags, the string under a field its help. An error that is the
input's fault prints one line and exits with status 2; `--debug` shows where it was raised.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import torch
import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, PositionalMetavarFromFieldName, subcommand

from minillm.cli.adapter import Adapter
from minillm.cli.examine import Doctor, Info, Verify
from minillm.cli.outliers import Outliers
from minillm.cli.plan import Plan
from minillm.cli.plot import Plot
from minillm.cli.quantise import Quantize
from minillm.cli.terminal import say
from minillm.cli.write import Chat, Generate
from minillm.errors import MinillmError

_DESCRIPTION = "Load, verify and run language models by hand-written, readable code. minillm COMMAND --help says more."

Command = Union[  # noqa: UP007  # `|` cannot join Annotated on Python 3.10
    Annotated[Generate, subcommand("generate")],
    Annotated[Chat, subcommand("chat")],
    Annotated[Info, subcommand("info")],
    Annotated[Plan, subcommand("plan")],
    Annotated[Quantize, subcommand("quantize")],
    Annotated[Adapter, subcommand("adapter")],
    Annotated[Plot, subcommand("plot")],
    Annotated[Verify, subcommand("verify")],
    Annotated[Outliers, subcommand("outliers")],
    Annotated[Doctor, subcommand("doctor")],
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for a fault that verify or doctor found or a plan that does not fit, 2
    for bad input, 130 after Ctrl-C, 141 for a closed pipe."""
    style = (FlagCreatePairsOff, PositionalMetavarFromFieldName, DisallowNone)
    command: Any = tyro.cli(Command, prog="minillm", description=_DESCRIPTION, args=arguments, config=style)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    try:
        return command.run() or 0
    except MinillmError as error:
        if command.debug:
            raise
        say(f"minillm: {error}", style="red")
        return 2
    except torch.OutOfMemoryError as error:
        say(f"minillm: {str(error).splitlines()[0]}; try --dtype bfloat16 or a smaller --max-new-tokens", style="red")
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:  # `minillm generate ... | head`: nobody reads on, and Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
