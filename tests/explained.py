"""A red parity test that names the operation: when an assertion fails, `minillm verify` looks at the two models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minillm.model import Decoder
from minillm.verify.run import verify_models
from minillm.verify.table import sentence
from minillm.verify.transformers_oracle import Oracle


@contextmanager
def explained(ours: Decoder, theirs: Any, tokens: Tensor, keep: Tensor | None = None) -> Iterator[None]:
    """Adds to an AssertionError which operation of these tokens' forward is the first at fault, and why."""
    try:
        yield
    except AssertionError as error:
        keep = torch.ones_like(tokens, dtype=torch.bool) if keep is None else keep
        report = verify_models(ours, Oracle(theirs), tokens, keep)
        said = (
            "every operation of this forward is its formula" if report.first is None else sentence(report.first, report)
        )
        raise AssertionError(f"{error}\n{said}") from error
