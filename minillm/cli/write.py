"""`minillm generate` and `minillm chat`: text out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

from minillm.cli.checkpoint import Loading
from minillm.cli.terminal import remark, say, show, without_leading_space
from minillm.data.tokenizer import Tokenizer
from minillm.errors import InputError, MinillmError
from minillm.generation.generate import Completion, generate, stream
from minillm.generation.session import Session


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
            show(stream(model, tokenizer, prompt, answer=answer, **options))
            answers = [answer]
        else:
            answers = generate(model, tokenizer, prompt, num_return_sequences=self.num_return_sequences, **options)
            for number, answer in enumerate(answers, start=1):
                print(f"--- {number} ---\n{answer.text}")
        remark(answers, time.perf_counter() - start)


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
                say(f"{error}; /reset starts anew", style="red")


def _turn(session: Session, tokenizer: Tokenizer, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    answer = Completion()
    start = time.perf_counter()
    try:
        show(without_leading_space(session.stream(tokenizer.chat(messages), answer, **options)))
    except KeyboardInterrupt:
        print()
    remark([answer], time.perf_counter() - start)
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
            say("commands: /reset forgets the conversation, /exit leaves", style="dim")
        elif said:
            yield said
