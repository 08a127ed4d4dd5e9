"""What is said to people: text on standard output, progress and remarks on standard error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console

from minillm.generation.generate import Completion

NOTES = Console(stderr=True, highlight=False)  # progress and remarks; stdout carries the text alone


def show(pieces: Iterator[str]) -> None:
    """Print pieces as they come, then end the line."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def without_leading_space(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces, without the space that many vocabularies put before the first word."""
    started = False
    for piece in pieces:
        text = piece if started else piece.lstrip()
        started = started or bool(text)
        yield text


def remark(answers: Sequence[Completion], seconds: float) -> None:
    """Tokens, speed and why it ended, dimly, beside the text."""
    tokens = sum(len(answer.tokens) for answer in answers)
    reasons = ", ".join(sorted({answer.finish_reason for answer in answers}))
    say(f"[{tokens} tokens, {tokens / seconds:.1f} a second with the prompt, ended by {reasons}]", style="dim")


def say(text: str, *, style: str) -> None:
    """One line for people, on standard error."""
    NOTES.print(text, style=style, markup=False, emoji=False, soft_wrap=True)
