"""Two traces of the same forward, operation by operation, each against float64: what differs first, and whose fault.

For every operation and each side two questions are asked.

    local   is this output the formula of what this side itself fed into it?
            error = |recorded - f64(recorded inputs)|,   allowed = 2 |plain - f64(recorded inputs)| + slack
    chain   how far has this side drifted from a float64 run of the whole model up to here?

`plain` is the same formula computed step by step in the side's own dtype: the rule of two, without a chosen number. The
local question forgives what earlier operations did wrong, so errors do not add up and every faulty operation stands
alone; a difference that all operations pass is noise, however large it has grown (as it does in bf16). Two sides that
are outside together and agree with each other are noise too: then the formula is not what either computes.

|.| is the root mean square over tokens of the relative Euclidean error of a token, so that one huge token (Llama's
first) cannot hide the others. Padding is not looked at.

slack: one rounding of the result, eps / 4 (a rounding errs by eps / (2 sqrt(3)) of a number's power of two, less of the
number), for where the plain formula happens to make none; and `_SUM` roundings of fp32, because a sum of n terms errs
by sqrt(n) or log(n) of them as its order wants, and order is the kernel's affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from minillm.verify.operations import Operation, operations
from minillm.verify.reference import Formula, wide
from minillm.verify.trace import Trace

#: equal: the same bits. noise: rounding. inherited: each is the formula of what it read, which differed. Else whose
#: fault; unknown where a side was not recorded and the other is right.
Verdict = Literal["equal", "noise", "inherited", "ours", "theirs", "both", "unknown"]
#: Distances in units in the last place that a histogram counts: 0, 1, 2, up to 4, .. and beyond.
ULPS = (0, 1, 2, 4, 8, 16, 64)
_SUM = 8
#: A token of zeros is measured against this part of the others; some cases have a larger one.
_FLOOR = 1e-6
FAULTY = ("ours", "theirs", "both")


@dataclass(frozen=True)
class Errors:
    """One side of one operation. local, allowed, chain: relative; largest: max |recorded - f64|, absolute."""

    local: float
    allowed: float
    chain: float
    largest: float

    @property
    def outside(self) -> bool:
        return not self.local <= self.allowed


@dataclass(frozen=True)
class Between:
    """Ours against theirs: largest and relative difference, cosine, and how many numbers are how many ULPs apart."""

    largest: float
    relative: float
    cosine: float
    ulps: tuple[int, ...]  # counts for ULPS and one more for what is beyond


@dataclass(frozen=True)
class Result:
    """One operation: both sides (None where it was not recorded), the two against each other, and the verdict, which is
    "unknown" where one side is missing and the other right."""

    operation: Operation
    shape: tuple[int, ...]
    ours: Errors | None
    theirs: Errors | None
    between: Between | None
    verdict: Verdict


@dataclass(frozen=True)
class Case:
    """One side at one operation, with all that a diagnosis needs to compute it anew. floor: see `distance`."""

    operation: Operation
    inputs: tuple[Tensor, ...]
    found: Tensor
    exact: Tensor
    plain: Tensor
    dtype: torch.dtype
    floor: float = _FLOOR


Side = Literal["ours", "theirs"]
#: Called with each case outside its bound while its tensors are at hand.
OnFault = Callable[[Side, Case, Errors], None]


def compare(ours: Trace, theirs: Trace, formula: Formula, *, on_fault: OnFault | None = None) -> Iterator[Result]:
    """The operations in order. Memory: one float64 copy of a weight, and the tensors that later operations still read.

    formula: of the truth, its tokens and keep those of both traces. An operation that a side did not record is computed
    for it, so that the next one is measured over both.
    """
    steps = operations(formula.config)
    last_use = {name: index for index, step in enumerate(steps) for name in step.inputs}
    run = _Run((_Side(ours), _Side(theirs)), formula)
    for index, step in enumerate(steps):
        cases, chain = run.advance(step)
        result = judge(step, cases, chain, formula.keep, on_fault)
        if result.verdict in FAULTY or (result.verdict == "noise" and run.inherits(step, result)):
            run.apart.add(step.name)
            result = result if result.verdict in FAULTY else replace(result, verdict="inherited")
        yield result
        run.forget(name for name in tuple(run.chain) if last_use.get(name, 0) <= index and name != step.name)


class _Run:
    """Both sides and the float64 run of the whole model, side by side through the operations."""

    def __init__(self, sides: tuple[_Side, _Side], formula: Formula) -> None:
        self.sides, self.formula = sides, formula
        self.chain: dict[str, Tensor] = {}
        self.apart: set[str] = set()  # what differs by a fault, or because its inputs do
        self._alike: set[str] = set()  # what both sides recorded with the same bits

    def advance(self, step: Operation) -> tuple[list[Case | None], Tensor]:
        """One operation on the inputs of each side and of the float64 run, stacked: a weight is widened once.

        Where both sides read and gave the same bits, as they mostly do in fp32, one of them is computed.
        """
        ours, theirs = self.sides
        same = self._alike.issuperset(step.inputs) and ours.dtype == theirs.dtype
        reading = self.sides[:1] if same else self.sides
        stacked = [
            torch.cat([*(rows(side[name], self.formula).double() for side in reading), self.chain[name]])
            for name in step.inputs
        ]
        exact = self.formula(step, stacked, torch.float64)
        *parts, chain = exact.chunk(len(reading) + 1) if step.inputs else (exact,) * (len(reading) + 1)
        self.chain[step.name] = chain
        first = ours.case(step, parts[0], self.formula)
        if same and _equal(ours, theirs, step.name):
            self._alike.add(step.name)
            theirs.computed.update(ours.computed)
            return [first, first], chain
        return [first, theirs.case(step, parts[-1], self.formula)], chain

    def inherits(self, step: Operation, result: Result) -> bool:
        """Whether it differs by more than its own rounding, having read what already differed."""
        allowed = sum(errors.allowed for errors in (result.ours, result.theirs) if errors is not None)
        far = result.between is not None and result.between.relative > allowed
        return far and not self.apart.isdisjoint(step.inputs)

    def forget(self, names: Iterable[str]) -> None:
        """Drop what nothing reads any more."""
        for name in names:
            del self.chain[name]
            for side in self.sides:
                side.computed.pop(name, None)


def _equal(ours: _Side, theirs: _Side, name: str) -> bool:
    """Both recorded it with the same bits, or neither did."""
    if name in ours.trace and name in theirs.trace:
        return torch.equal(ours.trace[name], theirs.trace[name])
    return name not in ours.trace and name not in theirs.trace


class _Side:
    """A trace, and what had to be computed because it was not recorded or has another shape."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.computed: dict[str, Tensor] = {}
        self.dtype = trace["embed"].dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.computed[name] if name in self.computed else self.trace[name]

    def case(self, step: Operation, exact: Tensor, formula: Formula) -> Case | None:
        if step.name not in self.trace:
            self.computed[step.name] = exact
            return None
        inputs = tuple(rows(self[name], formula) for name in step.inputs)
        if rows(self.trace[step.name], formula).shape != exact.shape:
            self.computed[step.name] = exact  # what follows is measured as if it were right
        if step.kind in ("linear", "logits") and self.dtype.itemsize == 2:
            plain = exact.to(self.dtype)  # summed in fp32 and rounded once: on some processors a slow product
        else:
            plain = formula(step, inputs, self.dtype)
        return Case(step, inputs, rows(self.trace[step.name], formula), exact, plain, self.dtype)


def rows(x: Tensor, formula: Formula) -> Tensor:
    """Tables that are the same for all rows, once for each."""
    batch = formula.tokens.shape[0]
    return x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else x


def judge(
    step: Operation, cases: Sequence[Case | None], chain: Tensor | None, keep: Tensor, on_fault: OnFault | None
) -> Result:
    """Ours and theirs at one operation. chain: of the float64 run; without one the drift is the local error."""
    ours, theirs = cases
    errors = [None if ours is None else measure(ours, chain, keep)]
    errors.append(errors[0] if theirs is ours else None if theirs is None else measure(theirs, chain, keep))
    between = None
    if ours is not None and theirs is not None and ours.found.shape == theirs.found.shape:
        between = _between(ours, theirs, keep)
    verdict = _verdict(errors, between)
    if on_fault is not None and verdict in FAULTY:
        sides: tuple[Side, Side] = ("ours", "theirs")
        for side, case, error in zip(sides, cases, errors, strict=True):
            if case is not None and error is not None and error.outside:
                on_fault(side, case, error)
    shapes = [x.shape for x in (*(case.found for case in cases if case is not None), chain) if x is not None]
    return Result(step, tuple(shapes[0]), errors[0], errors[1], between, verdict)


def measure(case: Case, chain: Tensor | None, keep: Tensor) -> Errors:
    """The errors of one side; infinite where the shape is another or a number is not finite without need."""
    if case.found.shape != case.exact.shape:
        return Errors(float("inf"), 0.0, float("inf"), float("inf"))
    found, exact = tokens_of(case.found, keep), tokens_of(case.exact, keep)
    allowed = bound(tokens_of(case.plain, keep), exact, case.dtype, case.floor)
    away = _apart(found, exact)
    local = _relative(away, exact, case.floor)
    drift = local if chain is None else distance(found, tokens_of(chain, keep), case.floor)
    return Errors(local, allowed, drift, _largest(away))


def bound(plain: Tensor, exact: Tensor, dtype: torch.dtype, floor: float = _FLOOR) -> float:
    """2 |plain - exact| + slack, for tensors of tokens (N, M)."""
    slack = torch.finfo(dtype).eps / 4 + _SUM * torch.finfo(wide(dtype)).eps
    return 2 * distance(plain, exact, floor) + slack


def tokens_of(x: Tensor, keep: Tensor) -> Tensor:
    """(B, T, ...) or (B, H, T, ...) -> what belongs to each real token, in float64: (N, M)."""
    by_token = x.transpose(1, 2) if x.ndim == 4 else x
    return by_token[keep].flatten(1).double() if x.ndim > 2 else by_token[keep][:, None].double()


def distance(found: Tensor, exact: Tensor, floor: float = _FLOOR) -> float:
    """Root mean square over tokens of |found - exact| / |exact|: (N, M) twice -> a number; inf if not comparable.

    floor: tokens smaller than this part of the others' root mean square are measured against that.
    """
    return _relative(_apart(found, exact), exact, floor)


def _relative(apart: Tensor, exact: Tensor, floor: float = _FLOOR) -> float:
    away, sizes = apart.norm(dim=-1), exact.norm(dim=-1)
    if not bool(sizes.sum().isfinite()):
        sizes = exact.nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    least = floor * sizes.square().mean().sqrt()
    relative = torch.where(away == 0, 0.0, away / torch.maximum(sizes, least))
    return float(relative.square().mean().sqrt())


def _apart(found: Tensor, exact: Tensor) -> Tensor:
    """found - exact; 0 where both are the same infinity or NaN, inf where only one is finite."""
    apart = found - exact
    if math.isfinite(_largest(apart)):
        return apart
    same = (found == exact) | (found.isnan() & exact.isnan())
    return torch.where(same, 0.0, apart.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf))


def _largest(x: Tensor) -> float:
    """max |x|, in one pass; NaN if there is one."""
    least, most = x.aminmax()
    return max(-float(least), float(most))


def _verdict(errors: Sequence[Errors | None], between: Between | None) -> Verdict:
    known = [error for error in errors if error is not None]
    ours, theirs = (error is not None and error.outside for error in errors)
    if ours and theirs:
        alike = between is not None and between.relative <= max(error.allowed for error in known)
        return "noise" if alike else "both"
    if ours or theirs:
        return "ours" if ours else "theirs"
    if len(known) < 2:
        return "unknown"
    return "equal" if between is not None and between.largest == 0 else "noise"


def _between(ours: Case, theirs: Case, keep: Tensor) -> Between:
    """In the coarser of the two formats: what a fused kernel keeps to itself was computed in float64."""
    coarser = max(ours.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    x, y = (tokens_of(case.found.to(coarser), keep) for case in (ours, theirs))
    if torch.equal(x, y):
        return Between(0.0, 0.0, 1.0, (x.numel(), *(0 for _ in ULPS)))
    apart = _apart(x, y)
    a, b = (z.nan_to_num(0.0, 0.0, 0.0).flatten() for z in (x, y))
    norms = float(a.norm() * b.norm())
    cosine = float(a @ b) / norms if norms else 1.0
    return Between(_largest(apart), _relative(apart, y, ours.floor), cosine, ulp_histogram(x, y, coarser))


def ulp_histogram(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    """How many pairs are 0, 1, 2, up to 4, .. units in the last place of `dtype` apart; see ULPS.

    The unit is that of the larger of the two numbers: 2^floor(log2 |x|) eps.

    >>> ulp_histogram(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0 + 2 ** -7]), torch.bfloat16)[:3]
    (1, 1, 0)
    """
    info = torch.finfo(dtype)
    largest = torch.maximum(x.abs(), y.abs()).nan_to_num(0.0, 0.0, 0.0).clamp(min=info.tiny)
    unit = torch.exp2(torch.floor(torch.log2(largest))) * info.eps
    steps = (_apart(x, y).abs() / unit).flatten()
    edges = torch.tensor(ULPS, dtype=steps.dtype, device=steps.device) + 0.5
    counts = torch.bincount(torch.bucketize(steps, edges), minlength=len(ULPS) + 1)
    return tuple(counts.tolist())
