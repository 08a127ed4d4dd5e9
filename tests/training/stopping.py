"""Ctrl-C at a step of one's choice."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from minillm.training.progress import Progress


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a step, as the signal would come."""
    plain = Progress.update

    def update(self: Progress, done: float, **seen: Any) -> None:
        plain(self, done, **seen)
        if done == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "update", update)
