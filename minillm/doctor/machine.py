"""What the machine has and what torch makes of it: processor, threads, memory, CUDA, compiled modules.

Linux says it in /proc; elsewhere what torch and Python do not know is None, "unknown". Nothing is imported to learn its
version.
"""

from __future__ import annotations

import os
import platform
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from minillm.ops import native

#: Distribution -> the extra that brings it and says what it is for; empty for what minillm cannot do without.
PACKAGES = {
    "minillm": "",
    "torch": "",
    "numpy": "",
    "safetensors": "",
    "tokenizers": "",
    "huggingface-hub": "",
    "transformers": "verify",
    "matplotlib": "plot",
    "sentencepiece": "test",
    "tiktoken": "test",
}
#: Instructions that kernels can use, as /proc/cpuinfo names them.
FEATURES = "avx2 avx512f avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16".split()

_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")


@dataclass(frozen=True)
class Machine:
    """None is unknown; memory in bytes; `cuda` lists (name, memory), `cuda_remark` says why it is empty.

    native: compiled module -> which of its variants runs here, or why it is absent.
    """

    processor: str
    cores: int
    usable_cores: int
    threads: int
    torch_isa: str
    features: dict[str, bool] | None
    memory: int | None
    memory_available: int | None
    onednn: bool
    cuda_build: str | None
    cuda: tuple[tuple[str, int], ...]
    cuda_remark: str
    native: dict[str, str]


def look() -> Machine:
    """The facts, as they are now."""
    cpu, memory = _fields(_CPUINFO), _fields(_MEMINFO)
    flags = set(cpu["flags"].split()) if "flags" in cpu else None
    cores = os.cpu_count() or 1
    devices, remark = _cuda_devices()
    return Machine(
        processor=cpu.get("model name") or platform.processor() or platform.machine() or "unknown",
        cores=cores,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        threads=torch.get_num_threads(),
        torch_isa=torch.backends.cpu.get_cpu_capability(),
        features=None if flags is None else {name: name in flags for name in FEATURES},
        memory=_bytes(memory.get("MemTotal")),
        memory_available=_bytes(memory.get("MemAvailable")),
        onednn=torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled),
        cuda_build=torch.version.cuda,
        cuda=devices,
        cuda_remark=remark,
        native={"minillm._cpu": _compiled(), "minillm._cuda": "absent: not written yet"},
    )


def _compiled() -> str:
    found = native.info()
    if not found["cpu"]:
        return f"absent: {found['why_not']}; torch's own operations are used"
    return f"{found['isa']}, of {', '.join(name for name, runs in found['isas'].items() if runs)}"


def versions() -> dict[str, str | None]:
    """Of every package in PACKAGES; None for what is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fields(path: Path) -> dict[str, str]:
    """The `name : value` lines of a Linux file, of its first processor alone; nothing where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _bytes(value: str | None) -> int | None:
    """From /proc/meminfo, whose kB are 1024 bytes.

    >>> _bytes("24683520 kB")
    25275924480
    """
    return None if value is None else int(value.split()[0]) * 1024


def _cuda_devices() -> tuple[tuple[tuple[str, int], ...], str]:
    """((name, bytes of memory), ...) and, where there is none, why, as far as torch says: it warns of an old driver."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            found = [torch.cuda.get_device_properties(number) for number in range(count)]
        except RuntimeError as error:
            return (), str(error).partition("\n")[0]
    if found:
        return tuple((device.name, device.total_memory) for device in found), ""
    if warned:
        return (), str(warned[0].message).partition("\n")[0]
    return (), "no device found" if torch.version.cuda else "torch is built without CUDA"
