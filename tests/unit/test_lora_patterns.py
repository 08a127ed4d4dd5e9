"""Patterns of targets: what `re` finds, found without going back, and in no time."""

from __future__ import annotations

import random
import re
import time

import pytest

from minillm.errors import InputError
from minillm.lora.patterns import compiled

UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj)))"
)
NAMES = [
    *(f"model.layers.{n}.self_attn.{name}_proj" for n in (0, 1, 10) for name in "qkvo"),
    "transformer.h.0.self_attention.query_key_value", "model.language_model.layers.0.mlp.up_proj", "lm_head",
    "a+", "aa",
]  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.[0-9]+\.(q|k)_proj", r".*\.layers\.1\.self_attn\.(q|k)_proj", "(?:ab)*", "[(+]+", r"\(a+\)+",
        "(a+)b", "^(?!.*vision).*q.*", UNSLOTH, r"(?i)LM_HEAD", "(?#all).*", r"[]a+]{2}", r"a\+", "a{1}.|a{,2}", "x{",
        r".*(?<!self_attn\.)[a-z]+_proj", r".*(?<=\.self_attn\.)[^o]_proj$", r".*\b0\b.*", r"\x61\Ba", "(?P<x>a)+",
        "|a+", r"(?=.*head)\w+\Z", r".*\.\d{2}\..*", "",
    ],
)  # fmt: skip
def test_as_re_does(pattern: str) -> None:
    found = [compiled(pattern).matches(name) for name in NAMES]
    assert found == [re.fullmatch(pattern, name) is not None for name in NAMES]


def expression(draw: random.Random, depth: int) -> str:
    """A pattern of random parts."""
    atoms = ["a", "b", ".", "[ab]", "[^a]", r"\.", r"\w", r"\d", "1", "[a-c1]", r"\b", "^", "$", "[]a]", r"\B", r"\+"]
    kind = draw.random() if depth else 0
    if kind < 0.3:
        return draw.choice(atoms)
    inner = expression(draw, depth - 1)
    if kind < 0.55:
        return inner + expression(draw, depth - 1)
    if kind < 0.7:
        return f"({inner}|{expression(draw, depth - 1)})"
    if kind < 0.9:
        return f"(?:{inner})" + draw.choice(["*", "+", "?", "{2}", "{1,2}", "{,2}", "*?", "+?", "??", "{,}"])
    return draw.choice(["(?=", "(?!"]) + inner + ")" if kind < 0.96 else f"(?<{draw.choice('!=')}{draw.choice('ab.')})"


def test_random_patterns_as_re_does() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(3000):
        pattern = expression(draw, draw.randrange(1, 5))
        for _ in range(4):
            name = "".join(draw.choice("aab.1+") for _ in range(draw.randrange(1, 8)))
            expected = re.fullmatch(pattern, name) is not None
            assert compiled(pattern).matches(name) == expected, (pattern, name)
            hits += expected
    assert hits > 500


@pytest.mark.parametrize(
    "pattern",
    [
        "(a*)+", "((ab)+c)*x", "(a|a)*b", "(a|ab)*c", "(?:.|..)*x", "(.?){40}x", ".?" * 60 + "x", ".*" * 60 + "x",
        "(a|a)" * 30 + "b", "(.|.)" * 30 + "x", "(a|b{2,})*x", "(?=(a+)+b)a*", "(?!(a|a)*b)b", r"(\w+\.)*q",
        "(" * 40 + "a*" + ")*" * 40 + "b", "(a{1,30}){1,30}b", "a{1000000}{", "(a?){65535}b", "(?:(?=.*.*x)(?!.*b).)*b",
    ],
)  # fmt: skip
def test_no_pattern_takes_long(pattern: str) -> None:
    begin = time.perf_counter()
    compiled(pattern).matches("a" * 30)
    compiled(pattern).matches("model.layers.10.self_attn.q_proj")
    assert time.perf_counter() - begin < 1  # some milliseconds; `re` takes minutes for most of these


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "is no regular expression"),
        ("a{99999999999}", "is no regular expression"),
        ("x" * 5000, "has 5000 characters"),
        (".*" * 100, "has 100 repetitions"),
        ("(" * 60 + "a" + ")" * 60, "nests 60 groups"),
        (r"(a)\1", r"uses '\\\\1'"),
        (r"(?P<x>a)(?P=x)", r"uses '\(\?P=x\)'"),
        ("(a)?(?(1)b|c)", r"uses '\(\?\('"),
        ("(?x) a b", r"uses '\(\?x\)'"),
        ("(?i:a)", r"uses '\(\?i:'"),
    ],
)
def test_patterns_that_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        compiled(pattern)
