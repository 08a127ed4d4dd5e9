"""A task whose success can be counted: write the body of a Python function from its signature and docstring.

    def area(self):                              prompt, as `minillm.data.functions` finds them
        'Width times height.'
        return self.width * self.height          answer, from the line end on; then EOS, by the model's own choice

    success = it ends by itself  and  prompt + answer parses as that one function, with a body, and nothing behind it

Parsing is all that is asked, so `pass` succeeds, and whoever rewards success will be given `pass`: it is told apart as
`trivial`. An answer is read and never run: no `compile`, no `exec`.

The prompt ends at the docstring's quotes and the answer begins with the line end. The other way round a byte-pair
vocabulary, which joins a line end to the blanks behind it, would show the model prompts it was never taught to go on
from: `"\\n"` stands before `"    return"` in generation, `"\\n   "` before `" return"` in training.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import NamedTuple

from minillm.errors import InputError

Function = ast.FunctionDef | ast.AsyncFunctionDef

_LINE_END = re.compile(r"\r\n?|\n")  # Python's own, unlike str.splitlines
#: What ast.parse raises for what is no Python: ValueError for NUL bytes and lone surrogates, the last two for depth.
_NO_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)
#: No answer of a few hundred tokens is longer; the parser recurses once a bracket, on a stack that is not Python's.
_LONGEST = 20_000


class Verdict(NamedTuple):
    """What an answer is worth.

    parses: prompt + answer is that one function with a body. trivial: it parses, and does nothing: each statement is
    `pass`, `...`, another constant, a return of nothing or None, or `raise NotImplementedError`.
    """

    parses: bool
    trivial: bool = False


def judge(prompt: str, answer: str) -> Verdict:
    """Whether an answer is a body for the prompt; whether it ended by itself is the caller's to know.

    Raises InputError for a prompt that is no signature with a docstring.

    >>> judge('def f(a):\\n    "Doc."', "\\n    return a")
    Verdict(parses=True, trivial=False)
    >>> judge('def f(a):\\n    "Doc."', "\\n    return a\\nf(1)").parses
    False
    """
    asked = _only_function(prompt)
    if asked is None or ast.get_docstring(asked) is None or len(asked.body) != 1:
        raise InputError(f"the prompt is no `def` line with a docstring and nothing more: {prompt[:80]!r}")
    written = _only_function(prompt + answer) if len(answer) <= _LONGEST else None
    if written is None or len(written.body) < 2 or ast.get_docstring(written) != ast.get_docstring(asked):
        return Verdict(False)  # also where the answer goes on with the docstring: `"""Doc.""" % name`
    return Verdict(True, all(map(_does_nothing, written.body[1:])))


def until_dedent(answer: str) -> str:
    """The answer up to its first line that is not indented: what a reader would take for the body.

    For models that were never taught to stop. An answer that is cut by its length may still end inside a line.

    >>> until_dedent("\\n    return a\\n\\nclass B:")
    '\\n    return a'
    """
    dedent = re.search(r"\n(?=\S)", answer)
    return answer[: dedent.start()].rstrip() if dedent else answer


def some_beginning_parses(prompt: str, answer: str) -> bool:
    """Whether the answer would be a body for the prompt if it were stopped at the end of some line, the best one.

    The most that can be said for a model that does not know when to stop: what is left to learn is that alone.

    >>> some_beginning_parses('def f(a):\\n    "Doc."', "\\n    return a\\n    return (")
    True
    """
    ends = [found.start() for found in re.finditer("\n", answer)] + [len(answer)]
    return any(judge(prompt, answer[:end]).parses for end in ends)


def parse_python(text: str) -> ast.Module | None:
    """The syntax tree, or None for what is no Python, whatever the reason; without the parser's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except _NO_PYTHON:
            return None


def _only_function(text: str) -> Function | None:
    """The function that the text consists of. A comment behind it that is not indented belongs to something else."""
    tree = parse_python(text)
    if tree is None or len(tree.body) != 1 or not isinstance(tree.body[0], Function):
        return None
    behind = _LINE_END.split(text)[tree.body[0].end_lineno :]
    return None if any(line[:1].strip() for line in behind) else tree.body[0]


def _does_nothing(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant()) | ast.Return(value=None | ast.Constant(value=None)):
            return True
        case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
            return True
    return False
