"""What counts as a function body, what is taken from files to learn from, and how sure a rate is."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest

from minillm.data.bodies import judge, parse_python, some_beginning_parses, until_dedent
from minillm.data.corpus import Document
from minillm.data.functions import Body, distinct, functions
from minillm.errors import InputError
from minillm.training.rates import change, wilson

PROMPT = 'def f(a):\n    """Doc."""'


@pytest.mark.parametrize(
    "answer",
    [
        "\n    return a",
        "\n    return a\n",
        "; return a",
        "\n\n    # why\n    return a  # so\n    # end",
        "\n    if a:\n        return a\n    else:\n        return [\n1]",
        "\n    def g():\n        return a\n    return g",
        '\n    """Not the docstring."""\n    a = 1',
        "\n    return '''\nflush left'''",
        "\n    return '\\d'",
        "\r\n    return a\r\n",
        "\n    yield await a",
    ],
)
def test_good_bodies(answer: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a wrong escape is a warning of the parser
        assert judge(PROMPT, answer) == (True, False)
    assert judge(PROMPT.replace("def", "async def"), answer).parses


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "\n",
        "\n    # nothing but this",
        "\nreturn a",
        "\n  return a",
        "\n    return a\nprint(a)",
        "\n    return a\n\ndef g(a):\n    return a",
        "\n    return a\n# behind",
        "\n    return (a",
        "\n    return a\n   b",
        "\n    for",
        " % 3\n    return a",
        ' "more"\n    return a',
        '"\n    return a',
        "\n    return a\0",
        "\n    return '\ud800'",
        "\n    return " + "(" * 5000,
        "\n    return " + "-" * 15000 + "a",
        "\n    return " + "-" * 10**6 + "a",
        "\n    return " + "lambda:" * 2000,
        "\n    return " + "9" * 9999,
        "\n    " + "x = 1; " * 20_000,
    ],
    ids=lambda answer: ascii(answer[:24]),
)
def test_bad_bodies(answer: str) -> None:
    assert judge(PROMPT, answer) == (False, False)


@pytest.mark.parametrize(
    ("answer", "trivial"),
    [
        ("\n    pass", True),
        ("\n    ...", True),
        ("\n    return", True),
        ("\n    return None\n", True),
        ("\n    raise NotImplementedError", True),
        ("\n    raise NotImplementedError('f')", True),
        ("\n    pass\n    'text'\n    return", True),
        ("\n    return a", False),
        ("\n    pass\n    return a", False),
        ("\n    raise ValueError", False),
        ("\n    raise", False),
        ("\n    return 0", False),
        ("\n    a", False),
    ],
)
def test_trifles_are_told_apart(answer: str, trivial: bool) -> None:
    assert judge(PROMPT, answer) == (True, trivial)


@pytest.mark.parametrize(
    "prompt", ["", "def f(a):", "def f(a):\n    return a", PROMPT + "\n    return a", "class A:\n    'Doc.'", "x = 1"]
)
def test_a_prompt_is_a_signature_with_a_docstring(prompt: str) -> None:
    with pytest.raises(InputError, match="no `def` line with a docstring and nothing more"):
        judge(prompt, "\n    return a")


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("\n    return a\n\n\nclass B:\n    pass", "\n    return a"),
        ("\n    return a\n# next", "\n    return a"),
        ("\n    a = 1\n\n    return a", "\n    a = 1\n\n    return a"),
        ("\ndef g():", ""),
        ("\n    return (", "\n    return ("),
    ],
)
def test_an_answer_cut_at_its_dedent(answer: str, kept: str) -> None:
    assert until_dedent(answer) == kept


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("\n    return a\n    return (", True),
        ("\n    if a:\n        return 1\n    return (", True),
        ("\n    if a:\n    return (", False),
        ("\n    return a", True),
        ("\nreturn a", False),
        ("", False),
    ],
)
def test_some_beginning_of_an_answer(answer: str, expected: bool) -> None:
    assert some_beginning_parses(PROMPT, answer) is expected


FILE = '''
@decorated
def plain(a, *, b=(1,
                   2)) -> int:
    """First line.

    More lines.
    """
    # why
    return a + b


class A:
\tdef method(self):
\t\t"Tabs."

\t\tif self:
\t\t\treturn 1

    # misplaced

class B:
    async def waits(self):
        r"""Raw."""
        def inner(x):
            'Nested.'
            yield x
        return await inner(1)  # so

    def text(self):
        """A string that moving changes."""
        return """
            indented"""

    def flat(self):
        """A line with less indentation than the `def`."""
        return """
flat"""
'''

UNUSABLE = '''
def none(a):
    return a

def empty():
    """  """
    return 1

def only():
    """Doc."""

def one_line(): """Doc."""; return 1

def same_line():
    """Doc."""; x = 1
    return x

def quotes():
    """Says "no"."""
    return 1

def escape():
    """A \\d in it."""
    return 1

def trifle():
    """Doc."""
    pass

def abstract():
    """Doc."""
    raise NotImplementedError

def comment_at_the_edge():
    def inner():
        """Doc."""
        x = 1
# here
        return x
    return inner

def formatted():
    f"""Doc."""
    return 1

lambda: """Doc."""
'''


def mined(text: str) -> dict[str, Body]:
    return {body.prompt.partition("(")[0].split()[-1]: body for body in functions([Document("m.py", text)])}


def test_functions_come_apart_at_the_docstring() -> None:
    found = mined(FILE)
    assert set(found) == {"plain", "method", "waits", "inner"}
    assert found["plain"] == (
        'def plain(a, *, b=(1,\n                   2)) -> int:\n    """First line."""',
        "\n    # why\n    return a + b",
        "m.py:3",
    )
    assert found["method"][:2] == ('def method(self):\n\t"""Tabs."""', "\n\tif self:\n\t\treturn 1")
    assert found["waits"].prompt == 'async def waits(self):\n    """Raw."""'
    assert found["waits"].completion.endswith("\n    return await inner(1)  # so")
    assert found["inner"][:2] == ('def inner(x):\n    """Nested."""', "\n    yield x")
    assert all(judge(body.prompt, body.completion) == (True, False) for body in found.values())


def test_functions_that_do_not_come_apart_are_left() -> None:
    tree = parse_python(UNUSABLE)
    assert tree is not None and len(tree.body) == 12
    assert not mined(UNUSABLE)


@pytest.mark.parametrize("text", ["def f(:\n", "print 'two'\n", "\tdef f():\n  pass", "\0", "x = '\\d'"])
def test_files_that_are_no_python_are_passed_over(text: str) -> None:
    found = list(functions([Document("bad.py", text), Document("good.py", f"{PROMPT}\n    return a\n")]))
    assert [body.source for body in found] == ["good.py:1"]


def test_depth_is_no_way_to_stop_a_run() -> None:
    """Python's parser goes deeper than Python itself: such an answer, and such a file, are only of no use."""
    deep = " if 1 else 1" * 1500
    assert not judge(PROMPT, f"{deep}\n    return a").parses  # behind the docstring, which is then none
    assert not mined(f"{PROMPT}\n    return 1{deep}\n")


def test_neither_prompt_nor_body_occurs_twice() -> None:
    rows = [Body(*pair, str(i)) for i, pair in enumerate(["ax", "ay", "bx", "cz", "cz", "dw"])]
    assert [body.source for body in distinct(rows)] == ["0", "3", "5"]
    assert [body.source for body in distinct(rows, apart_from=[Body("c", "q", ""), Body("r", "w", "")])] == ["0"]


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3; four digits are printed
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_printed(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count) == pytest.approx((low, high), abs=0.00005)
    assert wilson(count - successes, count) == pytest.approx((1 - high, 1 - low), abs=0.00005)


def test_wilson_solves_its_equation() -> None:
    for successes, count in ((0, 7), (3, 7), (200, 300)):
        for p in wilson(successes, count):
            spread = math.sqrt(p * (1 - p) / count)
            assert abs(successes / count - p) == pytest.approx(1.96 * spread, rel=1e-4, abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(InputError, match="3 successes of 2"):
        wilson(3, 2)


def test_mcnemar_is_the_sign_test() -> None:
    before, after = [True] + [False] * 9 + [True] * 50, [False] + [True] * 9 + [True] * 50
    found = change(before, after)
    assert (found.gained, found.lost, found.difference) == (9, 1, 8 / 60)
    assert found.p == 2 * (1 + 10) / 2**10
    assert change(after, before).p == found.p and change(after, before).low == -found.high
    assert change(before, before)[:3] == (0, 0, 0.0) and change(before, before).p == 1.0
    assert change([False] * 300, [True] * 300).p == 2 / 2**300


def test_the_interval_of_a_change_holds_as_often_as_it_says() -> None:
    """Over all outcomes of 30 pairs, each with its probability: it covers the truth in 95 of 100, or nearly."""
    count, gain, loss = 30, 0.3, 0.1
    covered = 0.0
    for b, c in itertools.product(range(count + 1), repeat=2):
        if b + c <= count:
            ways = math.comb(count, b) * math.comb(count - b, c)
            found = change([False] * b + [True] * c + [False] * (count - b - c), [True] * b + [False] * (count - b))
            assert (found.gained, found.lost) == (b, c)
            if found.low <= gain - loss <= found.high:
                covered += ways * gain**b * loss**c * (1 - gain - loss) ** (count - b - c)
    assert 0.94 < covered < 0.97


@pytest.mark.parametrize(("before", "after"), [([True], []), ([], [])])
def test_a_change_needs_the_same_trials(before: list[bool], after: list[bool]) -> None:
    with pytest.raises(InputError, match="the same trials"):
        change(before, after)
