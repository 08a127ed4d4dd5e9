"""A report for people, 80 columns wide. Colours repeat what the words say.

One line a layer: on its left the operation that is farthest from its own formula, on its right how far the stream that
leaves the layer has drifted. The layer of the first fault (or each, if asked) follows operation by operation, then the
verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from minillm.verify.compare import Errors, Result
from minillm.verify.known_faults import KNOWN_FAULTS
from minillm.verify.operations import Operation
from minillm.verify.ranges import ranges
from minillm.verify.report import Fault, Report

#: What a line ends with and its colour; a layer has that of its gravest operation, so the order counts.
_STYLES = {
    "BOTH WRONG": "bold red",
    "OURS WRONG": "bold red",
    "THEIRS WRONG": "bold red",
    "both alike": "yellow",
    "inherited": "yellow",
    "noise": "",
    "equal bits": "green",
    "ours only": "yellow",
    "theirs only": "yellow",
    "not recorded": "yellow",
}
_BACKWARD = "Gradients, in the order of the backward pass"
_WRONG = {"ours": "OURS WRONG", "theirs": "THEIRS WRONG", "both": "BOTH WRONG"}

_LAYER = "{:<7}{:<15}{:>8}{:>7}   {:>8}{:>8}{:>9}  "
_LAYER_HEAD = (
    "{:<22}{:>15}   {:>16}{:>9}".format("", "error / allowed", "drift of output", "outputs"),
    _LAYER.format("layer", "worst operation", "ours", "theirs", "ours", "theirs", "apart") + "verdict",
)
_OPERATION = "{:<14}{:>8}{:>7}   {:>8}{:>8}{:>8}  {:<8}  "
_OPERATION_HEAD = (
    "{:<14}{:>15}   {:>24}".format("", "error / allowed", "ours against theirs"),
    _OPERATION.format("operation", "ours", "theirs", "relative", "largest", "1 - cos", "ulps") + "verdict",
)
_LAYER_NOTES = (
    "error / allowed: of one operation, from its own inputs; up to 1 it is rounding.",
    "drift: relative, from a float64 run of the whole model up to there.",
)
_BACKWARD_NOTES = (
    "error / allowed: of one gradient, from those of what reads it; up to 1 it is rounding. W, b: weights and biases.",
    "drift: that gradient's own error, relative; there is no float64 run backward.",
)
_OPERATION_NOTE = (
    "ulps: tenths of all numbers that are 0, 1, 2, up to 4, 8, 16, 64 or more units in the last place apart;"
    " * all, + less than a tenth, . none."
)
_INHERITED_NOTE = "inherited: each side is the formula of what it read, and that already differed."
_ALIKE_NOTE = "both alike: both are outside the bound with the same numbers: neither computes this formula."


def describe(report: Report, *, full: bool = False) -> RenderableType:
    """The whole report; full: every layer operation by operation."""
    parts = [Text(f"{report.ours} against {report.theirs}", "bold")]
    if report.about:
        parts.append(Text(", ".join(f"{key} {value}" for key, value in report.about.items())))
    first = report.first
    parts += _tables("", report.results, None if first is None or first.backward else first, full)
    if report.gradients:
        backward = first if first is not None and first.backward else None
        parts += _tables(_BACKWARD, report.gradients, backward, full)
    return Group(*parts, Text(), *_verdict(report))


def sentence(fault: Fault, report: Report) -> str:
    """What is wrong, how much, where and why, as plain text."""
    start = "First difference: " if fault == report.first else ""
    side = f"ours ({report.ours})" if fault.side == "ours" else f"theirs ({report.theirs})"
    parts = [f"{start}{fault.what}, {side}: {_amount(fault)}{_places(fault, report)}."]
    if fault.text:
        parts.append(f"It equals the formula {fault.text.rstrip('.')}.")
    else:
        parts.append("None of the causes that are tried gives these numbers.")
    parts += [
        f"Known fault {entry.name}: {entry.fault}. Instead: {entry.instead}."
        for entry in KNOWN_FAULTS
        if entry.name == fault.known
    ]
    return " ".join(parts)


def by_layer(results: Iterable[Result]) -> Iterator[tuple[str, list[Result]]]:
    """Neighbours of one layer, under its number; what has no layer is `before` or `after` them."""
    for label, members in groupby(results, key=lambda result: place(result.operation)):
        yield label, list(members)


def place(operation: Operation) -> str:
    """`before`, the number of the layer, or `after`.

    >>> [place(Operation(name, "", layer=layer)) for name, layer in (("embed", None), ("blocks.7", 7), ("norm", None))]
    ['before', '7', 'after']
    """
    if operation.layer is not None:
        return str(operation.layer)
    return "before" if operation.name.startswith(("embed", "rotary.")) else "after"


def ratio(errors: Errors | Fault) -> float:
    """Error by what is allowed; above 1 it is outside."""
    error = errors.local if isinstance(errors, Errors) else errors.error
    return error / errors.allowed if errors.allowed else math.inf if error else 0.0


# --- tables


def _tables(title: str, results: Sequence[Result], first: Fault | None, full: bool) -> list[Text]:
    layers = list(by_layer(results))
    lines = [Text(), Text(title, "bold")] if title else [Text()]
    lines += [Text(line, "bold") for line in _LAYER_HEAD]
    lines += [_layer_line(label, members) for label, members in layers]
    lines += [Text(note, "dim") for note in (_BACKWARD_NOTES if title == _BACKWARD else _LAYER_NOTES)]
    if any(_word(result) == "both alike" for result in results):
        lines.append(Text(_ALIKE_NOTE, "dim"))
    if any(result.verdict == "inherited" for result in results):
        lines.append(Text(_INHERITED_NOTE, "dim"))
    wanted = [(label, members) for label, members in layers if full or _has(members, first)]
    if not wanted:
        return lines
    lines += [Text(), *(Text(line, "bold") for line in _OPERATION_HEAD)]
    for label, members in wanted:
        heading = f"layer {label}" if label.isdigit() else f"{label} the layers"
        lines += [Text(heading, "cyan"), *map(_operation_line, members)]
    return [*lines, Text(_OPERATION_NOTE, "dim")]


def _has(results: Sequence[Result], fault: Fault | None) -> bool:
    return fault is not None and any(result.operation.name == fault.operation for result in results)


def _layer_line(label: str, results: Sequence[Result]) -> Text:
    worst = max(results, key=lambda result: (result.verdict in _WRONG, *_ratios(result)))
    output = next((result for result in results if leaves(result.operation)), results[-1])
    cells = (
        *(_times(errors) for errors in (worst.ours, worst.theirs)),
        *("-" if errors is None else scientific(errors.chain) for errors in (output.ours, output.theirs)),
        "-" if output.between is None else scientific(output.between.relative),
    )
    return _line(_LAYER.format(label, _short(worst.operation), *cells), _gravest(results))


def _operation_line(result: Result) -> Text:
    between, cells = result.between, [_times(result.ours), _times(result.theirs), *"----"]
    if between is not None:
        angle = max(round(1 - between.cosine, 12), 0.0)  # a cosine is itself a float64 sum
        cells[2:] = [*map(scientific, (between.relative, between.largest, angle)), _tenths(between.ulps)]
    return _line(_OPERATION.format(_short(result.operation), *cells), _word(result))


def _line(cells: str, word: str) -> Text:
    return Text.assemble(cells, (word, _STYLES[word]))


def _ratios(result: Result) -> list[float]:
    """Of the sides that were recorded, the larger first."""
    return sorted((ratio(errors) for errors in (result.ours, result.theirs) if errors is not None), reverse=True)


def leaves(operation: Operation) -> bool:
    """Whether what follows reads it: the stream behind a layer, the embedding, the logits."""
    return operation.name in ("embed", "logits", f"blocks.{operation.layer}")


def _short(operation: Operation) -> str:
    """Within a column: `W q_proj` for `q_proj.weight`."""
    name = operation.name if operation.layer is None else operation.short
    owner, _, leaf = name.rpartition(".")
    signs = {"weight": "W", "bias": "b"}
    return f"{signs[leaf]} {owner.replace('attention_', 'attn_')}" if leaf in signs else name


def _word(result: Result) -> str:
    if result.verdict in _WRONG:
        return _WRONG[result.verdict]
    recorded = [errors for errors in (result.ours, result.theirs) if errors is not None]
    if len(recorded) < 2:
        return "not recorded" if not recorded else "ours only" if result.ours is not None else "theirs only"
    if all(errors.outside for errors in recorded):
        return "both alike"
    return "equal bits" if result.verdict == "equal" else result.verdict


def _gravest(results: Sequence[Result]) -> str:
    words = {_word(result) for result in results}
    return "BOTH WRONG" if {"OURS WRONG", "THEIRS WRONG"} <= words else next(word for word in _STYLES if word in words)


# --- numbers


def scientific(x: float) -> str:
    """Two digits in few letters.

    >>> [scientific(x) for x in (0.0, 0.0153, 123456.0, float("inf"))]
    ['0', '1.5e-2', '1.2e5', 'inf']
    """
    if x == 0 or not math.isfinite(x):
        return f"{abs(x):g}"
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _times(errors: Errors | Fault | None) -> str:
    """How many times what is allowed.

    >>> [_times(Errors(local, 2.0, 0.0, 0.0)) for local in (0.0, 0.6, 30.0, 4e5)], _times(None)
    (['0', '0.30', '15', '2.0e5'], '-')
    """
    if errors is None:
        return "-"
    times = ratio(errors)
    if 0 < times < 9999.5:
        return f"{times:.{2 if times < 9.995 else 0}f}"
    return scientific(times)


def _tenths(counts: Sequence[int]) -> str:
    """A histogram, one letter a count.

    >>> _tenths((90, 8, 2, 0)), _tenths((5, 0, 0, 0))
    ('9++.', '*...')
    """
    total = max(sum(counts), 1)
    return "".join(
        "." if not count else "*" if count == total else str(10 * count // total).replace("0", "+") for count in counts
    )


# --- the verdict


def _verdict(report: Report) -> Iterator[Text]:
    if report.first is None:
        yield Text(_no_difference(report), "bold green")
    else:
        yield Text(sentence(report.first, report), "bold red")
    yield from (Text(_brief(fault, report), "red") for fault in report.faults[1:])
    missing = [
        result for result in (*report.results, *report.gradients) if result.ours is None or result.theirs is None
    ]
    if missing:
        count = len(report.results) + len(report.gradients)
        yield Text(f"{len(missing)} of {count} operations were not recorded on both sides.", "yellow")
    yield from (Text(f"Remark: {remark}") for remark in report.remarks)
    if report.seconds:
        yield Text("Seconds: " + ", ".join(f"{name} {time:.2f}" for name, time in report.seconds.items()), "dim")


def _no_difference(report: Report) -> str:
    logits = report.logits
    if logits is None or logits.between is None:
        return "No operation differs beyond rounding."
    between = logits.between
    if between.largest == 0:
        return "No operation differs beyond rounding. Logits: equal bits."
    apart = f"largest difference {scientific(between.largest)}, relative {scientific(between.relative)}"
    return f"No operation differs beyond rounding. Logits: {apart}."


def _brief(fault: Fault, report: Report) -> str:
    cause = f"; {fault.cause}" if fault.cause else ""
    return f"Also: {fault.what}, {fault.side}: {_amount(fault)}{_places(fault, report)}{cause}."


def _amount(fault: Fault) -> str:
    if not math.isfinite(fault.error):
        return "not finite, or of another shape"
    return f"{_times(fault)} times what rounding allows"


def _places(fault: Fault, report: Report) -> str:
    where = f", {fault.where}" if fault.where else ""
    if len(fault.layers) < 2:
        return where
    layers = {result.operation.layer for result in (*report.results, *report.gradients)} - {None}
    which = "every layer" if len(fault.layers) == len(layers) else f"layers {ranges(sorted(fault.layers))}"
    return f"{where}, in {which}"
