"""Load time, peak memory, prefill and decode of minillm against transformers, in turn, on the same random checkpoint.

    python scripts/bench/inference.py                      TinyLlama's shape, bf16: 2.2 GB written to a temporary folder
    python scripts/bench/inference.py --dtype float32 --rounds 5

Each measurement is a fresh process, the two libraries alternate, and the table holds medians and their ratio. Absolute
figures move with the machine and the hour: quote the ratios. Greedy, batch 1: a prompt of 32 tokens and 32 more
(decode), one of 512 (prefill). Peak memory is the process's largest resident set, less that of importing torch.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "tinyllama": {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "ffn": 5632, "vocab": 32_000},
    "small": {"layers": 12, "width": 768, "heads": 12, "kv_heads": 12, "ffn": 3072, "vocab": 32_000},
}
WHO = ("minillm", "transformers")
UNITS = {"load": "s", "peak": "GB", "prefill": "tokens/s", "decode": "tokens/s"}


@dataclass
class Bench:
    """Compare minillm with transformers on this machine."""

    shape: Literal["tinyllama", "small"] = "tinyllama"
    """Which model shape."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of file and model."""
    rounds: int = 3
    """Measurements of each library; the median counts."""
    save: bool = False
    """Keep the result as JSON in scripts/bench/results."""


def main(args: Bench) -> dict[str, object]:
    """Measure, print the table, return what the JSON line holds."""
    with tempfile.TemporaryDirectory() as folder:
        weights = write_checkpoint(Path(folder), args)
        runs: dict[str, list[dict[str, float]]] = {who: [] for who in WHO}
        for round_ in range(args.rounds):
            for who in WHO:
                print(f"round {round_ + 1} of {args.rounds}: {who}", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--measure", who, folder]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[who].append(json.loads(output.splitlines()[-1]))
    medians = {who: {key: statistics.median(run[key] for run in runs[who]) for key in UNITS} for who in WHO}
    result = {**vars(args), "weights_gb": weights / 1e9, "machine": machine(), **medians}
    Console(highlight=False).print(table(medians, args, weights))
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"inference-{args.shape}-{args.dtype}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def write_checkpoint(folder: Path, args: Bench) -> int:
    """A random model of the shape, as safetensors; returns the bytes of its weights."""
    import minillm

    shape = SHAPES[args.shape]
    config = minillm.DecoderConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_size=shape["width"] // shape["heads"],
        ffn_size=shape["ffn"],
        context=2048,
    )
    with torch.device("meta"):
        model = minillm.Decoder(config)
    model = model.to(getattr(torch, args.dtype)).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    minillm.save(model, folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def measure(who: str, folder: str) -> dict[str, float]:
    """One library, in this process: seconds to load, GB above torch, tokens a second."""
    before = peak_bytes()
    start = time.perf_counter()
    prefill, decode = (_minillm if who == "minillm" else _transformers)(folder)
    loaded = time.perf_counter() - start
    decode(torch.randint(32_000, (1, 32)), 4)  # warm up
    prompt, long = torch.randint(32_000, (1, 32)), torch.randint(32_000, (1, 512))
    decoding = statistics.median(decode(prompt, 32) for _ in range(3))
    filling = 512 / statistics.median(_seconds(lambda: prefill(long)) for _ in range(3))
    return {"load": loaded, "peak": (peak_bytes() - before) / 1e9, "prefill": filling, "decode": decoding}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes() -> int:
    """The largest resident set of this program. Not ru_maxrss, which a child process inherits from its parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


Prefill = Callable[[torch.Tensor], object]
Decode = Callable[[torch.Tensor, int], float]


def _minillm(folder: str) -> tuple[Prefill, Decode]:
    import minillm
    from minillm.generation.generate import decode_step, prefill

    model = minillm.load_model(folder)

    def run(prompt: torch.Tensor, tokens: int) -> float:
        cache = model.new_cache(1, prompt.shape[1] + tokens)
        logits = prefill(model, prompt, None, cache)
        start = time.perf_counter()
        for _ in range(tokens):
            logits = decode_step(model, logits.argmax(-1), cache)
        return tokens / (time.perf_counter() - start)

    return lambda prompt: prefill(model, prompt, None, model.new_cache(1, prompt.shape[1])), run


def _transformers(folder: str) -> tuple[Prefill, Decode]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.inference_mode()
    def run(prompt: torch.Tensor, tokens: int) -> float:
        out = model(prompt, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(tokens):
            chosen = out.logits[:, -1].argmax(-1)[:, None]
            out = model(chosen, past_key_values=out.past_key_values, use_cache=True)
        return tokens / (time.perf_counter() - start)

    return torch.inference_mode()(lambda prompt: model(prompt, use_cache=True, logits_to_keep=1)), run


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(medians: dict[str, dict[str, float]], args: Bench, weights: int) -> Table:
    """Medians side by side, and minillm's advantage: above 1 is better, whichever way the quantity points."""
    shown = Table(title=f"{args.shape}, {args.dtype}, {weights / 1e9:.2f} GB of weights", title_justify="left")
    for heading in ("", *WHO, "advantage"):
        shown.add_column(heading, justify="right" if heading else "left")
    for key, unit in UNITS.items():
        ours, theirs = medians["minillm"][key], medians["transformers"][key]
        advantage = theirs / ours if unit in ("s", "GB") else ours / theirs
        shown.add_row(f"{key}, {unit}", f"{ours:.2f}", f"{theirs:.2f}", f"{advantage:.2f}")
    return shown


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:4])))
    else:
        print(json.dumps(main(tyro.cli(Bench, description=__doc__))))
