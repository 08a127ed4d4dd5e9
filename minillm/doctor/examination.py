"""All facts of `minillm doctor` in one value, for tables and for JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minillm.doctor import checks, machine
from minillm.doctor.checks import Linear, Outcome
from minillm.doctor.kernels import kernel_checks
from minillm.doctor.machine import Machine


@dataclass(frozen=True)
class Examination:
    """What `examine` found; versions are None for what is not installed."""

    python: str
    packages: dict[str, str | None]
    machine: Machine
    checks: tuple[Outcome, ...]
    linears: tuple[Linear, ...]
    read_bytes_per_second: float

    @property
    def healthy(self) -> bool:
        """Whether every fast path agrees with its definition."""
        return all(check.fault is None for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; `healthy` first."""
        return {"healthy": self.healthy, **asdict(self)}


def examine(report: Callable[[str], None] | None = None) -> Examination:
    """Look and measure: about 8 s. `report` hears the name of each measurement before it begins."""
    say = report or (lambda name: None)
    outcomes, linears = [], []
    with torch.inference_mode():
        for check in (*checks.CHECKS, *kernel_checks()):
            say(f"{check.name}, {check.format}")
            outcomes.append(checks.run_check(check))
        for sizes in checks.LINEARS:
            say("linear " + " x ".join(map(str, sizes)))
            linears.append(checks.time_linear(sizes))
        say("reading memory")
        speed = checks.read_speed()
    return Examination(
        python=platform.python_version(),
        packages=machine.versions(),
        machine=machine.look(),
        checks=tuple(outcomes),
        linears=tuple(linears),
        read_bytes_per_second=speed,
    )
