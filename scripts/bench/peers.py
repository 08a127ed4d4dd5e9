"""Which peers there are, and one of them measured in this process.

    python peers.py list                               what this interpreter has, as JSON
    python peers.py measure PEER FOLDER CONVERTED JOB  figures of one peer; JOB is a `Job` as JSON
    python peers.py serve PEER FOLDER CONVERTED JOB    the same peer, open: a figure a line in, its rate a line out

Needs nothing but numpy and the peer itself, so that it runs under any interpreter: the peers' pins clash. FOLDER is a
Hugging Face checkpoint, CONVERTED what `convert.py` made of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from engines import Engine, Job, Place, bitsandbytes_nf4, ctranslate2, llama_cpp, minillm, torchao, transformers


class Peer(NamedTuple):
    """How to open an engine, what must be installed for it, and of how many bits its weights are."""

    open: Callable[[Place], Engine]
    bits: int
    needs: tuple[str, ...]
    converted: tuple[str, ...] = ()  # arguments of convert.py, in order


HF, BNB = ("torch", "transformers"), ("torch", "transformers", "bitsandbytes", "accelerate")
OURS = ("torch", "minillm")
CT2, LLAMA = ("ctranslate2",), ("llama_cpp", "gguf", "safetensors")
PEERS = {
    "minillm-fp32": Peer(partial(minillm, dtype="float32"), 32, OURS),
    "transformers-fp32": Peer(partial(transformers, dtype="float32"), 32, HF),
    "minillm-bf16": Peer(minillm, 16, OURS),
    "transformers-bf16": Peer(transformers, 16, HF),
    "llama.cpp-bf16": Peer(partial(llama_cpp, kind="bf16"), 16, LLAMA, ("bf16.gguf",)),
    "minillm-int8": Peer(partial(minillm, quantize="int8"), 8, OURS),
    "minillm-int8-head": Peer(partial(minillm, quantize="int8", skip=()), 8, OURS),  # the head too, as llama.cpp has it
    "minillm-int8-nosplit": Peer(partial(minillm, quantize="int8", threshold=0.0), 8, OURS),  # no outlier columns
    "bitsandbytes-int8": Peer(partial(transformers, quantize={"load_in_8bit": True}), 8, BNB),
    "torchao-int8": Peer(torchao, 8, (*HF, "torchao")),
    "ctranslate2-int8": Peer(ctranslate2, 8, CT2, ("ct2-int8",)),
    "llama.cpp-q8_0": Peer(partial(llama_cpp, kind="q8_0"), 8, LLAMA, ("bf16.gguf", "q8_0.gguf")),
    "minillm-nf4": Peer(partial(minillm, quantize="nf4"), 4, OURS),
    "minillm-nf4-head": Peer(partial(minillm, quantize="nf4", skip=()), 4, OURS),
    "bitsandbytes-nf4": Peer(bitsandbytes_nf4, 4, BNB),
    "llama.cpp-q4_0": Peer(partial(llama_cpp, kind="q4_0"), 4, LLAMA, ("bf16.gguf", "q4_0.gguf")),
}

#: What transformers would import while it loads.
LAZY = {
    "transformers": ("transformers.models.llama.modeling_llama", "transformers.models.falcon.modeling_falcon"),
    "bitsandbytes": ("transformers.integrations.bitsandbytes", "transformers.quantizers.auto"),
    "torchao": ("torchao.quantization",),
}


def catalogue() -> dict[str, dict[str, Any]]:
    """Peer -> bits, the conversions it needs, versions, and what is not installed here."""
    return {
        name: {
            "bits": peer.bits,
            "converted": peer.converted,
            "missing": [need for need in peer.needs if importlib.util.find_spec(need) is None],
            "versions": {need: version(need) for need in peer.needs if importlib.util.find_spec(need)},
        }
        for name, peer in PEERS.items()
    }


def version(module: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(module.replace("_cpp", "-cpp-python"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def measure(name: str, place: Place) -> dict[str, float]:
    """Seconds to load, GB at the peak, tokens a second; the packages are imported before the clock starts."""
    job = place.job
    import_all(name, job.threads)
    start = time.perf_counter()
    engine = PEERS[name].open(place)
    found = {"load": time.perf_counter() - start}
    last = engine.logits(job.rows[:1])
    found["first"] = time.perf_counter() - start
    np.save(job.logits, np.asarray(last.float() if hasattr(last, "float") else last, dtype=np.float32)[0])
    for figure in ("decode", "prefill"):
        if figure in job.figures:
            warm_up(engine, job, figure)
            found[figure] = _median(partial(rate, engine, job, figure))
    found["peak"] = peak_bytes() / 1e9
    if "batch" in job.figures and engine.batch:
        warm_up(engine, job, "batch")
        found["batch"] = _median(lambda: rate(engine, job, "batch"))
    return found


def import_all(name: str, threads: int) -> None:
    """The peer's packages, with that many threads."""
    for need in PEERS[name].needs:
        for module in (need, *LAZY.get(need, ())):
            importlib.import_module(module)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def warm_up(engine: Engine, job: Job, figure: str) -> None:
    """Once through everything that `rate` will time."""
    if figure == "prefill":
        engine.prefill([job.long])
    else:
        engine.decode(job.rows[:1] if figure == "decode" else job.rows, 4)


def rate(engine: Engine, job: Job, figure: str) -> float:
    """Tokens a second: `decode`, one prompt; `batch`, all of them; `prefill`, the long prompt."""
    if figure == "prefill":
        start = time.perf_counter()
        engine.prefill([job.long])
        return len(job.long) / (time.perf_counter() - start)
    rows = job.rows[:1] if figure == "decode" else job.rows
    return len(rows) * job.new / engine.decode(rows, job.new)


def serve(name: str, place: Place) -> None:
    """Answer figures asked on standard input with rates, and the first, empty line with 0 once all is warm."""
    import_all(name, place.job.threads)
    engine = PEERS[name].open(place)
    for figure in place.job.figures:
        warm_up(engine, place.job, figure)
    for line in sys.stdin:
        print(rate(engine, place.job, line.strip()) if line.strip() else 0.0, flush=True)


def _median(rated: Callable[[], float], times: int = 3, budget: float = 20.0) -> float:
    """Of three, or of fewer where they take long."""
    start = time.perf_counter()
    found = [rated()]
    while len(found) < times and (time.perf_counter() - start) * (1 + 1 / len(found)) < budget:
        found.append(rated())
    return statistics.median(found)


def peak_bytes() -> int:
    """The largest resident set of this program. Not ru_maxrss, which a child process inherits from its parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main(command: str, *rest: str) -> dict[str, Any]:
    """`list`, `measure` or `serve`."""
    if command == "list":
        return catalogue()
    name, folder, converted, job = rest
    place = Place(Path(folder), Path(converted), Job(**json.loads(job)))
    if command == "measure":
        return measure(name, place)
    serve(name, place)
    return {}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
