"""What this machine can do at most: bytes it reads a second, products it makes a second; and what it is.

    python machine.py describe                     what it is, as JSON
    python machine.py limits THREADS [SIZE]        what it can; SIZE: bytes that are read, 1 GiB if not said
    python machine.py serve THREADS                GB/s it reads now, a line out for each line in

Reading: three buffers, as the rate depends on where their pages land, each read by torch's sum and by our own int8
matrix-vector product (weights of 1 GiB, every byte used once); the fastest counts. Products: torch's fp32 and bf16
matmul of 2048 x 2048 x 2048, and its int8 one, also at 512 x 5632 x 2048, the shape of a prefill.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

WIDTH = 4096


def limits(size: int = 2**30, side: int = 2048) -> dict[str, float]:
    """read_gbs: GB/s; fp32_gops, bf16_gops, int8_gops: 10^9 operations a second, a product and a sum counted as two."""
    found: dict[str, list[float]] = {"read_gbs": [], "fp32_gops": [], "bf16_gops": [], "int8_gops": []}
    for _ in range(3):
        found["read_gbs"] += [size / best(read) / 1e9 for read in readers(size)]
    for name, dtype in (("fp32_gops", torch.float32), ("bf16_gops", torch.bfloat16)):
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        found[name].append(2 * side**3 / best(partial(torch.matmul, a, b)) / 1e9)
    for rows, width, columns in ((side, side, side), (side // 4, side * 11 // 4, side)):
        a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((rows, width), (columns, width)))
        for other in (b.T, b.T.contiguous()):
            seconds = best(partial(torch._int_mm, a, other))
            found["int8_gops"].append(2 * rows * width * columns / seconds / 1e9)
    return {name: max(rates) for name, rates in found.items()}


def readers(size: int) -> list[Callable[[], object]]:
    """Ways to read a fresh buffer of that many bytes."""
    weights = torch.ones(size // WIDTH, WIDTH, dtype=torch.int8)
    floats = weights.view(torch.float32)
    ways: list[Callable[[], object]] = [lambda: floats.sum()]
    try:
        from minillm.ops import int8, native
    except ImportError:
        return ways
    if native.available():
        x = torch.ones(1, WIDTH, dtype=torch.int8)
        ways.append(lambda: int8.product(x, weights))
    return ways


def best(call: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of several."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def description() -> dict[str, Any]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "features": [flag for flag in flags if flag in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")],
        "memory_gb": round(int(memory.split()[1]) * 1024 / 1e9, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def serve(size: int = 2**30) -> None:
    """Read once a way for each line of standard input, and answer with the faster."""
    ways = readers(size)
    for _ in sys.stdin:
        print(max(size / best(read, 3) / 1e9 for read in ways), flush=True)


def main(what: str, threads: str = "1", size: str = str(2**30)) -> dict[str, Any]:
    """`describe`, `limits` or `serve`."""
    if what == "describe":
        return description()
    torch.set_num_threads(int(threads))
    if what == "limits":
        return dict(limits(int(size)))
    serve()
    return {}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
