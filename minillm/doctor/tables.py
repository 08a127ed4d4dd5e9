"""An examination for people. Colours repeat what the words say."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minillm.doctor.checks import Linear, Outcome
from minillm.doctor.examination import Examination
from minillm.doctor.machine import PACKAGES, Machine

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_TIMES = ("ours", "plain", "bf16", "fp32")


def describe(examination: Examination) -> RenderableType:
    """Four tables and a verdict; 80 columns are enough."""
    return Group(
        _installed(examination),
        _active(examination.machine, examination.read_bytes_per_second),
        _checks(examination.checks),
        _linears(examination.linears),
        *_verdict(examination.checks),
    )


def _installed(examination: Examination) -> Table:
    table = _facts("Installed")
    table.add_row("python", examination.python)
    build = examination.machine.cuda_build
    remarks = {"torch": f", built for CUDA {build}" if build else ", built without CUDA"}
    for name, version in examination.packages.items():
        if version is None:
            table.add_row(name, _absent(name))
        else:
            table.add_row(name, version + remarks.get(name, ""))
    return table


def _absent(name: str) -> Text:
    """Text, because `[verify]` would be markup in a string."""
    extra = PACKAGES[name]
    if extra:
        return Text(f'not installed; to {extra}: pip install "minillm[{extra}]"')
    return Text("not installed" if name == "minillm" else f"not installed; pip install {name}", "red")


def _active(machine: Machine, read_speed: float) -> Table:
    table = _facts("Active")
    table.add_row("processor", Text(machine.processor))
    table.add_row("cores", f"{machine.usable_cores} usable of {machine.cores}; torch uses {machine.threads} threads")
    table.add_row("torch's instructions", machine.torch_isa)
    for label, wanted in (("processor has", True), ("processor lacks", False)):
        names = [name for name, has in (machine.features or {}).items() if has is wanted]
        table.add_row(label, "unknown" if machine.features is None else ", ".join(names) or "none of those looked for")
    free = "" if machine.memory_available is None else f", {_gigabytes(machine.memory_available)} available"
    table.add_row("memory", _gigabytes(machine.memory) + free)
    table.add_row("memory, read", f"{_gigabytes(read_speed)}/s (torch's sum of 256 MB of fp32)")
    table.add_row("oneDNN", "on" if machine.onednn else "off")
    for name, size in machine.cuda:
        table.add_row("CUDA", Text(f"{name}, {_gigabytes(size)}"))
    if not machine.cuda:
        table.add_row("CUDA", Text(f"none: {machine.cuda_remark}"))
    for name, said in machine.native.items():
        table.add_row(name, Text(said))
    return table


def _checks(outcomes: tuple[Outcome, ...]) -> Table:
    columns = ("", "", "agrees", "ours", "plain", "ours is")
    table = _measurements("Fast paths against the plain formula, on the CPU", columns)
    table.caption = (
        "32/4: query / key-value heads, of size 64. plain: the definition in torch;\n"
        "for int8 the bf16 linear that it replaces.\n"
    )
    for check in outcomes:
        agrees = Text("yes", "green") if check.fault is None else Text("NO", "bold red")
        ours, plain = check.seconds, check.plain_seconds
        kind = _SHORT.get(check.dtype, check.dtype)
        table.add_row(check.name, kind, agrees, _duration(ours), _duration(plain), _ratio(ours, plain))
    return table


def _linears(linears: tuple[Linear, ...]) -> Table:
    table = _measurements("bf16 against fp32, torch alone, on the CPU", ("", "bf16", "fp32", "bf16 is"))
    table.caption = "M x N x K: x (M, K) times W (N, K) transposed.\n"
    for linear in linears:
        ours, plain = linear.bfloat16_seconds, linear.float32_seconds
        table.add_row(f"linear, {linear.name}", _duration(ours), _duration(plain), _ratio(ours, plain))
    return table


def _verdict(outcomes: tuple[Outcome, ...]) -> list[Text]:
    """One line a fault, one line for all."""
    wrong = [check for check in outcomes if check.fault is not None]
    if not wrong:
        return [Text(f"All {len(outcomes)} self-tests agree with their definitions.", "green")]
    lines = [Text(f"{check.name}, {check.dtype}: {check.fault}", "red") for check in wrong]
    summary = f"{len(wrong)} of {len(outcomes)} self-tests fail: results here cannot be trusted."
    return [*lines, Text(summary, "bold red")]


def _facts(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=box.SIMPLE)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    return table


def _measurements(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.caption_justify = "left"
    for number, name in enumerate(columns):
        table.add_column(name, no_wrap=number > 0, justify="right" if name in _TIMES else "left")
    return table


def _ratio(ours: float | None, plain: float | None) -> Text:
    """plain / ours: how many times faster; within 5% is noise.

    >>> [_ratio(ours, 1.0).plain for ours in (4.0, 1.25, 0.98, 0.14, 0.05)]
    ['0.25 x: slower', '0.80 x: slower', '1.0 x: the same', '7.1 x: faster', '20 x: faster']
    """
    if not ours or not plain:
        return Text("not timed")
    ratio = plain / ours
    if abs(ratio - 1) <= 0.05:
        return Text("1.0 x: the same")
    digits = 2 if ratio < 1 else 1 if ratio < 9.95 else 0
    return Text(f"{ratio:.{digits}f} x: {'slower' if ratio < 1 else 'faster'}", "red" if ratio < 1 else "green")


def _duration(seconds: float | None) -> str:
    """Three digits.

    >>> [_duration(seconds) for seconds in (93.2e-6, 0.00226, 0.22, 3)]
    ['93.2 µs', '2.26 ms', '220 ms', '3.00 s']
    """
    if seconds is None:
        return "-"
    size, unit = next(((size, unit) for size, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= size), (1e-6, "µs"))
    number = seconds / size
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f} {unit}"


def _gigabytes(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
