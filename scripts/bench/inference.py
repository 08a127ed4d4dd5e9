"""Inference on the CPU, minillm beside its peers: seconds to load, memory, prefill and decode, in turn, in one run.

    python scripts/bench/inference.py --peers-python peers/bin/python --save --png speed.png     TinyLlama's shape
    python scripts/bench/inference.py --only int8 decode                                         some peers and figures
    python scripts/bench/inference.py --shape falcon-7b --only minillm bitsandbytes              14 GB on the disk
    python scripts/bench/inference.py --layers 4 --outliers 6 --rounds 1                         any size

`pip install minillm[bench]` brings the peers, here or, as their pins clash, in an environment of their own; what is not
installed is named and left out. The engines: engines.py; their files: convert.py; random weights: checkpoint.py.

Rounds go over all peers, each measurement in a fresh process, the machine's own limits (machine.py) first; the table
holds the medians. Absolute figures move with the machine and the hour: quote the ratios. Greedy, batch 1:

    load      from the call to a model that is ready; packages are imported, files converted and in the page cache
    first     from the call to the first logits after the short prompt: weights that `load` only maps are read by then,
              graphs compiled
    peak      the largest resident set of the process, all of it; load, first and peak are always measured
    prefill   512 tokens to the logits of the last position      (CTranslate2: to the first token)
    decode    32 steps after a prompt of 32 tokens; `batch`: 8 such prompts at once, tokens of all rows
    limit     decode: weights that a step reads (all but the embedding), over the rate at which the machine reads;
              prefill: the products of the linears, over its matmul rate

Whether all compute the same is measured in each run: `r` is the correlation of a peer's logits after the short prompt
with those of transformers in fp32 (bf16 where that does not fit). Below 0.99 the run warns; at 4 bits below 0.6, as
random weights of many layers keep little more. Planted fault: q and k not re-ordered for llama.cpp give 0.86 where the
right file gives 0.99999 (2 layers of width 512, 3 outliers). On TinyLlama's shape, random: bf16 0.9997 and more, 8 bits
0.994 to 0.998, all with the first token of transformers; 4 bits (bitsandbytes, llama.cpp) 0.79.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import report
import tyro
from rich.console import Console

HERE = Path(__file__).resolve().parent
SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama": dict(family="llama", layers=22, width=2048, heads=32, kv_heads=4, ffn=5632, vocab=32_000),
    "falcon-7b": dict(family="falcon", layers=32, width=4544, heads=71, kv_heads=1, ffn=18_176, vocab=65_024),
    "small": dict(family="llama", layers=12, width=768, heads=12, kv_heads=12, ffn=3072, vocab=32_000),
}
PATHS = ("checkpoint", "files", "png", "peers_python")


@dataclass
class Bench:
    """Measure minillm and its peers on this machine."""

    shape: Literal["tinyllama", "falcon-7b", "small"] = "tinyllama"
    """Which model shape; the sizes below replace its own."""
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    vocab: int | None = None
    outliers: int = 0
    """Outlier columns of each block's activations; see checkpoint.py."""
    only: tuple[str, ...] = ()
    """Parts of peers' names (minillm, int8, llama.cpp ...) and figures (prefill, decode, batch); all if none."""
    rounds: int = 3
    """Measurements of each peer; the median counts."""
    prompt: int = 32
    """Tokens before the decode test."""
    new: int = 32
    """Tokens decoded."""
    long: int = 512
    """Tokens of the prefill test."""
    rows: int = 8
    """Prompts of the batch test."""
    threads: int = len(os.sched_getaffinity(0))
    """Threads of every peer."""
    peers_python: str = sys.executable
    """The interpreter of the environment that has the peers; minillm runs in this one."""
    checkpoint: Path | None = None
    """A folder to measure instead of random weights; its config.json gives the sizes."""
    files: Path | None = None
    """Where weights and conversions are kept for the next run; a temporary folder if not said."""
    save: bool = False
    """Keep the result as JSON in scripts/bench/results."""
    png: Path | None = None
    """Draw a bar chart into this file."""


def main(args: Bench) -> dict[str, Any]:
    """Measure, print the table, return what the JSON line holds."""
    peers = installed(chosen(catalogue(args), args.only))
    with tempfile.TemporaryDirectory() as scratch:
        files = args.files or Path(scratch)
        run = Run(args, args.checkpoint or random_checkpoint(args, files), files, Path(scratch))
        converting = run.convert(peers)
        reference = run.reference()
        rounds = [run.round(number, peers) for number in range(1, args.rounds + 1)]
        found = {
            name: {"bits": peer["bits"], "versions": peer["versions"], "r": run.agreement(name, reference)}
            | report.medians([round_[name] for round_ in rounds])
            for name, peer in peers.items()
        }
        limits = report.medians([round_["limits"] for round_ in rounds])
        result = {
            "args": {key: value for key, value in vars(args).items() if key not in PATHS},
            "sizes": sizes(run.folder),
            "machine": called(sys.executable, "machine.py", "describe") | {"threads": args.threads},
            "limits": limits,
            "bounds": report.bounds(sizes(run.folder), limits),
            "converting": converting,
            "peers": found,
            "ratios": report.ratios(found),
            "rounds": rounds,
        }
    console = Console(highlight=False)
    Console(highlight=False, width=max(console.width, 150)).print(report.table(result))
    if args.save:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"inference-{args.shape}.json").write_text(json.dumps(result, indent=2) + "\n")
    if args.png is not None:
        report.draw(result, args.png)
    return result


def say(text: str) -> None:
    """Tell whoever waits."""
    print(text, file=sys.stderr, flush=True)


def called(python: str, script: str, *rest: str) -> dict[str, Any]:
    """A script beside this one in a process of its own; RuntimeError with its last words where it fails."""
    done = subprocess.run([python, str(HERE / script), *rest], capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or [f"signal {-done.returncode}"]
        raise RuntimeError(f"{script}: {words[-1][:300]}")
    return dict(json.loads(done.stdout.splitlines()[-1])) if done.stdout.strip() else {}


def catalogue(args: Bench) -> dict[str, dict[str, Any]]:
    """All peers: ours as this interpreter has them, the others as theirs does."""
    here, there = (called(python, "peers.py", "list") for python in (sys.executable, args.peers_python))
    return {name: (here if name.startswith("minillm") else there)[name] for name in here}


def chosen(peers: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Those whose name holds one of the words that is not a figure; all where there is none.

    >>> list(chosen({"minillm-int8": 1, "llama.cpp-q8_0": 2, "minillm-bf16": 3}, ["decode", "int8", "llama"]))
    ['minillm-int8', 'llama.cpp-q8_0']
    """
    parts = [word for word in words if word not in report.FIGURES]
    for part in parts:
        if not any(part in name for name in peers):
            raise SystemExit(
                f"--only {part}: no peer and no figure; peers: {', '.join(peers)}; figures: {', '.join(report.FIGURES)}"
            )
    return {name: peer for name, peer in peers.items() if not parts or any(part in name for part in parts)}


def random_checkpoint(args: Bench, files: Path) -> Path:
    """Written in `files`, unless it is there."""
    own = {name: getattr(args, name) for name in SHAPES[args.shape] if getattr(args, name, None) is not None}
    shape = SHAPES[args.shape] | own | {"outliers": args.outliers}
    folder = files / "-".join(str(value) for value in shape.values())
    if not (folder / "config.json").exists():
        say(f"writing random weights: {folder.name}")
        called(sys.executable, "checkpoint.py", str(folder), json.dumps(shape))
    return folder


def installed(peers: dict[str, Any]) -> dict[str, Any]:
    """Those that can run; the others are named."""
    for name, peer in peers.items():
        if peer["missing"]:
            say(f"left out: {name} needs {', '.join(peer['missing'])}")
    return {name: peer for name, peer in peers.items() if not peer["missing"]}


def sizes(folder: Path) -> dict[str, int]:
    """Numbers in the checkpoint: in all, in the linears of the blocks, in the head (tied or not)."""
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    ends = {name: size for name, size in matrices.items() if "embed" in name or name == "lm_head.weight"}
    linears = sum(matrices.values()) - sum(ends.values())
    return {"all": sum(map(math.prod, shapes.values())), "linears": linears, "head": max(ends.values())}


class Run(NamedTuple):
    """One checkpoint under measurement."""

    args: Bench
    folder: Path
    files: Path
    scratch: Path

    def measure(self, name: str, figures: Sequence[str]) -> dict[str, float]:
        """One peer in a fresh process."""
        return called(self.python(name), "peers.py", "measure", *self.command(name, figures))

    def python(self, name: str) -> str:
        """The interpreter that has this peer."""
        return sys.executable if name.startswith("minillm") else self.args.peers_python

    def command(self, name: str, figures: Sequence[str]) -> list[str]:
        """What peers.py wants to know."""
        args, vocabulary = self.args, json.loads((self.folder / "config.json").read_text())["vocab_size"]
        draw = random.Random(0)
        job = {
            "figures": figures,
            "rows": [[draw.randrange(vocabulary) for _ in range(args.prompt)] for _ in range(args.rows)],
            "long": [draw.randrange(vocabulary) for _ in range(args.long)],
            "new": args.new,
            "threads": args.threads,
            "logits": str(self.scratch / f"{name}.npy"),
        }
        return [name, str(self.folder), str(self.converted), json.dumps(job)]

    @property
    def converted(self) -> Path:
        """The folder of the peers' own formats."""
        return self.files / f"{self.folder.name}-converted"

    def convert(self, peers: dict[str, Any]) -> dict[str, float]:
        """Make the files that the peers need; format -> seconds, 0 where it was there. Peers without a file go."""
        self.converted.mkdir(parents=True, exist_ok=True)
        took: dict[str, float] = {}
        for name, kind in [(name, kind) for name, peer in peers.items() for kind in peer["converted"]]:
            start = time.perf_counter()
            try:
                if kind not in took and not (self.converted / kind).exists():
                    say(f"converting: {kind}")
                    called(self.args.peers_python, "convert.py", kind, str(self.folder), str(self.converted))
            except RuntimeError as error:
                say(f"left out: {name}: {error}")
                peers.pop(name, None)
            took.setdefault(kind, time.perf_counter() - start)
        return took

    def reference(self) -> Any:
        """transformers' logits after the short prompt, in fp32 if half of the memory holds that; None without them."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        name = "transformers-fp32" if 4 * sizes(self.folder)["all"] < memory / 2 else "transformers-bf16"
        say(f"reference: {name}")
        try:
            self.measure(name, [])
        except RuntimeError as error:
            return say(f"no reference: {error}")
        return np.load(self.scratch / f"{name}.npy")

    def round(self, number: int, peers: dict[str, Any]) -> dict[str, Any]:
        """The machine's limits, then every peer once. A peer that fails leaves `peers`."""
        asked = [figure for figure in report.FIGURES if figure in self.args.only] or list(report.FIGURES)
        say(f"round {number} of {self.args.rounds}: the machine")
        found = {"limits": called(sys.executable, "machine.py", "limits", str(self.args.threads))}
        for name in list(peers):
            say(f"round {number} of {self.args.rounds}: {name}")
            try:
                found[name] = self.measure(name, asked)
            except RuntimeError as error:
                say(f"left out: {name}: {error}")
                del peers[name]
        return found

    def agreement(self, name: str, reference: Any) -> float | None:
        """Correlation of the logits with the reference's; says so where it is low."""
        if reference is None:
            return None
        r = float(np.corrcoef(np.load(self.scratch / f"{name}.npy"), reference)[0, 1])
        if not r > (0.6 if name.endswith(("nf4", "nf4-head", "q4_0")) else 0.99):
            say(f"{name} computes something else: its logits correlate {r:.4f} with the reference's")
        return r


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Bench, description=__doc__))))
