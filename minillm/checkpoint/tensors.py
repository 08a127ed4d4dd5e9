"""What a source of weights offers, whatever files they lie in."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from minillm.memory import Empty, empty


class Tensors(Protocol):
    """Named tensors, read one at a time."""

    def keys(self) -> list[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def dtype(self, key: str) -> torch.dtype: ...
    def read(self, key: str, room: Empty = empty) -> Tensor: ...
    def close(self) -> None: ...
