"""Run both sides, compare, diagnose: from two models to a `Report`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from typing import Protocol

import torch
from torch import Tensor

from minillm.config import DecoderConfig
from minillm.model import Decoder
from minillm.model.rope import attention_factor, frequencies
from minillm.quant.convert import QUANTISED
from minillm.verify.compare import FAULTY, Case, Errors, Result, Side, compare
from minillm.verify.diagnose import diagnose, locate
from minillm.verify.gradients import compare_gradients, pull_back
from minillm.verify.known_faults import known_fault
from minillm.verify.operations import operations
from minillm.verify.reference import Formula
from minillm.verify.report import Fault, Report
from minillm.verify.trace import Trace, gradient_of, trace
from minillm.verify.transformers_oracle import Oracle
from minillm.verify.transformers_oracle import version as oracle_version


class Tell(Protocol):
    """Hears what is going on, and how much of it is done, if that is known."""

    def __call__(self, what: str, done: int = 0, total: int | None = None) -> None: ...


def silent(what: str, done: int = 0, total: int | None = None) -> None:
    """Tells nobody."""


def verify_models(ours: Decoder, oracle: Oracle, tokens: Tensor, keep: Tensor, *, gradients: bool = False) -> Report:
    """Our model against transformers', both in memory: tokens (B, T) int64 · keep (B, T) bool, True on real tokens.

    The truth is the formula with transformers' weights and settings. gradients: the backward pass too.
    """
    recorded, theirs = (side(tokens, keep, gradients=gradients) for side in (partial(record, ours), oracle.record))
    names = (f"minillm {version('minillm')}", f"transformers {oracle_version()}")
    report = examine(recorded, theirs, oracle_formula(oracle, tokens, keep), names=names)
    return replace(report, remarks=(*settings_that_differ(ours.config, oracle.config), *report.remarks))


def record(model: Decoder, tokens: Tensor, keep: Tensor, *, gradients: bool = False) -> Trace:
    """One forward of our model, recorded: tokens, keep (B, T).

    gradients: also backward from `next_token_loss`; the trace has the parameters' gradients too (but for frozen ones),
    the model none.
    """
    with torch.set_grad_enabled(gradients), trace(model, gradients=gradients) as recorded:
        logits = model(tokens, keep=keep)
        if gradients:
            model.zero_grad(set_to_none=True)
            pull_back(logits, tokens, keep)
            recorded.gradients |= {name: gradient_of(x) for name, x in model.named_parameters() if x.requires_grad}
            model.zero_grad(set_to_none=True)
    return recorded


def oracle_formula(oracle: Oracle, tokens: Tensor, keep: Tensor) -> Formula:
    """The formulas with the weights, settings and frequencies that transformers has."""
    bare = Formula(oracle.config, oracle.parameter, tokens, keep)
    table, stretch = oracle.frequencies(bare.positions)
    return replace(bare, frequencies=table, stretch=stretch)


def own_formula(model: Decoder, tokens: Tensor, keep: Tensor) -> Formula:
    """The formulas with the weights, settings and frequencies of one of our own models, for `--against`.

    A quantised layer's weight is what its codes stand for.
    """

    def parameter(name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        module = model.get_submodule(layer)
        return (
            module.dequantised(torch.float32)
            if isinstance(module, QUANTISED) and leaf == "weight"
            else model.get_parameter(name)
        )

    bare, config = Formula(model.config, parameter, tokens, keep), model.config
    if config.position != "rotary":
        return bare
    table = frequencies(config, int(bare.positions.max()) + 1).to(tokens.device)
    return replace(bare, frequencies=table, stretch=attention_factor(config))


@torch.no_grad()
def examine(
    ours: Trace,
    theirs: Trace,
    formula: Formula,
    *,
    names: tuple[str, str],
    about: Mapping[str, str] | None = None,
    tell: Tell = silent,
) -> Report:
    """Compare two traces of the same forward against the formula, diagnose what is out of bound.

    Where both traces have gradients, these are compared too.
    """
    started = time.perf_counter()
    faults: dict[tuple[Side, str, bool], Fault] = {}

    def on_fault(side: Side, case: Case, errors: Errors, *, formula: Formula = formula) -> None:
        step, backward = case.operation, case.operation.kind == "gradient"
        key = (side, step.short, backward)
        if key in faults:
            if step.layer is not None:
                faults[key] = replace(faults[key], layers=(*faults[key].layers, step.layer))
            return
        layers = () if step.layer is None else (step.layer,)
        fault = Fault(step.name, side, errors.local, errors.allowed, layers=layers, backward=backward)
        recorded, library = (ours, names[0]) if side == "ours" else (theirs, names[1])
        faults[key] = explain(fault, case, formula, recorded, library)

    results: list[Result] = []
    total = len(operations(formula.config))
    for result in compare(ours, theirs, formula, on_fault=on_fault):
        results.append(result)
        tell("comparing operations", len(results), total)
    gradients: list[Result] = []
    if ours.gradients and theirs.gradients:
        apart = any(result.verdict in ("inherited", *FAULTY) for result in results)
        for result in compare_gradients(ours, theirs, formula, on_fault=on_fault, apart=apart):
            gradients.append(result)
            tell("comparing gradients", len(gradients), len(ours.gradients))
    seconds = {"compare": time.perf_counter() - started}
    return Report(
        *names, about or {}, tuple(results), tuple(faults.values()), gradients=tuple(gradients), seconds=seconds
    )


def explain(fault: Fault, case: Case, formula: Formula, recorded: Trace, library: str) -> Fault:
    """The fault with its cause, place and entry in the list of known ones, as far as they are found."""
    cause = diagnose(case, formula, recorded)
    where = locate(case, formula)
    if cause is None:
        return replace(fault, where=where)
    known = known_fault(library.split()[0], case.operation.short, cause.key)
    return replace(fault, cause=cause.key, text=cause.text, where=where, known=known.name if known else "")


def settings_that_differ(ours: DecoderConfig, theirs: DecoderConfig) -> list[str]:
    """A remark for each field that the two sides read differently. The dialect and rope scaling are not compared."""
    apart = []
    for field in fields(DecoderConfig):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name not in ("family", "rope_scaling") and mine != other:
            apart.append(f"{field.name} is {mine!r} in ours, {other!r} in transformers'")
    return apart
