"""Python files -> functions with a docstring, each as the prompt and the completion of `minillm.data.bodies`.

    file ─parse─▶ def ─┬─ signature as written, first line of the docstring     ─▶ prompt
                       └─ what follows the docstring, to the last statement     ─▶ completion

Functions, methods and nested ones alike, moved to the left edge and without their decorators. A row is kept only where
prompt + completion parses to the statements of the file (moving a string of several lines would change it), and
where the body does something: a model that is taught `pass` writes `pass`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from minillm.data.bodies import Function, judge, parse_python
from minillm.data.corpus import Document
from minillm.errors import InputError


class Body(NamedTuple):
    """One function to learn from or to be asked for. source: the file's path and the line of its `def`."""

    prompt: str
    completion: str
    source: str


def functions(documents: Iterable[Document]) -> Iterator[Body]:
    """Every usable function of the documents, in order; files that are no Python are passed over."""
    for document in documents:
        tree = parse_python(document.text)
        lines = document.text.split("\n")
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, Function):
                parts = _prompt_and_completion(node, lines)
                if parts is not None:
                    yield Body(*parts, f"{document.path}:{node.lineno}")


def distinct(bodies: Iterable[Body], *, apart_from: Iterable[Body] = ()) -> list[Body]:
    """Those of which neither the prompt nor the completion has been seen before, nor occurs in `apart_from`.

    >>> [body.source for body in distinct([Body("a", "1", "x"), Body("b", "1", "y"), Body("b", "2", "z")])]
    ['x', 'z']
    """
    known = list(apart_from)
    prompts, completions = {body.prompt for body in known}, {body.completion for body in known}
    kept = []
    for body in bodies:
        if body.prompt not in prompts and body.completion not in completions:
            kept.append(body)
            prompts.add(body.prompt)
            completions.add(body.completion)
    return kept


def _prompt_and_completion(node: Function, lines: list[str]) -> tuple[str, str] | None:
    """The two texts, or None where the function does not come apart at the end of its docstring."""
    summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
    if len(node.body) < 2 or not summary or set(summary) & set('"\\') or not summary.isprintable():
        return None
    first, doc = lines[node.lineno - 1], node.body[0]
    edge = first[: len(first) - len(first.lstrip())]
    head = _moved(lines[node.lineno - 1 : doc.lineno - 1], edge)
    body = _moved(lines[doc.end_lineno : node.end_lineno], edge)
    if not head or not body:  # a docstring on the line of the `def`, a body on the line of the docstring
        return None
    quoted = lines[doc.lineno - 1].removeprefix(edge)
    indent = quoted[: len(quoted) - len(quoted.lstrip())]
    prompt, completion = f'{head}\n{indent}"""{summary}"""', "\n" + body.strip("\n")
    return (prompt, completion) if _is_faithful(prompt, completion, node) else None


def _moved(lines: list[str], edge: str) -> str:
    """The lines without the indentation `edge`; empty where one of them has less."""
    if any(line.strip() and not line.startswith(edge) for line in lines):
        return ""
    return "\n".join(line[len(edge) :].rstrip() for line in lines)


def _is_faithful(prompt: str, completion: str, node: Function) -> bool:
    """Whether the two together are the function of the file, but for the docstring's other lines, and no trifle."""
    try:
        verdict = judge(prompt, completion)
    except InputError:  # the docstring shares a line with something else
        return False
    tree = parse_python(prompt + completion) if verdict.parses and not verdict.trivial else None
    try:
        return tree is not None and _dumped(tree.body[0]) == _dumped(node)
    except RecursionError:  # the parser goes deeper than `ast.dump`
        return False


def _dumped(node: ast.AST) -> list[str]:
    """Signature and statements, the docstring left out."""
    assert isinstance(node, Function)
    returns = ast.dump(node.returns) if node.returns else ""
    return [node.name, ast.dump(node.args), returns, *map(ast.dump, node.body[1:])]
