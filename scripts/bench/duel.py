"""Engines that stay open and take turns, a second each: ratios that hold while the machine's speed comes and goes.

    python scripts/bench/duel.py minillm-int8 llama.cpp-q8_0 --peers-python peers/bin/python
    python scripts/bench/duel.py minillm-int8 ctranslate2-int8 torchao-int8 --figure prefill --turns 9 --save

On a machine that is shared, the memory's rate doubles and halves within minutes; figures taken minutes apart
(inference.py) then differ by more than the engines do. Here a turn is one measurement of every engine, right after each
other, and of the rate at which memory is read; a ratio is taken within a turn, and the median of the turns counts. All
are opened anew several times, as where its pages happen to lie makes an engine faster or slower for as long as it lives
(llama.cpp's Q8_0: 18 and 33 tokens a second within the hour). The quartiles say how far to trust a ratio.

The last row, for decoding: the first engine's rate times the bytes that a token reads, over the rate of reading alone.
A token reads all weights but the embedding once, counted at the engine's bits each.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import inference
import tyro
from rich.console import Console
from rich.table import Table


@dataclass
class Duel(inference.Bench):
    """Measure the first peer against the others, turn by turn."""

    peers: tyro.conf.Positional[tuple[str, ...]] = ("minillm-int8", "llama.cpp-q8_0")
    """The names that inference.py prints."""
    figure: Literal["decode", "prefill", "batch"] = "decode"
    """What is measured."""
    openings: int = 3
    """How often all are opened anew."""
    turns: int = 6
    """How often each then has its turn."""


class Opened:
    """One engine in a process of its own, asked for one figure at a time."""

    def __init__(self, python: str, script: str, *rest: str) -> None:
        command = [python, str(inference.HERE / script), "serve", *rest]
        self.name = f"{script} serve {rest[0]}"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask("")  # when it is open

    def ask(self, figure: str) -> float:
        """Its rate now."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(figure + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended: see above")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def main(args: Duel) -> dict[str, Any]:
    """Measure, print the table, return what the JSON line holds."""
    peers = inference.installed({name: inference.catalogue(args)[name] for name in args.peers})
    with tempfile.TemporaryDirectory() as scratch:
        files = args.files or Path(scratch)
        folder = args.checkpoint or inference.random_checkpoint(args, files)
        run = inference.Run(args, folder, files, Path(scratch))
        run.convert(peers)
        turns = [turn for number in range(args.openings) for turn in opening(run, list(peers), number)]
        first = peers[args.peers[0]]
        size = inference.sizes(folder)
    token = (size["linears"] + size["head"]) * first["bits"] / 8 / 1e9
    result = {"figure": args.figure, "rates": turns, "ratios": ratios(turns), "gb_per_token": token}
    Console(highlight=False).print(table(result))
    if args.save:
        name = f"duel-{args.shape}-{args.figure}-{args.peers[0]}.json"
        (inference.HERE / "results" / name).write_text(json.dumps(result, indent=2) + "\n")
    return result


def opening(run: inference.Run, peers: Sequence[str], number: int) -> list[dict[str, float]]:
    """Open all, let them take turns, close them."""
    args: Any = run.args
    opened: dict[str, Opened] = {}
    found: list[dict[str, float]] = []
    try:
        for name in peers:
            inference.say(f"opening {number + 1} of {args.openings}: {name}")
            opened[name] = Opened(run.python(name), "peers.py", *run.command(name, [args.figure]))
        opened["read"] = Opened(sys.executable, "machine.py", str(args.threads))
        for turn in range(args.turns):
            order = list(opened) if turn % 2 else list(reversed(opened))
            rates = {name: opened[name].ask(args.figure) for name in order}
            found.append({name: rates[name] for name in opened})
    finally:
        for one in opened.values():
            one.close()
    return found


def ratios(turns: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Other -> first quartile, median and third quartile of how many times its rate the first one's is.

    >>> ratios([{"a": 2.0, "b": 1.0}, {"a": 4.0, "b": 2.0}])
    {'b': [2.0, 2.0, 2.0]}
    """
    first, *others = turns[0]
    return {
        other: statistics.quantiles([turn[first] / turn[other] for turn in turns], n=4, method="inclusive")
        for other in others
    }


def table(result: dict[str, Any]) -> Table:
    """Rates and ratios, for people."""
    turns = result["rates"]
    first = next(iter(turns[0]))
    drawn = Table("", "median", f"{first}: times", "quartiles", title=f"{result['figure']}, {len(turns)} turns")
    for name in turns[0]:
        is_read = name == "read"
        if is_read and result["figure"] != "decode":
            continue
        factor = result["gb_per_token"] if is_read else 1
        low, middle, high = (factor * ratio for ratio in result["ratios"].get(name, (1, 1, 1)))
        median = statistics.median(turn[name] for turn in turns)
        rate = f"{median:.1f} {'GB/s' if is_read else 'tok/s'}"
        drawn.add_row("memory, read" if is_read else name, rate, f"{middle:.3g}", f"{low:.3g} {high:.3g}")
    return drawn


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Duel, description=__doc__))))
