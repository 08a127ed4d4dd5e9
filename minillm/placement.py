"""Where numbers live and in which format, by the names people type."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from minillm.errors import InputError, nearest

#: The number formats that weights may have.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """`torch.bfloat16` from `"bfloat16"`; None stays None, for a checkpoint's own. InputError for another name.

    >>> as_dtype("bfloat16")
    torch.bfloat16
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown{nearest(dtype, DTYPES)}; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def as_device(device: torch.device | str) -> torch.device:
    """`torch.device` from a string; InputError where torch does not know it or this machine does not have it."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # "meta" is a device without numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(device)!r} cannot be used here ({reason:.80}); choose cpu or another") from error
    return found


def available_memory() -> int | None:
    """Bytes that new allocations can take without swapping, where the system says so (Linux); else None."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
