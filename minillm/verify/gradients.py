"""The backward pass, one operation at a time: whose gradient is not the derivative of its formula.

The loss is the next-token cross-entropy over real tokens that a real one precedes, summed: the gradients of a mean are
so small that fp16 would not hold them. Each side runs forward and backward; its gradients are recorded under the names
of its tensors and parameters. The gradient of y is then held against

    exact(y) = sum over the operations f that read y of   (df/dy)^T  g_f

in float64, from what that side recorded: the inputs of f, and the gradient g_f of its output. As in the forward
comparison an error does not travel: a gradient that is right given those behind it is right. `plain` is the same sum
in the side's own dtype, and the bound follows from it in the same way. What has no gradient recorded (scores and
weights in a fused kernel) is passed over with its own sum in its place, exact and plain apart.

    parameters     the same with y a weight or bias, all its numbers as one token; a tied embedding sums both its uses
    norms          their parameters' gradients are sums over tokens; `plain` adds token by token in the side's dtype, as
                   torch's LayerNorm does (one buffer a thread)
    softmax        its backward is w (g - sum w g), a difference: `plain` has w as recorded, perhaps rounded. Fused
                   kernels take the sum from their own rounded output, as sum over E of out g_out, and so does `plain`
    chain          there is no float64 run backward: `Errors.chain` is the local error

The order is that of the backward pass: an operation's output before its parameters, these before its inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minillm.errors import InputError
from minillm.losses.next_token import next_token_loss
from minillm.verify.compare import FAULTY, Case, Errors, Result, Side, judge, rows
from minillm.verify.operations import Operation, operations
from minillm.verify.reference import Formula, wide
from minillm.verify.trace import Trace

#: Gradients of single tokens can be sums that cancel (those of q for a row's first token are 0: it sees one key alone),
#: whose rounding is that of the terms, as large as other tokens' gradients: smaller tokens than this part of the others
#: are measured against that.
_FLOOR = 0.5


class OnGradientFault(Protocol):
    """Called with each gradient outside its bound; the formula's `keep` selects the rows of the case's tensors."""

    def __call__(self, side: Side, case: Case, errors: Errors, *, formula: Formula) -> None: ...


def predicted(keep: Tensor) -> Tensor:
    """Real tokens that a real one precedes: keep (B, T) bool -> (B, T) bool.

    >>> predicted(torch.tensor([[False, True, True]])).tolist()
    [[False, False, True]]
    """
    before = torch.nn.functional.pad(keep[:, :-1], (1, 0))
    return keep & before


def pull_back(logits: Tensor, tokens: Tensor, keep: Tensor) -> None:
    """Backward from the loss: logits (B, T, V) · tokens, keep (B, T). InputError where there is none to derive."""
    if logits.ndim < 3:
        raise InputError("gradients are those of predicting tokens, and this model has a scalar head; leave them out")
    if not logits.requires_grad:
        raise InputError("gradients: every parameter is frozen; set requires_grad of those to verify")
    next_token_loss(logits, tokens, predicted(keep), total=1).backward()


def compare_gradients(
    ours: Trace, theirs: Trace, formula: Formula, *, on_fault: OnGradientFault, apart: bool = False
) -> Iterator[Result]:
    """The gradients in the order of the backward pass; those that neither side recorded are left out.

    apart: something differed in the forward; gradients that are right and yet differ are then "inherited". A case's
    operation has the operations that read y as its inputs, and their terms of the sum as the tensors.
    """
    sides = (_Side(ours, formula), _Side(theirs, formula))
    whole = replace(formula, keep=torch.ones(1, 1, dtype=torch.bool, device=formula.keep.device))
    for name, layer in _backward(sides):
        readers, cases = zip(*(side.arrive(name) for side in sides), strict=True)
        if cases == (None, None):
            continue
        step = Operation(name, "gradient", readers[0], layer)
        local = whole if is_parameter(name) else formula
        accused = [case and replace(case, operation=step) for case in cases]
        result = judge(step, accused, None, local.keep, partial(on_fault, formula=local))
        if is_parameter(name):  # was one token
            result = replace(result, shape=tuple(formula.parameter(name).shape))
        if result.verdict == "noise" and apart and _far(result):
            result = replace(result, verdict="inherited")
        apart = apart or result.verdict in FAULTY
        yield result


def is_parameter(name: str) -> bool:
    """Whether a name is a weight's or a bias's."""
    return name.endswith((".weight", ".bias"))


def _far(result: Result) -> bool:
    allowed = sum(errors.allowed for errors in (result.ours, result.theirs) if errors is not None)
    return result.between is not None and result.between.relative > allowed


def _backward(sides: tuple[_Side, _Side]) -> Iterator[tuple[str, int | None]]:
    """What has all its terms, one name after the other; asking for the next pulls the last operation back."""
    for step in reversed(operations(sides[0].formula.config)):
        if step.name.startswith("rotary."):
            continue
        yield step.name, step.layer
        for name in {**sides[0].pull(step), **sides[1].pull(step)}:
            if name != "embed.weight" or step.name == "embed":  # a tied one waits for its other use
                yield name, step.layer


class _Term(NamedTuple):
    """One operation's part of a gradient."""

    reader: str
    exact: Tensor
    plain: Tensor


class _Side:
    """A trace with gradients, pulled back operation by operation."""

    def __init__(self, trace: Trace, formula: Formula) -> None:
        self.formula, self.dtype = formula, trace["embed"].dtype
        self._slopes = trace.gradients
        self._values = _values(trace, formula)
        self._terms: dict[str, list[_Term]] = defaultdict(list)
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        slope = _loss_slope(self._values["logits"].double(), formula)
        plain = _loss_slope(self._values["logits"].to(wide(self.dtype)), formula).to(self.dtype)
        self._terms["logits"].append(_Term("loss", slope, plain))

    def arrive(self, name: str) -> tuple[tuple[str, ...], Case | None]:
        """All that reads `name` has been pulled back: who that is, and what to hold its gradient against."""
        terms = self._terms.pop(name)
        exact, plain = _total([term.exact for term in terms]), _total([term.plain for term in terms])
        if not is_parameter(name):
            self._sums[name] = exact, plain
        readers = tuple(term.reader for term in terms)
        if name not in self._slopes:
            return readers, None
        tensors = [self._slopes[name], exact, plain, *(term.exact for term in terms)]
        if is_parameter(name):
            tensors = [x.reshape(1, 1, -1) for x in tensors]
        found, exact, plain, *inputs = tensors
        return readers, Case(Operation(name, "gradient"), tuple(inputs), found, exact, plain, self.dtype, _FLOOR)

    def pull(self, step: Operation) -> dict[str, None]:
        """Add this operation's part to the gradient of all it reads; the names of its parameters."""
        found = self._slopes.get(step.name)
        exact, plain = self._sums.pop(step.name)
        if found is not None and found.shape == exact.shape:
            exact, plain = found.double(), found
        inputs = {name: self._values[name] for name in _reads(step)}
        terms = _pulled(self.formula, step, inputs, exact, torch.float64)
        rough = self._plainly(step, inputs, plain)
        for name, term in terms.items():
            self._terms[name].append(_Term(step.name, term, rough[name].to(self.dtype)))
        return {name: None for name in terms if name not in inputs}

    def _plainly(self, step: Operation, inputs: dict[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
        if step.kind == "weights":
            return {step.inputs[0]: self._through_softmax(step, inputs[step.inputs[0]], gradient)}
        if step.kind == "norm" and self.dtype.itemsize == 2:
            each = _pulled(self.formula, step, inputs, gradient, self.dtype, each=gradient.shape[:2])
            return {name: x if name in inputs else _one_by_one(x) for name, x in each.items()}
        # Products sum in fp32 and round once (on some processors a slow product in 16 bits).
        summed_wide = step.kind in ("linear", "logits")
        return _pulled(self.formula, step, inputs, gradient, wide(self.dtype) if summed_wide else self.dtype)

    def _is_fused(self, weights: str) -> bool:
        """Whether a kernel kept the weights to itself; there is nothing to pull back where all below is frozen."""
        mixed = weights.replace("weights", "mixed")
        known = self._slopes.get(mixed)
        return weights not in self._slopes and known is not None and known.shape == self._values[mixed].shape

    def _through_softmax(self, step: Operation, scores: Tensor, gradient: Tensor) -> Tensor:
        """w (g - sum over S of w g), w as recorded; of a fused kernel w (g - sum over E of out g_out)."""
        mixed, dtype = step.name.replace("weights", "mixed"), wide(self.dtype)
        if self._is_fused(step.name):
            out, slope = (self.formula.split(x[mixed].to(gradient.dtype)) for x in (self._values, self._slopes))
            weights, terms = scores.to(dtype).softmax(dim=-1), out.to(dtype) * slope.to(dtype)
        else:
            weights = self._values[step.name].to(dtype)
            terms = weights * gradient.to(dtype)
        return weights * (gradient.to(dtype) - terms.sum(dim=-1, keepdim=True))  # (B, H, T, S), (B, H, T, 1)


def _reads(step: Operation) -> tuple[str, ...]:
    """Backward goes mixed -> weights -> scores, where the forward formula reads the scores twice."""
    return tuple(name.replace(".scores", ".weights") for name in step.inputs) if step.kind == "mixed" else step.inputs


def _pulled(
    formula: Formula,
    step: Operation,
    inputs: dict[str, Tensor],
    gradient: Tensor,
    dtype: torch.dtype,
    *,
    each: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """The gradients of what an operation reads, inputs first and then its parameters, from that of its output.

    each: (B, T) to have a norm's parameters' gradients token by token, (B, T, D).
    """
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, x: Tensor, rows: tuple[int, ...] = ()) -> Tensor:
        leaves[name] = x.detach().to(dtype).expand(*rows, *x.shape).requires_grad_()
        return leaves[name]

    with torch.enable_grad():
        read = [x.to(dtype) if name.startswith("rotary.") else leaf(name, x) for name, x in inputs.items()]
        local = replace(formula, parameter=lambda name: leaf(name, formula.parameter(name), each))
        output = _compute(local, step, read, dtype)
    return dict(zip(leaves, torch.autograd.grad(output, [*leaves.values()], gradient.to(output.dtype)), strict=True))


def _compute(formula: Formula, step: Operation, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    if step.kind == "weights":
        return inputs[0].softmax(dim=-1)
    if step.kind == "mixed":
        weights, v = inputs
        return (weights @ formula.shared(formula.split(v))).transpose(1, 2).flatten(2)
    return formula(step, inputs, dtype)


def _one_by_one(parts: Tensor) -> Tensor:
    """(B, T, D) -> (D,), every addition rounded."""
    return _total([*parts.flatten(0, 1)])


def _values(trace: Trace, formula: Formula) -> dict[str, Tensor]:
    """What was recorded, and in float64 what was not or has another shape.

    Padding that sees nothing (softmax of -inf) gets zeros.
    """
    values: dict[str, Tensor] = {}
    shapes = _shapes(formula)
    for step in operations(formula.config):
        x = rows(trace[step.name], formula) if step.name in trace else None
        if x is None or x.shape != shapes[step.name]:
            x = formula(step, [values[name] for name in step.inputs], torch.float64)
        if step.kind in ("scores", "weights"):
            empty = (x.isnan() | x.isneginf()).all(dim=-1, keepdim=True) & ~formula.keep[:, None, :, None]
            x = x.masked_fill(empty, 0.0) if bool(empty.any()) else x
        values[step.name] = x
    return values


def _shapes(formula: Formula) -> dict[str, torch.Size]:
    """What each operation gives, without computing it."""
    nowhere = replace(
        formula,
        parameter=lambda name: formula.parameter(name).to("meta"),
        tokens=formula.tokens.to("meta"),
        keep=formula.keep.to("meta"),
        frequencies=None if formula.frequencies is None else formula.frequencies.to("meta"),
    )
    outputs: dict[str, Tensor] = {}
    for step in operations(formula.config):
        outputs[step.name] = nowhere(step, [outputs[name] for name in step.inputs], torch.float64)
    return {name: x.shape for name, x in outputs.items()}


def _loss_slope(logits: Tensor, formula: Formula) -> Tensor:
    """d loss / d logits = softmax(logits) - 1 at the next token, zero where nothing is predicted: (B, T, V)."""
    counts = predicted(formula.keep)
    slope = logits.softmax(dim=-1)
    slope[:, :-1].scatter_add_(-1, formula.tokens[:, 1:, None], slope.new_full((*counts[:, 1:].shape, 1), -1.0))
    here = torch.nn.functional.pad(counts[:, 1:], (0, 1))
    return slope * here[..., None]


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
