"""What "equal" means in the tests, and why each bound is what it is.

`assert_near` bounds the largest difference by a fraction of the largest reference value. For fp32 logits the fraction
is 1e-5: fp32 keeps 6e-8 a rounding and a tiny model adds up some hundred of them, while the smallest fault we know
(an eps of 1e-6 for 1e-5, one weight off by 1%) moves logits by more.

`assert_rule_of_two` needs no chosen number: our error against float64 may be twice the error that the plain formula
makes in our dtype, plus one rounding of the result itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOGITS_FP32 = 1e-5


def distance(found: Tensor, reference: Tensor) -> float:
    """max |found - reference| / max |reference|; infinite where shapes differ or anything is not finite."""
    found, reference = found.detach(), reference.detach()
    if found.shape != reference.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    largest = reference.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((found.double() - reference.double()).abs().max() / largest)


def assert_near(found: Tensor, reference: Tensor, bound: float = LOGITS_FP32, what: str = "logits") -> None:
    away = distance(found, reference)
    assert away <= bound, f"{what}: {away:.2e} of the largest value away, allowed {bound:.0e}"


def assert_rule_of_two(found: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """|found - exact| <= 2 |plain - exact| + eps |exact| in the Euclidean norm; `exact` is float64."""
    found, plain, exact = found.detach(), plain.detach(), exact.detach()
    assert exact.dtype == torch.float64 and found.shape == exact.shape, what
    assert all(bool(torch.isfinite(x).all()) for x in (found, plain, exact)), f"{what}: not finite"
    ours, theirs = (float((x.double() - exact).norm()) for x in (found, plain))
    rounding = torch.finfo(found.dtype).eps * float(exact.norm())
    assert ours <= 2 * theirs + rounding, f"{what}: error {ours:.2e}, the plain formula's {theirs:.2e}"
