"""The `minillm` command: generate, chat, info, verify, doctor.

Each subcommand is a dataclass; its fields are the flags, the string under a field its help. An error that is the
input's fault prints one line and exits with status 2; `--debug` shows where it was raised.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import (
    DisallowNone,
    FlagCreatePairsOff,
    OmitArgPrefixes,
    Positional,
    PositionalMetavarFromFieldName,
    UseAppendAction,
    subcommand,
)

from minillm.atomic import write_atomically
from minillm.checkpoint.load import load_model
from minillm.checkpoint.resolve import resolve
from minillm.data.tokenizer import Tokenizer
from minillm.doctor import describe as diagnosis_table
from minillm.doctor import examine
from minillm.errors import InputError, MinillmError
from minillm.generation.generate import Completion, generate, stream
from minillm.generation.session import Session
from minillm.info import describe
from minillm.model import Decoder
from minillm.verify.checkpoints import Settings, verify
from minillm.verify.excerpt import parse_layers
from minillm.verify.heatmap import draw
from minillm.verify.table import describe as verification_table

_DESCRIPTION = "Load, inspect and run language models by hand-written, readable code. minillm COMMAND --help says more."
_NOTES = Console(stderr=True, highlight=False)  # progress and remarks; stdout carries the text alone


@dataclass
class Checkpoint:
    """Which model, and how to hold it."""

    model: Positional[str]
    """Hugging Face id (owner/name) or a folder in Hugging Face's or Meta's format."""
    revision: str | None = None
    """Branch, tag or commit of an id."""
    allow_pickle: bool = False
    """Read .bin and .pth weights too, with torch's restricted unpickler. Safetensors need no trust."""
    ignore: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A config.json field minillm does not know and you know to be harmless."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Loading(Checkpoint):
    """A model to run."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto keeps the checkpoint's own."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1."""
    without: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A field of generation_config.json to do without, where minillm refuses what it asks for."""

    def load(self) -> tuple[Decoder, Tokenizer]:
        """Model and tokenizer, with a progress bar while weights are read."""
        folder = resolve(self.model, revision=self.revision, allow_pickle=self.allow_pickle)
        tokenizer = Tokenizer.load(folder)
        columns = (TextColumn("reading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=_NOTES, transient=True) as progress:
            task = progress.add_task("", total=None)
            model = load_model(
                folder,
                dtype=None if self.dtype == "auto" else self.dtype,
                device=self.device,
                allow_pickle=self.allow_pickle,
                ignore=self.ignore,
                report=lambda done, total: progress.update(task, completed=done, total=total),
            )
        model.generation_defaults = {k: v for k, v in model.generation_defaults.items() if k not in self.without}
        return model, tokenizer


@dataclass
class Choices:
    """How the next token is chosen. What is not given comes from the checkpoint's generation_config.json."""

    max_new_tokens: int | None = None
    """Longest answer, in tokens."""
    max_length: int | None = None
    """Longest prompt and answer together, in tokens."""
    min_new_tokens: int | None = None
    """No end of text before this many tokens."""
    sample: bool = False
    """Draw tokens at random. Implied by temperature, top-k, top-p, min-p and typical-p."""
    greedy: bool = False
    """Take the most likely token each time, whatever the checkpoint prefers."""
    temperature: float | None = None
    """Below 1 bolder tokens become rarer, above 1 more common."""
    top_k: int | None = None
    """Draw from the k most likely tokens; 0 = all."""
    top_p: float | None = None
    """Draw from the fewest tokens that hold this share of probability."""
    min_p: float | None = None
    """Draw from tokens at least this share as likely as the likeliest."""
    typical_p: float | None = None
    """Draw from the tokens whose surprise is nearest to the expected one, holding this share."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that already occurred less likely."""
    no_repeat_ngram_size: int | None = None
    """Never write the same n tokens in a row twice."""
    stop: Annotated[tuple[str, ...], UseAppendAction] = ()
    """End the answer before this text; may be given several times."""
    seed: int | None = None
    """The same seed draws the same text."""

    def options(self) -> dict[str, Any]:
        """The options of `minillm.generate` that were given."""
        if self.sample and self.greedy:
            raise InputError("--sample and --greedy contradict each other; give one")
        given = {name: value for name, value in vars(self).items() if name not in ("sample", "greedy", "stop")}
        if self.sample or self.greedy:
            given["do_sample"] = self.sample
        if self.stop:
            given["stop"] = self.stop
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class Generate(Loading):
    """Continue a text.

    minillm generate tiiuae/falcon-7b "Girafatron is obsessed with giraffes." --top-k 10 --max-length 200
    """

    prompt: Positional[str] = ""
    """The text to continue; - reads it from standard input. Empty starts from the model's BOS token."""
    num_return_sequences: int = 1
    """How many answers to write; more than one are printed when all are done."""
    choices: OmitArgPrefixes[Choices] = field(default_factory=Choices)

    def run(self) -> None:
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        options = self.choices.options()
        model, tokenizer = self.load()
        start = time.perf_counter()
        if self.num_return_sequences == 1:
            answer = Completion()
            if sys.stdout.isatty():
                print(f"\x1b[2m{prompt}\x1b[0m", end="", flush=True)
            _show(stream(model, tokenizer, prompt, answer=answer, **options))
            answers = [answer]
        else:
            answers = generate(model, tokenizer, prompt, num_return_sequences=self.num_return_sequences, **options)
            for number, answer in enumerate(answers, start=1):
                print(f"--- {number} ---\n{answer.text}")
        _remark(answers, time.perf_counter() - start)


@dataclass
class Chat(Loading):
    """Talk with a chat model; needs a chat template.

    In the conversation: /reset forgets it, /exit or Ctrl-D leaves, Ctrl-C stops an answer.
    """

    system: str | None = None
    """The system message."""
    chat_template: Path | None = None
    """A Jinja file to use instead of the checkpoint's own template."""
    choices: OmitArgPrefixes[Choices] = field(default_factory=Choices)

    def run(self) -> None:
        options = self.choices.options()
        model, tokenizer = self.load()
        if self.chat_template is not None:
            try:
                tokenizer.chat_template = self.chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{self.chat_template}: not a readable UTF-8 file ({error})") from error
        opening = [{"role": "system", "content": self.system}] if self.system else []
        tokenizer.chat([*opening, {"role": "user", "content": ""}])  # no template: say so before the first question
        session, messages = Session(model, tokenizer), list(opening)
        for said in _questions():
            if said == "/reset":
                messages = list(opening)
                continue
            asked = [*messages, {"role": "user", "content": said}]
            try:
                messages = [*asked, {"role": "assistant", "content": _turn(session, tokenizer, asked, options)}]
            except MinillmError as error:  # the conversation outgrew the context: this turn is dropped, not all of it
                _say(f"{error}; /reset starts anew", style="red")


def _turn(session: Session, tokenizer: Tokenizer, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    answer = Completion()
    start = time.perf_counter()
    try:
        _show(_without_leading_space(session.stream(tokenizer.chat(messages), answer, **options)))
    except KeyboardInterrupt:
        print()
    _remark([answer], time.perf_counter() - start)
    return answer.text.strip()


def _questions() -> Iterator[str]:
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said in ("/exit", "/quit"):
            return
        if said.startswith("/") and said != "/reset":
            _say("commands: /reset forgets the conversation, /exit leaves", style="dim")
        elif said:
            yield said


@dataclass
class Info(Checkpoint):
    """Parameters, memory by number format, and what the key/value cache costs; reads no weights."""

    def run(self) -> None:
        folder = resolve(self.model, revision=self.revision, weights=False, allow_pickle=self.allow_pickle)
        Console(highlight=False).print(describe(folder, self.model, self.allow_pickle, self.ignore))


@dataclass
class Verify(Checkpoint):
    """Name the first operation that differs from transformers, or from another run, and why.

    minillm verify FOLDER                                      against transformers on the same folder
    minillm verify FOLDER --layers 0:2                         two layers of a model too large for memory
    minillm verify FOLDER --against OTHER                      against another folder of the same shape
    minillm verify FOLDER --save-trace now.trace               keep this run, and later, or on another machine:
    minillm verify FOLDER --against now.trace --dtype bfloat16

    Every operation is held against its formula in float64. Exit status: 0 all within rounding, 1 a fault, 2 bad input.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format to run in; auto is the checkpoint's own."""
    tokens: int = 32
    """Length of the text, random tokens; a second row has a quarter of padding."""
    layers: str | None = None
    """FIRST:BEYOND, verify only these layers: 0:2 the first two."""
    against: str | None = None
    """Instead of transformers: a folder or id that minillm loads too, or a trace it saved."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """How transformers computes attention."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1."""
    gradients: bool = False
    """Also run backward, and verify every gradient."""
    full: bool = False
    """Show every operation of every layer."""
    json: Path | None = None
    """Write the report as JSON."""
    png: Path | None = None
    """Draw errors by layer and operation."""
    save_trace: Path | None = None
    """Keep our run for a later --against."""

    def run(self) -> int:
        settings = Settings(
            dtype=None if self.dtype == "auto" else self.dtype,
            tokens=self.tokens,
            layers=None if self.layers is None else parse_layers(self.layers),
            attention=self.attention,
            device=self.device,
            gradients=self.gradients,
            allow_pickle=self.allow_pickle,
            ignore=self.ignore,
        )
        folder = resolve(self.model, revision=self.revision, allow_pickle=self.allow_pickle)
        with _NOTES.status("") as status:
            tell = status.update
            report = verify(folder, settings, against=self.against, save_trace=self.save_trace, tell=tell)
        Console(highlight=False).print(verification_table(report, full=self.full))
        if self.json is not None:
            write_atomically(self.json, dumps(report.as_json(), indent=1) + "\n")
        if self.png is not None:
            draw(report, self.png)
        return 0 if report.verdict == "equal" else 1


@dataclass
class Doctor:
    """What is installed and active, each kernel's self-test, and its speed against the plain torch operation."""

    json: Path | None = None
    """Write what was found as JSON."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> int:
        with _NOTES.status("") as status:
            found = examine(status.update)
        Console(highlight=False).print(diagnosis_table(found))
        if self.json is not None:
            write_atomically(self.json, dumps(found.as_json(), indent=1) + "\n")
        return 0 if found.healthy else 1


def _show(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _without_leading_space(pieces: Iterator[str]) -> Iterator[str]:
    started = False
    for piece in pieces:
        text = piece if started else piece.lstrip()
        started = started or bool(text)
        yield text


def _remark(answers: Sequence[Completion], seconds: float) -> None:
    tokens = sum(len(answer.tokens) for answer in answers)
    reasons = ", ".join(sorted({answer.finish_reason for answer in answers}))
    _say(f"[{tokens} tokens, {tokens / seconds:.1f} a second with the prompt, ended by {reasons}]", style="dim")


def _say(text: str, *, style: str) -> None:
    _NOTES.print(text, style=style, markup=False, emoji=False, soft_wrap=True)


Command = Union[  # noqa: UP007  # `|` cannot join Annotated on Python 3.10
    Annotated[Generate, subcommand("generate")],
    Annotated[Chat, subcommand("chat")],
    Annotated[Info, subcommand("info")],
    Annotated[Verify, subcommand("verify")],
    Annotated[Doctor, subcommand("doctor")],
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for a fault that verify or doctor found, 2 for bad input, 130 after
    Ctrl-C, 141 for a closed pipe."""
    style = (FlagCreatePairsOff, PositionalMetavarFromFieldName, DisallowNone)
    command: Any = tyro.cli(Command, prog="minillm", description=_DESCRIPTION, args=arguments, config=style)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    try:
        return command.run() or 0
    except MinillmError as error:
        if command.debug:
            raise
        _say(f"minillm: {error}", style="red")
        return 2
    except torch.OutOfMemoryError as error:
        _say(f"minillm: {str(error).splitlines()[0]}; try --dtype bfloat16 or a smaller --max-new-tokens", style="red")
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:  # `minillm generate ... | head`: nobody reads on, and Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
