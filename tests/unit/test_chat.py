"""Chat templates: what they may do, and what a hostile one gets."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
import tracemalloc
from typing import Any

import pytest

from minillm.data import chat, sandbox
from minillm.errors import InputError, TokenizerError

USER = {"role": "user", "content": "Hi"}


def render(template: str, *messages: dict[str, Any], **options: Any) -> str:
    return chat.render(template, list(messages) or [USER], **options)


# What templates of the hub use


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].role }}:{{ messages[0]['content'] }}", "user:Hi"),
        ("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n", "Hi\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': '<é>', 'b': [1, none]} | tojson }}", '{"a": "<é>", "b": [1, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}", '{\n  "a": 2,\n  "b": 1\n}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{% generation %}{% set x = 'in' %}{{ x }}{% endgeneration %}{{ x is defined }}", "inFalse"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f(2) }}", "<a><2>"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x * 3 }}{{ 'x' + 'y' }}", "a1a1a1xy"),
        ("{{ ['a', 'b'] | map('upper') | join(', ') }}{{ ', '.join(['a', 'b']) }}", "A, Ba, b"),
        ("{{ ', '.join(['a', 'b'] | map('upper')) }}", "A, B"),
        ("{{ 'a,b'.split(',') | length }}{{ 'abc'.replace('b', 'xx') }}{{ 'abc' | replace('b', '') }}", "2axxcac"),
        ("{{ '%s-%d' % ('a', 1700000000) }}{{ '%s' | format('b') }}{{ '{}{}'.format(1, 'c') }}", "a-1700000000b1c"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ dict(x=1)['x'] }}", "a11"),
        ("{{ 'a\nb' | indent(2) }}{{ 3.14159 | round(2) }}{{ 7 % 4 }}{{ 2 ** 10 }}", "a\n  b3.1431024"),
        ("{{ messages[::-1][0].content }}{{ [1] + [2] }}{{ 'x' in 'xy' }}{{ (1, 2) }}", "Hi[1, 2]True(1, 2)"),
        (
            "{{ add_generation_prompt }}{{ tools is none }}{{ documents is none }}{{ other is defined }}",
            "TrueTrueTrueFalse",
        ),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
    ],
)
def test_features(template: str, text: str) -> None:
    assert render(template) == text


def test_options_reach_the_template() -> None:
    template = "{{ add_generation_prompt }}{{ tools[0].name }}{{ bos_token }}"
    options = {"add_generation_prompt": False, "tools": [{"name": "f"}], "variables": {"bos_token": "<s>"}}
    assert render(template, **options) == "Falsef<s>"


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": ["a", {"b": 1}]}]
    before = copy.deepcopy(messages)
    for attack in ("messages.append(1)", "messages[0].update(x=1)", "messages[0].content.clear()", "messages.pop()"):
        with pytest.raises(TokenizerError, match="SecurityError"):
            chat.render("{{ " + attack + " }}", messages)
    assert messages == before


def test_what_the_template_refuses_is_the_users_error() -> None:
    with pytest.raises(InputError) as caught:
        render("{{ raise_exception('Roles must\n   alternate!') }}")
    assert str(caught.value) == "the chat template refuses these messages: Roles must alternate!"


@pytest.mark.parametrize("wrong", ["Hi", {"role": "user"}, [{"content": "Hi"}], [{"role": 3}], ["Hi"], [None]])
def test_malformed_messages(wrong: Any) -> None:
    with pytest.raises(InputError, match="messages"):
        chat.render("", wrong)


def test_only_plain_data_goes_in() -> None:
    with pytest.raises(InputError, match=r"messages\[0\]\['content'\]: object is not plain data"):
        render("", {"role": "user", "content": object()})
    with pytest.raises(InputError, match=r"tools\[0\]: function is not plain data"):
        render("", tools=[lambda: None])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", "does not parse: line 2"),
        ("{% include 'x' %}", "fails on these messages"),
        ("{{ messages.x.y }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "the chat template"),
        ("x" * (chat.MAX_TEMPLATE + 1), "are the limit"),
    ],
)
def test_broken_templates_are_one_line(template: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        render(template)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# Escapes


@pytest.mark.parametrize(
    "attack",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "''['__class__']['__mro__']",
        "('' | attr('__class__')).__base__",
        "['__class__'] | map('attr', '__init__') | list",
        "[''] | map(attribute='__class__') | list | first",
        "cycler.__init__.__globals__.os.popen('id').read()",
        "joiner.__init__.__globals__",
        "namespace.__init__.__globals__",
        "self.__init__.__globals__",
        "self._TemplateReference__context",
        "raise_exception.__globals__",
        "strftime_now.__code__",
        "tojson.__globals__",
        "'{0.__class__.__mro__}'.format('')",
        "'{x.__class__}'.format_map({'x': 1})",
        "'%s' % ''.__class__",
        "(range | string).__class__",
        "messages.__class__",
        "messages[0].get.__self__.__class__",
        "namespace(__class__=1)",
        "dict.__subclasses__()",
        "lipsum(1)",
        "(messages | map('attr', 'x')).gi_frame.f_builtins",
        "(messages | map('upper')).gi_code",
    ],
)
def test_escapes_are_refused(attack: str) -> None:
    """Either an error, or the harmless nothing that jinja2 gives for an attribute that it hides."""
    try:
        text = render("{{ " + attack + " }}")
    except TokenizerError:
        return
    assert text in ("", "[Undefined]", "[]"), text


# Cost. Each of these takes hours or tens of GB without the rule it tests.

DOUBLING = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x }}"
BIG = "{% set s = 'a' * 500000 %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ ('a' * 1000000) * 1000000 }}",
        "{{ 1000000000000 * [0] }}",
        "{{ 10 ** (10 ** 8) }}",
        "{{ 2 ** -(10 ** 9) }}",
        DOUBLING.replace("BODY", "ns.x ~ ns.x"),
        DOUBLING.replace("BODY", "ns.x + ns.x"),
        DOUBLING.replace("BODY", "[ns.x, ns.x]"),
        DOUBLING.replace("BODY", "(ns.x, ns.x)"),
        DOUBLING.replace("BODY", "{'a': ns.x, 'b': ns.x}"),
        DOUBLING.replace("BODY", "[ns.x] * 10"),
        DOUBLING.replace("BODY", "'%s%s' % (ns.x, ns.x)"),
        DOUBLING.replace("BODY", "'{0}{0}'.format(ns.x)"),
        DOUBLING.replace("BODY", "ns.x | replace('a', 'aa')"),
        DOUBLING.replace("BODY", "ns.x.replace('a', 'aa')"),
        DOUBLING.replace("BODY", "[ns.x, ns.x] | join"),
        DOUBLING.replace("BODY", "''.join([ns.x, ns.x])"),
        DOUBLING.replace("BODY", "dict(a=ns.x, b=ns.x)"),
        DOUBLING.replace("BODY", "(ns.x | length) ** 2 * 'a'"),
        "{% set ns = namespace(x=3) %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(90) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}",
        "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLING.replace("BODY", "f(ns.x)"),
        BIG + "{{ s.replace('a', s) }}",
        BIG + "{{ s | replace('a', s) }}",
        BIG + "{{ s | replace(new=s, old='a') }}",
        BIG + "{{ s | join(d=s) }}",
        BIG + "{{ s.rsplit(sep='b' + 'a' * 250000) }}",
        BIG + "{{ s.join(s) }}",
        BIG + "{{ s | join(s) }}",
        BIG + "{{ range(100000) | join(s) }}",
        BIG + "{{ s.join(range(9999) | map('string')) }}",
        BIG + "{{ '%(x)s%(x)s%(x)s' % {'x': s} }}",
        BIG + "{{ s.rfind('b' + 'a' * 250000) }}",
        BIG + "{{ s.strip('b' * 250000 ~ 'a') }}",
        BIG + "{{ s | trim('b' * 250000 ~ 'a') }}",
        "{{ {}.fromkeys(range(0, 99999 * (2 ** 61 - 1), 2 ** 61 - 1)) }}",
        BIG + "{{ s.translate({97: s}) }}",
        BIG + "{% for i in range(100) %}{{ s }}{% endfor %}",
        BIG + "{% for i in range(100000) %}{% set t = s + 'b' %}{% endfor %}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a\nb' | indent(1000000000) }}",
        "{{ [[1]] | tojson(indent=1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ 5 | round(-1000000000) }}",
        "{{ (1).to_bytes(10000000000, 'big') }}",
        "{{ '\t'.expandtabs(10 ** 9) }}",
        BIG + "{{ (s | int(base=16)) // (s[:250000] | int(base=16)) }}",
        "{{ (1).from_bytes('a'.encode(), 'big') }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ range(10 ** 12) | list }}",
        "{{ [1, 2] | slice(1000000000) | list }}",
        "{{ [1] | batch(1000000000, 0) | list }}",
        "{{ lipsum(100000000) }}",
    ],
)
def test_nothing_grows_without_bound(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_VALUE", 1 << 20)  # an eighth of the real one, for the test's own speed
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(
            TokenizerError, match=r"SecurityError|OverflowError: Range too big|No filter named|is undefined"
        ):
            render(template, seconds=60)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20  # a few values of 1 Mi characters, four bytes each at most, and the text that came out
    assert time.perf_counter() - start < 20  # about 0.2 s; room for a busy machine


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% set x = 1 %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{{ range(100000) | map('abs') | select('odd') | first }}"
        "{{ range(100000) | map('abs') | select('gt', 9e9) | list }}{% endfor %}",
        "{% set s = 'ab' * 100000 %}{% for a in range(100000) %}{% for c in s %}{% endfor %}{% endfor %}",
    ],
)
def test_a_silent_loop_is_stopped(template: str) -> None:
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match=r"ran for more than 0\.3 seconds"):
        render(template, seconds=0.3)
    assert time.perf_counter() - start < 10


def test_the_trace_function_comes_back() -> None:
    """A debugger or a coverage tool must find its own trace function again, after success and after each failure."""
    before = sys.gettrace()

    def tracer(frame: Any, event: str, argument: Any) -> None:
        return None

    sys.settrace(tracer)
    try:
        for template in (
            "ok",
            "{{ 1 / 0 }}",
            "{{ raise_exception('x') }}",
            "{% for a in range(99999) %}{% endfor %}" * 99,
        ):
            with contextlib.suppress(InputError, TokenizerError):
                render(template, seconds=0.2)
            assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


def test_one_rendering_does_not_spend_the_budget_of_the_next() -> None:
    loop = "{% for i in range(60) %}{% set ns.t = 'a' * 4000000 %}{% endfor %}"
    template = "{% set ns = namespace() %}" + loop + "{{ ns.t | length }}"
    assert [render(template) for _ in range(3)] == ["4000000"] * 3


def test_a_long_honest_chat_is_fast() -> None:
    """A thousand turns of a kilobyte through a template of ordinary work: far from every limit."""
    template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}"
        "{% endif %}{{ '<|' ~ m.role ~ '|>' + (m.content | trim).replace('x', 'y') }}{{ eos }}{% endfor %}"
    )
    turns = [{"role": ("user", "assistant")[i % 2], "content": " word x" * 150} for i in range(1000)]
    start = time.perf_counter()
    assert len(render(template, *turns, variables={"eos": "</s>"})) > 1_000_000
    assert time.perf_counter() - start < chat.SECONDS / 2
