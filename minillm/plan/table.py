"""A plan as a table for people: each part, what is there at the worst moment, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from rich.table import Table
from rich.text import Text

from minillm.config import DecoderConfig
from minillm.errors import InputError
from minillm.plan.moments import Parts, Plan, plan, rows_at_once
from minillm.plan.use import Use

_FORMATS = {
    "float32": Use(dtype="float32"),
    "bfloat16": Use(),
    "int8": Use(quantize="int8"),
    "nf4": Use(quantize="nf4"),
}


def describe(name: str, config: DecoderConfig, use: Use, available: int | None = None) -> Table:
    """The table; `available` bytes add a last line, with one change that would make it fit where it does not."""
    found = plan(config, use)
    table = Table(title=Text(f"{name}: {_headline(config, use)}"), title_justify="left", title_style="bold")
    table.add_column("memory", style="cyan", no_wrap=True)
    table.add_column("at most", justify="right", no_wrap=True)
    table.add_column("at peak", justify="right", no_wrap=True)
    table.add_column("")
    notes = _notes(config, use, found)
    for part in (part.name for part in fields(Parts)):
        whole, then = getattr(found.whole, part), getattr(found.peak, part)
        if whole:
            table.add_row(part, as_bytes(whole), as_bytes(then) if then else "-", notes[part])
    table.add_section()
    table.add_row("total", "", as_bytes(found.total), found.moment, style="bold")
    if available is not None:
        table.add_row("available", "", as_bytes(available), _verdict(config, use, found, available))
    table.add_section()
    formats = ", ".join(
        f"{label} {as_bytes(plan(config, replace(form, context=1)).whole.weights)}" for label, form in _FORMATS.items()
    )
    table.add_row("weights as", "", "", formats)
    table.add_row("disk, read", as_bytes(found.read), "", f"the checkpoint, if it is {use.dtype}")
    if use.train:
        result = "the model" if use.full else "the adapters"
        table.add_row("disk, written", as_bytes(found.written), "", f"{result}, and a state to resume from")
    return table


def _headline(config: DecoderConfig, use: Use) -> str:
    rows = "" if use.batch == 1 else f"{use.batch} rows of "
    what = "reading" if not use.train else "training" if use.full else f"training adapters of rank {use.lora_rank} on"
    return f"{what} {rows}{use.tokens(config):,} tokens"


def _notes(config: DecoderConfig, use: Use, found: Plan) -> dict[str, str]:
    """How each part comes about, in a few words; the formulas are in `minillm.plan`."""
    form = use.dtype if use.quantize == "none" else f"{use.quantize}, the rest {use.dtype}"
    optimizers = {"adamw": "AdamW: two moments, as wide as the gradients", "adamw8": "AdamW: two moments of 8 bits"}
    if not use.train:
        activations = "the widest operation of one layer"
    elif use.checkpointing:
        activations = "each layer's input, one layer computed again"
    else:
        activations = "what the backward pass needs"
    return {
        "weights": f"{found.parameters:,} numbers: {form}",
        "adapters": f"rank {use.lora_rank}, float32: {' '.join(use.lora_targets)}",
        "cache": f"{config.cache_bytes_per_token(use.number):,} bytes a token, {use.dtype}",
        "gradients": use.dtype if use.full else "of the adapters, float32",
        "optimizer": optimizers[use.optimizer],
        "activations": activations,
        "logits": _logits_note(config, use),
    }


def _logits_note(config: DecoderConfig, use: Use) -> str:
    if not use.train:
        return "of the last token, also in float32"
    if config.head != "lm":
        return "1 a token; the loss in float32"
    return f"{config.vocab_size:,} a token, {rows_at_once(config, use):,} tokens at a time; the loss in float32"


def _verdict(config: DecoderConfig, use: Use, found: Plan, available: int) -> str:
    spare = available - found.total
    if spare >= 0:
        return f"fits, {as_bytes(spare)} to spare"
    for flag, change in _changes(use):
        try:
            smaller = plan(config, change)
        except InputError:
            continue
        if smaller.fits(available):
            return f"does not fit, {as_bytes(-spare)} short; with {flag}: {as_bytes(smaller.total)}"
    return f"does not fit, {as_bytes(-spare)} short"


def _changes(use: Use) -> Iterator[tuple[str, Use]]:
    """Single changes that save memory, those that cost least first."""
    if use.train:
        yield "--checkpointing", replace(use, checkpointing=True)
        yield "--optimizer adamw8", replace(use, optimizer="adamw8")
        if use.full:
            yield "--lora-rank 16", replace(use, lora_rank=16)
    if use.quantize == "none":
        yield "--quantize int8", replace(use, quantize="int8")
    if use.quantize != "nf4":
        yield "--quantize nf4", replace(use, quantize="nf4")


def as_bytes(count: int) -> str:
    """Three digits and a unit, in powers of 1000.

    >>> as_bytes(82_606_587_904), as_bytes(1_280), as_bytes(7)
    ('82.6 GB', '1.28 kB', '7 bytes')
    """
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= 0.9995 * size:  # 999,950 bytes are 1.00 MB, not 1000 kB
            return f"{count / size:#.3g} {unit}".replace(". ", " ")
    return f"{count} bytes"
