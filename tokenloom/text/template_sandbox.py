"""A Jinja sandbox whose templates cannot run for long or make large values.

Jinja's own sandbox keeps a template from the interpreter but not from burning time: `range` is limited, nested
loops are not, nor is `"x" * 10**9`. Here a template has a number of steps to spend. A turn of a loop, a call, a
filter, a test cost one, and each of them costs more when it reads or makes a long value, before it is made where
it could be much longer than what it is made of. The count depends on the template and its input alone, so a
prompt that renders once renders always.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinMethodType
from typing import Any, cast

from jinja2 import nodes, pass_context, pass_environment, pass_eval_context
from jinja2.environment import Environment
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter, sync_do_join
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, generate_lorem_ipsum
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1 << 21
MAX_CHARS = 1 << 24
_CHARS_A_STEP = 256
_MAX_INT_BITS = 4096
_MAX_INDENT = 64
# No float has more digits before or behind its point.
_MAX_PRECISION = 400
# Where a format string gives widths: behind a "%", behind the colon of a field.
_PERCENT = re.compile(r"%(?:\([^)]*\))?([-+ #0-9.*]*)")
_BRACES = re.compile(r"\{[^{}:]*:([^{}]*)")
# Names of the filters that the sandbox itself puts into templates; no template can spell them.
_TURN = "turn of a loop"
_READ = "read value"
_READ_DEEP = "read value with all that is in it"
# A call takes about as long as this many turns of a loop.
_CALL_STEPS = 8


class _Budget(threading.local):
    """The steps that the template rendered by this thread has left."""

    left: int = MAX_STEPS


_BUDGET = _Budget()


@contextmanager
def limited_steps() -> Iterator[None]:
    """Compile or render one template inside; it has `MAX_STEPS` steps, then raises `SecurityError`."""
    _BUDGET.left = MAX_STEPS
    try:
        yield
    finally:
        _BUDGET.left = MAX_STEPS


def _spend(steps: int) -> None:
    _BUDGET.left -= steps
    if _BUDGET.left < 0:
        raise SecurityError(f"it takes more than {MAX_STEPS} steps")


def _spend_chars(count: int) -> None:
    """For a text of `count` characters."""
    if count > MAX_CHARS:
        raise SecurityError(f"it makes a text of more than {MAX_CHARS} characters")
    _spend(count // _CHARS_A_STEP)


def _spend_value(value: object) -> None:
    if isinstance(value, (str, bytes)):
        _spend_chars(len(value))
    elif isinstance(value, (list, tuple, dict, set, range)):
        _spend(len(value))


def _spend_deep(value: object) -> None:
    """For a value that is compared or written: a step for each value in it, as often as it is there."""
    stack = [value]
    while stack:
        value = stack.pop()
        _spend_value(value)
        if isinstance(value, Namespace):
            value = object.__getattribute__(value, "_Namespace__attrs")
        if isinstance(value, dict):
            stack += value.keys()
            stack += value.values()
        elif isinstance(value, (list, tuple, set)):
            stack += value


def _written(value: Any) -> Any:
    """Jinja passes here what a template puts out."""
    if type(value) is not str:
        _spend_deep(value)
    return value


def _whole(value: object) -> int:
    """A count or width that a template gives; 0 for all that is none."""
    return value if isinstance(value, int) and value > 0 else 0


# What operations cost whose result may be much longer than what they read.


def _spend_replace(text: object, old: object = "", new: object = "", *_: object, **__: object) -> None:
    times = str(text).count(str(old)) if str(old) else len(str(text)) + 1
    _spend_chars(len(str(text)) + times * len(str(new)))


def _spend_format(form: object, *args: object, **kwargs: object) -> None:
    """Every field may be as wide as it says, as an argument says, or as its argument is long."""
    text = str(form)
    values = [*args, *kwargs.values()]
    for value in args:
        values += value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    without_inner = re.sub(r"\{[^{}:]*\}", "", text)
    specifications = [*_PERCENT.findall(text), *_BRACES.findall(text), *_BRACES.findall(without_inner)]
    widths = [int(digits[:12]) for digits in re.findall(r"\d+", " ".join(specifications))]
    if "*" in text or re.search(r"\{[^{}]*\{", text):
        widths += map(_whole, values)
    longest = max((len(value) for value in values if isinstance(value, (str, list, tuple, dict))), default=0)
    _spend_chars(sum(widths) + (text.count("%") + text.count("{")) * longest)


def _spend_translate(text: str, table: object = None, *_: object) -> None:
    entries = table.values() if isinstance(table, Mapping) else ()
    _spend_chars(len(text) * max((len(entry) for entry in entries if isinstance(entry, str)), default=1))


def _spend_tabs(text: str, size: object = 8, *_: object, tabsize: object = 0) -> None:
    _spend_chars(len(text) + text.count("\t") * max(_whole(size), _whole(tabsize)))


def _spend_indent(text: object, width: object = 4, *_: object, **__: object) -> None:
    size = len(width) if isinstance(width, str) else _whole(width)
    _spend_chars((str(text).count("\n") + 1) * size)


def _spend_widths(_: object, *args: object, **kwargs: object) -> None:
    for value in (*args, *kwargs.values()):
        _spend_chars(_whole(value))


def _check_json_indent(_: object, *args: object, **kwargs: object) -> None:
    for value in (*args[1:2], kwargs.get("indent")):
        if (len(value) if isinstance(value, str) else _whole(value)) > _MAX_INDENT:
            raise SecurityError(f"it indents JSON by more than {_MAX_INDENT}")


def _check_precision(_: object, *args: object, **kwargs: object) -> None:
    """Rounding computes ten to the power of the precision, whatever its sign."""
    for value in (*args[:1], kwargs.get("precision")):
        if isinstance(value, int) and abs(value) > _MAX_PRECISION:
            raise SecurityError(f"it rounds to more than {_MAX_PRECISION} digits")


_METHOD_COSTS: Mapping[str, Callable[..., None]] = {
    "replace": _spend_replace,
    "format": _spend_format,
    "format_map": _spend_format,
    "translate": _spend_translate,
    "expandtabs": _spend_tabs,
}
_FILTER_COSTS: Mapping[str, Callable[..., None]] = {
    "replace": _spend_replace,
    "format": _spend_format,
    "indent": _spend_indent,
    "round": _check_precision,
    "tojson": _check_json_indent,
    **dict.fromkeys(("batch", "center", "slice", "truncate", "wordwrap"), _spend_widths),
}


# The filters that look no deeper than into the list that they are given; others write or compare their input.
_SHALLOW = frozenset(
    "abs attr batch count d default first float int items last length list map random reject rejectattr reverse "
    "round select selectattr slice sum".split()
)


def _metered(items: Iterable[Any], separator: object) -> Iterator[str]:
    """The texts of the items to be joined, which are paid for before they are."""
    total = 0
    for item in items:
        text = _written(item) if isinstance(item, str) else str(_written(item))
        total += len(text) + len(str(separator))
        if total > MAX_CHARS:
            _spend_chars(total)
        _spend(1)
        yield text


@pass_eval_context
def _join(context: EvalContext, items: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    """Jinja's `join`, paid for item by item."""
    if attribute is not None:
        items = map(make_attrgetter(context.environment, attribute), items)
    return sync_do_join(context, list(_metered(items, d)), d)


def _lorem_ipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    """Jinja's `lipsum`."""
    _spend(_whole(n) * (_whole(min) + _whole(max) + 1) * _CALL_STEPS)
    return generate_lorem_ipsum(n, html, min, max)


@pass_environment
def _sum(environment: Environment, items: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """Jinja's `sum`; a sum of lists costs the lengths of all its parts."""
    total = start
    for item in items if attribute is None else map(make_attrgetter(environment, attribute), items):
        total = total + item
        _spend(1)
        _spend_value(total)
    return total


def _paid_filter(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, at its cost; it takes what Jinja passes to it first (environment, context) as before."""
    skip = 1 if hasattr(run, "jinja_pass_arg") else 0
    cost = _FILTER_COSTS.get(name)
    read = _spend_value if name in _SHALLOW else _spend_deep

    @functools.wraps(run)
    def paid(*args: Any, **kwargs: Any) -> Any:
        _spend(1)
        for value in args[skip : skip + 1]:
            read(value)
        if cost is not None:
            cost(*args[skip:], **kwargs)
        result = run(*args, **kwargs)
        _spend_value(result)
        return result

    return paid


def _paid_test(run: Callable[..., Any]) -> Callable[..., Any]:
    """The test; all tests of two values compare them."""

    @functools.wraps(run)
    def paid(*args: Any, **kwargs: Any) -> Any:
        _spend(1)
        for value in args[1:]:
            _spend_deep(value)
        return run(*args, **kwargs)

    return paid


@pass_context
def _turn(_: Context, value: Any) -> Any:
    """Jinja does not run filters that read the context before the template is rendered."""
    _spend(1)
    return value


@pass_context
def _read(_: Context, value: Any) -> Any:
    _spend_value(value)
    return value


@pass_context
def _read_deep(_: Context, value: Any) -> Any:
    _spend_deep(value)
    return value


class _Meter(NodeTransformer):
    """Puts the cost of what calls nothing into a template: turns of loops, joined texts, slices, blocks."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        turn = nodes.Filter(nodes.Const(True), _TURN, [], [], None, None, lineno=node.lineno)
        if node.test is None:
            node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        else:  # a turn is one also where the condition leaves the item out
            node.test = nodes.And(turn, node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        node.nodes = [part if isinstance(part, nodes.Const) else self._read_deep(part) for part in node.nodes]
        return self._read(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return self._read(node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Operand:
        self.generic_visit(node)
        if not isinstance(node.expr, nodes.Const):
            node.expr = self._read_deep(node.expr)
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, _READ, [], [], None, None, lineno=node.lineno)
        return node

    @staticmethod
    def _read(node: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, _READ, [], [], None, None, lineno=node.lineno)

    @staticmethod
    def _read_deep(node: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, _READ_DEEP, [], [], None, None, lineno=node.lineno)


class LimitedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a price on everything; compile and render inside `limited_steps()`.

    Add filters and tests before the first template is compiled and call `meter()` behind that.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def meter(self) -> None:
        """Put a price on all filters and tests."""
        self.finalize = _written
        self.globals["lipsum"] = _lorem_ipsum
        self.filters.update({"sum": _sum, "join": _join})
        self.filters.update({name: _paid_filter(name, run) for name, run in self.filters.items()})
        tests = cast("dict[str, Callable[..., Any]]", self.tests)
        tests.update({name: _paid_test(run) for name, run in tests.items()})
        self.filters[_READ_DEEP] = _read_deep
        self.filters[_TURN] = _turn
        self.filters[_READ] = _read

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Meter().visit(tree)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method for a template."""
        _spend(_CALL_STEPS)
        # The sandbox gives templates a function in place of `str.format`.
        method = getattr(__obj, "__wrapped__", __obj)
        if isinstance(method, BuiltinMethodType):
            owner = method.__self__
            if isinstance(owner, str) and method.__name__ == "join" and args:
                args = (list(_metered(args[0], owner)), *args[1:])
            elif isinstance(owner, (str, bytes, int)):
                _spend_deep(args)
                _METHOD_COSTS.get(method.__name__, _spend_widths)(owner, *args, **kwargs)
            (_spend_deep if method.__name__ in ("index", "count") else _spend_value)(owner)
        result = super().call(__context, __obj, *args, **kwargs)
        _spend_value(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute one of `intercepted_binops` for a template."""
        if operator == "%" and isinstance(left, str):
            _spend_deep(right)
            _spend_format(left, right)
        elif operator in ("*", "**"):
            _spend_product(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        _spend_value(result)
        return result


def _spend_product(operator: str, left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if operator == "**":
            bits = left.bit_length() * max(right, 1)
        if bits > _MAX_INT_BITS:
            raise SecurityError(f"it makes a number of more than {_MAX_INT_BITS} bits")
    for repeated, times in ((left, right), (right, left)):
        if isinstance(repeated, (str, bytes)):
            _spend_chars(len(repeated) * _whole(times))
        elif isinstance(repeated, (list, tuple)):
            _spend(len(repeated) * _whole(times))
