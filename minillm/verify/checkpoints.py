"""From a checkpoint folder to a `Report`: load one side, record, let it go, load the other, compare.

One model is in memory at a time, and one weight of it in float64, so that a checkpoint is verified in the memory it
needs anyway. What needs more than there is gets refused with the numbers, before anything is loaded; `layers` then
takes a part.

    against nothing     transformers loads the same folder; the truth has its weights and settings
    against a folder    both are loaded by us; the truth has the weights of the first
    against a trace     a file that `--save-trace` wrote: yesterday's run, another machine's, a GPU's
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from minillm.checkpoint import meta
from minillm.checkpoint.families import read_json
from minillm.checkpoint.load import load_model
from minillm.checkpoint.resolve import resolve
from minillm.config import DecoderConfig
from minillm.errors import InputError
from minillm.model import Decoder
from minillm.placement import as_device, as_dtype
from minillm.verify import transformers_oracle
from minillm.verify.comparable import (
    check_finite,
    check_head,
    check_memory,
    check_same_shape,
    check_same_vocabulary,
    check_trace,
    not_reached,
    read_settings,
)
from minillm.verify.excerpt import Layers, write_excerpt
from minillm.verify.reference import Formula
from minillm.verify.report import Report
from minillm.verify.run import Tell, examine, oracle_formula, own_formula, record, settings_that_differ, silent
from minillm.verify.trace import Trace


@dataclass(frozen=True)
class Settings:
    """How to verify. tokens: of the longer of two rows; attention: transformers' implementation of it."""

    dtype: str | None = None  # None: the checkpoint's own
    tokens: int = 32
    layers: Layers | None = None
    attention: str = "sdpa"
    device: str = "cpu"
    gradients: bool = False
    allow_pickle: bool = False
    ignore: Collection[str] = ()


def verify(
    name_or_folder: str | Path,
    settings: Settings = Settings(),  # frozen
    *,
    against: str | Path | None = None,
    save_trace: Path | None = None,
    tell: Tell = silent,
) -> Report:
    """Verify a Hugging Face id or folder, against transformers or another run of ours; `tell` hears what is going on.

    save_trace: where to keep our own trace. Raises a MinillmError for input that cannot be compared, such as folders of
    different shapes or vocabularies, weights that are not finite, or a model too large for memory.
    """
    started = time.perf_counter()
    wanted = as_dtype(settings.dtype)
    as_device(settings.device)
    with _folder(name_or_folder, settings, tell) as folder:
        config = read_settings(folder, allow_pickle=settings.allow_pickle, ignore=settings.ignore)
        check_head(config, folder, gradients=settings.gradients, alone=against is None)
        if settings.device == "cpu":
            check_memory(
                folder,
                config,
                wanted,
                settings.tokens,
                gradients=settings.gradients,
                allow_pickle=settings.allow_pickle,
            )
        tokens, keep = inputs(config.vocab_size, settings.tokens)
        if against is None:
            report = _with_transformers(folder, settings, (tokens, keep), save_trace, tell)
        else:
            report = _with_another(folder, settings, (tokens, keep), against, save_trace, tell)
    about = {"tokens": f"{keep.shape[0]} x {keep.shape[1]} ({int((~keep).sum())} padding)", "torch": torch.__version__}
    remarks = (*report.remarks, *not_reached(config, settings.tokens))
    if settings.layers is not None:
        about["layers"] = f"{settings.layers.first}:{settings.layers.beyond}, counted from 0 below"
    seconds = {"all": time.perf_counter() - started, **report.seconds}
    return replace(report, about={**report.about, **about}, remarks=remarks, seconds=seconds)


def inputs(vocab_size: int, length: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random tokens (2, T) and keep (2, T): the second row has a quarter of padding on its left, where positions and
    masks go wrong that are right without it."""
    if length < 4:
        raise InputError(f"{length} tokens are too few to see positions and masks at work; give at least 4")
    tokens = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    keep = torch.ones(2, length, dtype=torch.bool)
    keep[1, : length // 4] = False
    return tokens.to(device), keep.to(device)


def _with_transformers(
    folder: Path, settings: Settings, text: tuple[Tensor, Tensor], save_trace: Path | None, tell: Tell
) -> Report:
    if not transformers_oracle.available():
        raise InputError('transformers is not installed; pip install "minillm[verify]", or compare with --against')
    if meta.is_meta_folder(folder):
        raise InputError(f"{folder}: transformers does not read Meta's format; give its Hugging Face twin as --against")
    if read_json(folder / "config.json").get("quantization_config"):
        raise InputError(f"{folder}: is quantised; verify the float model, with this one as --against")
    tokens, keep = (x.to(settings.device) for x in text)
    ours, config, dtype = _record_ours(folder, settings, (tokens, keep), tell)
    if save_trace is not None:
        ours.save(save_trace)
    tell("transformers: loading")
    oracle = transformers_oracle.load(folder, dtype=dtype, attention=settings.attention, device=settings.device)
    tell("transformers: running")
    theirs = oracle.record(tokens, keep, gradients=settings.gradients)
    formula = oracle_formula(oracle, tokens, keep)
    names = (f"minillm {version('minillm')}", f"transformers {transformers_oracle.version()}")
    about = {"dtype": str(dtype)[6:], "attention": settings.attention, "weights of": "transformers"}
    report = examine(ours, theirs, formula, names=names, about=about, tell=tell)
    return replace(report, remarks=(*settings_that_differ(config, oracle.config), *report.remarks))


def _with_another(
    folder: Path,
    settings: Settings,
    text: tuple[Tensor, Tensor],
    against: str | Path,
    save_trace: Path | None,
    tell: Tell,
) -> Report:
    """The first is `ours`, whose weights are the truth; the other run is `theirs`."""
    tokens, keep = (x.to(settings.device) for x in text)
    other, its_config = _other_run(against, folder, settings, (tokens, keep), tell)
    tokens, keep = (x.to(settings.device) for x in (other.tokens, other.keep) if x is not None)
    model = _load(folder, settings, tell)
    if its_config is not None:
        check_same_shape(model.config, its_config, (str(folder), str(against)))
    tell("minillm: running")
    ours = record(model, tokens, keep, gradients=settings.gradients)
    ours.about["dtype"] = str(model.embed.weight.dtype)[6:]
    if save_trace is not None:
        ours.save(save_trace)
    formula: Formula = own_formula(model, tokens, keep)
    other = _to(other, settings.device)
    dtypes = [str(trace["embed"].dtype)[6:] for trace in (ours, other)]
    about = {"dtype": dtypes[0] if dtypes[0] == dtypes[1] else " against ".join(dtypes)}
    names = (folder.resolve().name, Path(against).resolve().name)
    about["weights of"] = names[0]
    return examine(ours, other, formula, names=names, about=about, tell=tell)


def _other_run(
    against: str | Path, folder: Path, settings: Settings, text: tuple[Tensor, Tensor], tell: Tell
) -> tuple[Trace, DecoderConfig | None]:
    if Path(against).is_file():
        recorded = Trace.load(against)
        config = read_settings(folder, allow_pickle=settings.allow_pickle, ignore=settings.ignore)
        check_trace(recorded, config, (str(folder), str(against)))
        if settings.gradients and not recorded.gradients:
            raise InputError(f"{against}: holds no gradients; save it again with --gradients, or compare without them")
        return recorded, None
    other = resolve(against, allow_pickle=settings.allow_pickle)
    check_same_vocabulary(folder, other)
    with _folder(other, settings, tell) as part:
        recorded, config, _ = _record_ours(part, settings, text, tell)
    return recorded, config


def _to(recorded: Trace, device: str) -> Trace:
    tensors, gradients = (
        {name: x.to(device) for name, x in kept.items()} for kept in (recorded.tensors, recorded.gradients)
    )
    return replace(recorded, tensors=tensors, gradients=gradients)


@contextmanager
def _folder(name_or_folder: str | Path, settings: Settings, tell: Tell) -> Iterator[Path]:
    """The folder, or a temporary one with the layers asked for."""
    folder = resolve(name_or_folder, allow_pickle=settings.allow_pickle)
    if settings.layers is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        tell(f"copying layers {settings.layers.first}:{settings.layers.beyond}")
        excerpt = Path(temporary) / folder.resolve().name  # the name is what messages show
        write_excerpt(folder, settings.layers, excerpt, allow_pickle=settings.allow_pickle)
        yield excerpt


def _record_ours(
    folder: Path, settings: Settings, text: tuple[Tensor, Tensor], tell: Tell
) -> tuple[Trace, DecoderConfig, torch.dtype]:
    """Load, record, let go."""
    model = _load(folder, settings, tell)
    tell("minillm: running")
    dtype = model.embed.weight.dtype
    recorded = record(model, *text, gradients=settings.gradients)
    recorded.about["dtype"] = str(dtype)[6:]
    return recorded, model.config, dtype


def _load(folder: Path, settings: Settings, tell: Tell) -> Decoder:
    model = load_model(
        folder,
        dtype=settings.dtype,
        device=settings.device,
        allow_pickle=settings.allow_pickle,
        ignore=settings.ignore,
        report=lambda done, total: tell("minillm: loading", done, total),
    )
    check_finite(model, folder)
    return model
