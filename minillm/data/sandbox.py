"""Jinja2 for templates that a stranger wrote: nothing escapes, nothing grows without bound, nothing runs for ever.

A chat template arrives with a checkpoint and is a program. Jinja2's immutable sandbox keeps it from Python's internals
and from changing what it is given. What it does not do is limit cost, and a cost can hide in one C call that no clock
interrupts (`"a" * 10**10`). So three rules hold together:

1. *No value is large.* A value's weight is the number of characters it would print. Whatever can make a larger value
   out of smaller ones (operators, `~`, list literals, captured blocks, calls, filters) is weighed; more than
   `MAX_VALUE`, or more than `MAX_TOTAL` in one rendering, is refused. Where one step multiplies, it is weighed before.
2. *What cannot be bounded cheaply is not there*: padding methods, `translate`, filters that run regular expressions,
   numbers of thousands of digits.
3. *Everything else runs through Python lines*, and a trace function looks at the clock on each of them, so that a loop
   that emits nothing stops as well.

Source: jinja.palletsprojects.com/sandbox ("Security Considerations" leaves resource limits to the caller).
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Sequence, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import FrameType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_VALUE = 1 << 23  # characters; a million tokens of text are about half as many
MAX_TOTAL = 1 << 28  # characters; every message may pass through dozens of filters
MAX_BITS = 1 << 12  # dividing large numbers is quadratic
MAX_NARROW = 1000
NODE = 32  # bytes that any object costs; it also bounds the time that weighing takes
REFUSED_METHODS = frozenset(
    "center decode encode expandtabs format_map from_bytes ljust rjust to_bytes translate zfill".split()
)
PRODUCT_METHODS = frozenset("lstrip rfind rindex rpartition rsplit rstrip strip".split())  # receiver times argument
DROPPED_FILTERS = "batch center lipsum pprint random slice striptags sum urlize wordwrap xmlattr".split()
NARROW_FILTERS = frozenset("indent round trim truncate".split())  # their arguments are widths
_WIDE_SPEC = re.compile(r"%[^%a-zA-Z]*(\*|\d{4})|:[^{}]*(\{|\d{4})")

_made: ContextVar[list[int]] = ContextVar("characters made by this rendering")


class Timeout(BaseException):
    """Not an `Exception`: nothing between the clock and `limited` may swallow it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Run the body with a wall-clock limit and an empty account of characters; raises `Timeout`.

    The clock is a trace function on this thread; the one that was there (a debugger's) comes back afterwards.
    """
    end, before = time.monotonic() + seconds, sys.gettrace()

    def look_at_clock(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if time.monotonic() > end:
            raise Timeout
        # the bookkeeping below is bounded, and ten times slower if each of its lines is looked at
        return None if frame.f_code.co_filename == __file__ else look_at_clock

    token = _made.set([0])
    sys.settrace(look_at_clock)
    try:
        yield
    finally:
        sys.settrace(before)
        _made.reset(token)


def weight(value: Any) -> int:
    """Characters that `value` would print, about, and `NODE` for each object; stops counting above `MAX_VALUE`.

    >>> weight("abc") < weight(["abc", "abc"]) < weight([["abc", "abc"]] * 2)
    True
    """
    total, stack = 0, [value]
    while stack and total <= MAX_VALUE:
        item = stack.pop()
        total += NODE
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 3 if item.bit_length() <= MAX_BITS else MAX_VALUE
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
            stack.extend(item)
    return total


def keep(value: Any) -> Any:
    """`value`, once it has been weighed and found light enough."""
    size = weight(value)
    account = _made.get(None) or [0]
    account[0] += size
    if size > MAX_VALUE or account[0] > MAX_TOTAL:
        raise SecurityError(f"makes a value of more than {min(size, MAX_VALUE)} characters")
    return value


def refuse_if(condition: bool, what: str) -> None:
    """Raise jinja2's `SecurityError`, whose text says `what` is not allowed, where `condition` holds."""
    if condition:
        raise SecurityError(f"{what} is not allowed in a chat template")


class WeighingCodeGenerator(CodeGenerator):
    """Compiles list, tuple and dict literals and `~` so that their result is weighed."""

    def _weigh(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.keep(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._weigh(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._weigh(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._weigh(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(environment.keep([")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("]))")


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote; rendering leaves the text as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class TemplateNamespace(Namespace):
    """`namespace(...)` without underscored names, and printing as nothing of its content."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # jinja2's signature: a template may name one `self`
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        refuse_if(str(name).startswith("_"), f"an attribute named {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of the three rules; see the module's docstring."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = WeighingCodeGenerator

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
        self.keep = keep
        self.concat = concat  # type: ignore[assignment]
        for name in DROPPED_FILTERS:
            self.filters.pop(name, None)
        self.filters = {name: weighed(name, function) for name, function in self.filters.items()}
        self.globals.pop("lipsum")
        self.globals.update(dict=_dict, namespace=TemplateNamespace)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _CHECKS[operator](left, right)
        return keep(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # jinja2's own spelling: a template may pass a keyword named `self`
        method = getattr(__obj, "__wrapped__", __obj)
        receiver, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        refuse_if(name == "fromkeys", "`fromkeys`")  # equal hashes make a dict quadratic, inside one call
        if isinstance(receiver, (str, bytes, int)):
            if name == "join":
                args = tuple(list(items) for items in args)  # a generator can be looked at only once
            check_method(receiver, name, [*args, *kwargs.values()])
        return keep(super().call(__context, __obj, *args, **kwargs))


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def concat(parts: Sequence[Any]) -> str:
    """Join the pieces of a captured block, of a macro, or of `~`."""
    return str(keep(str_join(keep(list(parts)))))


def weighed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks its arguments and weighs its result."""

    @wraps(function)  # keeps jinja2's marks for filters that want the context or the environment
    def checked(*args: Any, **kwargs: Any) -> Any:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0
        value, rest = args[first], args[first + 1 :]
        if name in NARROW_FILTERS:
            _check_narrow(name, [*rest, *kwargs.values()])
        elif name == "replace":
            named = {**dict(zip(("old", "new"), rest, strict=False)), **kwargs}
            check_method(str(value), name, [str(named.get("old", "")), str(named.get("new", ""))])
        elif name == "format":
            check_format(str(value), [rest, kwargs])
        elif name == "join":
            value = value if isinstance(value, (str, list, tuple, dict)) else list(value)
            args = (*args[:first], value, *rest)
            separator = rest[0] if rest else kwargs.get("d", "")
            refuse_if(len(str(separator)) * len(value) > MAX_VALUE, "a join this long")
        return keep(function(*args, **kwargs))

    return checked


def check_method(receiver: str | bytes | int, name: str, args: Sequence[Any]) -> None:
    """Refuse a method call that could cost far more than its arguments weigh."""
    refuse_if(name in REFUSED_METHODS, f"the method `{name}`")
    if isinstance(receiver, int):
        return
    if name in PRODUCT_METHODS and args:
        refuse_if(weight(args[0]) > MAX_NARROW, f"a `{name}` with something this long")
    elif name == "replace" and len(args) >= 2:
        places = len(receiver) // max(1, len(args[0])) + 1
        refuse_if(places * len(args[1]) > MAX_VALUE, "a `replace` that makes this much")
    elif name == "join" and args:
        refuse_if(weight(args[0]) + len(receiver) * len(args[0]) > MAX_VALUE, "a `join` this long")
    elif name == "format":
        check_format(str(receiver), args)


def check_format(pattern: str, values: Any) -> None:
    """Refuse `%` and `format` patterns that pad widely or repeat a long value; a width may not come from a value."""
    refuse_if(_WIDE_SPEC.search(pattern) is not None, "a format this wide")
    places = pattern.count("%") + pattern.count("{")
    refuse_if(places * weight(values) > MAX_VALUE, "a format that makes this much")


def _check_narrow(name: str, values: list[Any]) -> None:
    for value in values:
        if isinstance(value, (int, float)):
            refuse_if(abs(value) > MAX_NARROW, f"`{name}` with {value}")
        else:
            refuse_if(weight(value) > MAX_NARROW, f"`{name}` with something this long")


def _check_times(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        refuse_if(left.bit_length() + right.bit_length() > MAX_BITS, "a number this large")
        return
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int):
            size = len(value) if isinstance(value, (str, bytes)) else weight(value)
            refuse_if(size * max(0, times) > MAX_VALUE, "a repetition this long")


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        refuse_if(left.bit_length() * abs(right) > MAX_BITS, "a number this large")


def _check_plus(left: Any, right: Any) -> None:
    refuse_if(weight(left) + weight(right) > MAX_VALUE, "a sum this long")


def _check_percent(left: Any, right: Any) -> None:
    if isinstance(left, (str, bytes)):
        check_format(left if isinstance(left, str) else left.decode("latin-1"), right)


_CHECKS = {"+": _check_plus, "*": _check_times, "**": _check_power, "%": _check_percent}
