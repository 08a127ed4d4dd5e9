"""The doctor on a machine it can trust and on planted ones: wrong kernels, missing packages, other processors."""

from __future__ import annotations

import io
import itertools
import json
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from minillm.doctor import Examination, checks, describe, examine, machine
from minillm.doctor.kernels import kernel_checks
from minillm.model import attention
from minillm.ops import block, int8, native

EVERY_CHECK = (*checks.CHECKS, *kernel_checks())


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Small and once over: what is timed here is nobody's business."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checks, "_SECONDS", 0.0)
        patched.setattr(checks, "_LEAST_ROUNDS", 1)
        patched.setattr(checks, "_READ_NUMBERS", 1000)
        patched.setattr(checks, "LINEARS", ((4, 8, 8), (1, 8, 8)))
        yield


@pytest.fixture(scope="module")
def examination() -> Examination:
    return examine()


def shown(examination: Examination) -> str:
    screen = io.StringIO()
    Console(file=screen, width=80, color_system=None).print(describe(examination))
    return screen.getvalue()


def row(text: str, *words: str) -> str:
    (found,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return found


# -- a sound machine ---------------------------------------------------------------------------------------------------


def test_every_fast_path_agrees(examination: Examination) -> None:
    assert examination.healthy, [check.fault for check in examination.checks]
    assert len(examination.checks) == len(EVERY_CHECK)
    assert all(check.error and check.plain_error for check in examination.checks)
    assert f"All {len(EVERY_CHECK)} self-tests agree" in shown(examination)


def test_facts_are_those_of_the_machine(examination: Examination) -> None:
    found = examination.machine
    assert examination.python == platform.python_version()
    assert examination.packages["torch"] == metadata.version("torch")
    assert (found.threads, found.torch_isa) == (torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
    assert 1 <= found.usable_cores <= found.cores
    assert (found.cuda_build, bool(found.cuda)) == (torch.version.cuda, torch.cuda.is_available())
    assert bool(found.cuda) != bool(found.cuda_remark)
    times = [time for check in examination.checks for time in (check.seconds, check.plain_seconds)]
    times += [time for linear in examination.linears for time in (linear.bfloat16_seconds, linear.float32_seconds)]
    assert len(times) == 2 * len(EVERY_CHECK) + 4 and all(time is not None and time > 0 for time in times)
    assert examination.read_bytes_per_second > 0


def test_json_says_the_same(examination: Examination) -> None:
    said = json.loads(json.dumps(examination.as_json(), allow_nan=False))
    assert said["healthy"] is True
    assert said["machine"]["threads"] == torch.get_num_threads()
    assert [check["name"] for check in said["checks"]] == [check.name for check in EVERY_CHECK]


def test_each_measurement_is_named_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    names_at_call: list[str] = []

    def attend(*inputs: Any) -> Tensor:
        names_at_call.append(heard[-1])
        return attention.attention_ref(*inputs)

    monkeypatch.setattr(attention, "attend", attend)
    state = torch.random.get_rng_state()
    examine(heard.append)
    assert heard[0] == "attend 128 tokens, 32/4, float32" and heard[-1] == "reading memory"
    assert len(heard) == len(EVERY_CHECK) + 2 + 1 and list(dict.fromkeys(names_at_call)) == heard[:6]
    assert torch.equal(state, torch.random.get_rng_state())


# -- planted faults ----------------------------------------------------------------------------------------------------


def test_one_percent_in_attend_is_seen_in_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *inputs: right(*inputs) * 1.01)
    sick = examine()
    assert not sick.healthy and sick.as_json()["healthy"] is False
    assert [check.fault is None for check in sick.checks] == [
        not check.name.startswith("attend") for check in EVERY_CHECK
    ]
    text = shown(sick)
    assert f"6 of {len(EVERY_CHECK)} self-tests fail" in text
    assert " NO " in row(text, "attend 1 token on 512, 71/1", "bf16")
    assert "error 1.0e-02 of the result" in row(text, "attend 128 tokens, 32/4, float32:")


@pytest.mark.skipif(not native.available(), reason="no kernels")
@pytest.mark.parametrize(
    ("module", "kernel", "name"),
    [(int8, "linear", "int8, 512"), (block, "linear", "linear, 1 x"), (block, "swiglu", "swiglu")],
)
def test_one_percent_in_a_kernel_is_seen(monkeypatch: pytest.MonkeyPatch, module: Any, kernel: str, name: str) -> None:
    right = getattr(module, kernel)
    monkeypatch.setattr(module, kernel, lambda *inputs: right(*inputs) * 1.01)
    spoilt = next(check for check in kernel_checks() if check.name.startswith(name))
    with torch.inference_mode():
        assert checks.run_check(spoilt).fault is not None


def of(ours: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> checks.Outcome:
    """A check whose definition is to double the numbers 0 .. 7."""
    inputs = torch.arange(8)
    return checks.run_check(checks.Check("double", dtype, lambda kind: (inputs.to(kind),), ours, lambda x: x + x))


def refuse(_: Tensor) -> Tensor:
    raise RuntimeError("no kernel image\nCompile with more flags")


@pytest.mark.parametrize(
    ("ours", "fault"),
    [
        (lambda x: 2 * x, None),
        (lambda x: 2 * x * (1 + 1e-3), "error 1.0e-03"),
        (lambda x: (2 * x)[None], "returned (1, 8)"),
        (lambda x: (2 * x).double(), "torch.float64, not (8,) torch.float32"),
        (lambda x: (2 * x).log(), "not finite"),
        (lambda x: 2 * x + torch.nan, "not finite"),
        (refuse, "raised RuntimeError: no kernel image"),
    ],
)
def test_what_counts_as_a_fault(ours: Callable[[Tensor], Tensor], fault: str | None) -> None:
    outcome = of(ours)
    assert (outcome.fault is None) == (fault is None), outcome
    assert fault is None or (fault in str(outcome.fault) and "\n" not in str(outcome.fault))
    assert (outcome.seconds is None) == (ours is refuse)


def test_a_row_without_times_says_so(examination: Examination) -> None:
    text = shown(replace(examination, checks=(of(refuse),)))
    assert row(text, "double", "NO").split()[-2:] == ["not", "timed"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_integers_must_be_equal(dtype: torch.dtype) -> None:
    assert of(lambda x: 2 * x, dtype).fault is None
    assert of(lambda x: 2 * x + (x == 7), dtype).fault is not None


def test_a_broken_definition_excuses_nothing() -> None:
    one = torch.ones(2)
    assert checks.judge(one, one / 0, one.double())[0] == "not finite"


@pytest.mark.parametrize(("away", "agrees"), [(2.0, True), (2.1, False)])
def test_twice_the_plain_error_and_half_an_eps(away: float, agrees: bool) -> None:
    # the formula is off by 1/8 in 8, so that we may be off by 2/8; half an eps of bfloat16 is 2^-8, 1/32 in 8
    exact, plain = torch.full((4,), 8.0).double(), torch.full((4,), 8.125)
    assert (checks.judge((exact + 0.125 * away).float(), plain, exact)[0] is None) == agrees
    rounded = (exact + 0.125 * away).bfloat16()  # 8.25 and 8.26, which is 8.25 again
    assert checks.judge(rounded, plain.bfloat16(), exact)[0] is None
    assert checks.judge((exact + 0.0625).bfloat16(), exact.bfloat16(), exact)[0] is not None


def test_medians_take_turns_and_leave_the_first_round_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the functions move: 100 s at first, then 1, 5, 2 and 10, 30, 20."""
    clock, order = [0.0], []
    monkeypatch.setattr(checks, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(checks, "_LEAST_ROUNDS", 3)

    def function(name: str, costs: Iterator[float]) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            clock[0] += next(costs)

        return call

    ours, plain = (function(name, iter(costs)) for name, costs in (("o", (100, 1, 5, 2)), ("p", (100, 10, 30, 20))))
    assert checks.medians(ours, plain) == (2, 20)
    assert "".join(order) == "opopopop"


# -- other machines ----------------------------------------------------------------------------------------------------


def test_a_missing_package_reads_as_not_installed(monkeypatch: pytest.MonkeyPatch, examination: Examination) -> None:
    right = metadata.version

    def version(name: str) -> str:
        if name in ("transformers", "numpy"):
            raise metadata.PackageNotFoundError(name)
        return right(name)

    monkeypatch.setattr(metadata, "version", version)
    found = replace(examination, packages=machine.versions())
    assert found.packages["transformers"] is None and found.packages["safetensors"]
    text = shown(found)
    assert 'not installed; to verify: pip install "minillm[verify]"' in row(text, "transformers")
    assert "not installed; pip install numpy" in row(text, "numpy")
    assert found.healthy


CPUINFO = """processor\t: 0
model name\t: Example 9000 [rev 2]
flags\t\t: fpu avx2 avx512f amx_tile amx_int8x

processor\t: 1
model name\t: another
flags\t\t: fpu
"""


def test_processor_and_memory_of_linux(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, examination: Examination
) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    (tmp_path / "meminfo").write_text("MemTotal:       8000000 kB\nMemFree: 1 kB\nMemAvailable:    2000000 kB\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    found = machine.look()
    assert found.processor == "Example 9000 [rev 2]"
    assert [name for name, has in (found.features or {}).items() if has] == ["avx2", "avx512f", "amx_tile"]
    assert (found.memory, found.memory_available) == (8_192_000_000, 2_048_000_000)
    text = shown(replace(examination, machine=found))
    assert row(text, "processor has").split()[2:] == ["avx2,", "avx512f,", "amx_tile"]
    assert "Example 9000 [rev 2]" in text and "8.2 GB, 2.0 GB available" in text


@pytest.mark.parametrize("text", [None, "processor : 0\nFeatures : fp asimd\n"])
def test_what_is_not_known_is_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, examination: Examination, text: str | None
) -> None:
    """Not Linux, and Linux on another architecture."""
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    found = machine.look()
    assert found.processor and (found.features, found.memory, found.memory_available) == (None, None, None)
    said = shown(replace(examination, machine=found))
    for label in ("processor has", "processor lacks", "memory   "):
        assert row(said, label).split()[-1] == "unknown", label


def with_cuda(monkeypatch: pytest.MonkeyPatch, available: Callable[[], bool], properties: Any) -> machine.Machine:
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return machine.look()


def test_cuda_devices_by_name_and_memory(monkeypatch: pytest.MonkeyPatch, examination: Examination) -> None:
    sizes = itertools.count(24_000_000_000, 1_000_000_000)
    found = with_cuda(
        monkeypatch, lambda: True, lambda n: SimpleNamespace(name=f"GPU [b{n}]", total_memory=next(sizes))
    )
    assert found.cuda == (("GPU [b0]", 24_000_000_000), ("GPU [b1]", 25_000_000_000)) and not found.cuda_remark
    text = shown(replace(examination, machine=found))
    assert "GPU [b1], 25.0 GB" in text and "built for CUDA 13.0" in text


def old_driver() -> bool:
    warnings.warn("CUDA initialization: the driver is too old\nUpdate it", stacklevel=1)
    return False


def broken_device(_: int) -> None:
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be")


@pytest.mark.parametrize(
    ("available", "properties", "remark"),
    [
        (lambda: False, None, "no device found"),
        (old_driver, None, "CUDA initialization: the driver is too old"),
        (lambda: True, broken_device, "CUDA error: out of memory"),
    ],
)
def test_no_usable_cuda_device_and_why(
    monkeypatch: pytest.MonkeyPatch,
    examination: Examination,
    available: Callable[[], bool],
    properties: Any,
    remark: str,
) -> None:
    found = with_cuda(monkeypatch, available, properties)
    assert (found.cuda, found.cuda_remark) == ((), remark)
    assert f"none: {remark}" in shown(replace(examination, machine=found))


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"cpu": True, "isa": "avx2", "isas": {"ref": True, "avx2": True, "new": False}}, "avx2, of ref, avx2"),
        ({"cpu": False, "why_not": "not built"}, "absent: not built; torch's own operations are used"),
    ],
)
def test_native_modules(
    monkeypatch: pytest.MonkeyPatch, examination: Examination, info: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(machine.native, "info", lambda: info)
    found = machine.look()
    assert found.native["minillm._cpu"] == said
    assert " ".join(row(shown(replace(examination, machine=found)), "minillm._cpu").split()[1:]) == said


# -- how it looks ------------------------------------------------------------------------------------------------------


def test_eighty_columns_cut_nothing(examination: Examination) -> None:
    """The widest values that a real machine shows; nothing longer than a line, no row of measurements folded."""
    slow = [replace(check, seconds=123e-6, plain_seconds=123.4e-6) for check in examination.checks]
    linears = tuple(
        replace(linear, name=name, bfloat16_seconds=0.2221, float32_seconds=0.0321)
        for linear, name in zip(examination.linears, ("512 x 2048 x 2048", "1 x 4096 x 4096"), strict=True)
    )
    text = shown(replace(examination, checks=tuple(slow), linears=linears))
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for check in EVERY_CHECK:
        short = {"float32": "fp32", "bfloat16": "bf16"}[check.format]
        assert row(text, check.name, short).rstrip().endswith("123 µs  1.0 x: the same")
    assert (
        row(text, "linear, 512 x 2048 x 2048").split()[-6:] == ["222", "ms", "32.1", "ms", "0.14", "x:", "slower"][1:]
    )
    words = {word.strip(",") for word in text.split()}
    assert {*machine.FEATURES, *machine.PACKAGES, *examination.machine.native} <= words


def test_colours_add_nothing(examination: Examination) -> None:
    sick = replace(examination, checks=(replace(examination.checks[0], fault="error 1.0e-02"), examination.checks[1]))
    text = shown(sick)
    assert " NO " in row(text, "attend", "fp32") and " yes " in row(text, "attend", "bf16")
    assert "1 of 2 self-tests fail" in text
