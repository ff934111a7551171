"""Values that a world's steps compute: a small language over rows and arguments, in Python's spelling.

It is read by Python's parser and worked out here, node by node: nothing in it can name what it was not given,
and no value grows beyond the bounds.
"""

from __future__ import annotations

import ast
import datetime
import math
import operator
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from megatron_sov.judge.tools.environment import ToolFault

MAX_CHARS, MAX_NODES = 600, 150
"""Of an expression, and of its parts."""
MAX_NUMBER, MAX_TEXT_CHARS, MAX_ITEMS, MAX_PARTS = 10 ** 15, 10_000, 5_000, 200_000
"""Of a value; `MAX_PARTS`: of lists within lists, each as often as it stands there."""
CONSTANTS = {"true": True, "false": False, "null": None}
"""JSON's names, beside Python's own."""
Columns = Mapping[str, Set[str] | None]
"""Name that an expression may use -> columns of the row, or the rows, that it is; None: it is no row."""
_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
_ORDER: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
_SAME: dict[type[ast.AST], bool] = {ast.Eq: True, ast.NotEq: False}
_HELD: dict[type[ast.AST], bool] = {ast.In: True, ast.NotIn: False}
_PARTS = (ast.Constant, ast.Name, ast.Attribute, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add,
          ast.BoolOp, ast.And, ast.Or, ast.Compare, ast.IfExp, ast.Call, ast.List, ast.Dict, ast.Load,
          *_ARITHMETIC, *_ORDER, *_SAME, *_HELD)
MAX_PROBLEMS = 40
"""Told of one world; more of them say no more."""


@dataclass(frozen=True)
class Expression:
    """One that is sound as far as can be seen without values."""

    text: str
    """As it was written."""
    tree: ast.expr
    """Of it."""

    @property
    def names(self) -> frozenset[str]:
        nodes = list(ast.walk(self.tree))
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        return frozenset(node.id for node in nodes if isinstance(node, ast.Name)
                         and node.id not in CONSTANTS and id(node) not in called)


def read(text: Any, columns: Columns, where: str, problems: Problems) -> Expression:
    """Return an expression; what is wrong with it is noted, and it then stands for null.

    Args:
        text: of it; a number, true, false or null stands for itself.
        columns: what it may name.
        where: the place, for problems.
        problems: is told.
    """
    if text is None or isinstance(text, (bool, int, float)):
        return Expression(str(text), ast.Constant(text))
    # reading goes on behind a problem, so that all problems are told at once
    none = Expression(str(text)[:MAX_CHARS], ast.Constant(None))
    if not isinstance(text, str) or len(text) > MAX_CHARS:
        problems.add(where, f"{quote(text)} must be an expression of at most {MAX_CHARS} characters")
        return none
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        problems.add(where, f"{quote(text)} is no expression; a text stands in quotes: \"'open'\"")
        return none
    nodes = list(ast.walk(tree))
    if len(nodes) > MAX_NODES:
        problems.add(where, f"{quote(text)} has more than {MAX_NODES} parts")
        return none
    before = len(problems.told)
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if id(node) not in called and (wrong := _wrong(node, columns)):
            problems.add(where, f"{quote(text)}: {wrong}")
    return Expression(text, tree) if len(problems.told) == before else none


def _wrong(node: ast.AST, columns: Columns) -> str:
    """Return why a part may not stand in an expression; empty: it may."""
    # a list of what is allowed: a new part of Python's grammar stays outside
    if not isinstance(node, _PARTS):
        return f"{type(node).__name__} is not in the language"
    if isinstance(node, ast.Constant) and not (node.value is None
                                               or isinstance(node.value, (bool, int, float, str))):
        return "only texts, numbers, true, false and null are constants"
    # 1e999 is read as infinity
    if isinstance(node, ast.Constant) and isinstance(node.value, float) and not math.isfinite(node.value):
        return "a number is too large"
    if isinstance(node, ast.Name) and node.id not in CONSTANTS and node.id not in columns:
        return (f"there is no {node.id[:40]!r}; there are {', '.join(columns) or 'no names'}; a text stands "
                f"in quotes: \"'{node.id[:40]}'\"")
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        known = columns.get(node.value.id)
        if known is not None and node.attr not in known:
            return f"{node.value.id} has no column {node.attr[:40]!r}; it has {', '.join(sorted(known))}"
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in FUNCTIONS or node.keywords:
            return f"there is no such function; there are {', '.join(FUNCTIONS)}"
        if len(node.args) not in FUNCTIONS[name][1]:
            return f"{name} takes {' or '.join(map(str, FUNCTIONS[name][1]))} values"
    if isinstance(node, ast.Dict) and not all(isinstance(key, ast.Constant) and isinstance(key.value, str)
                                              for key in node.keys):
        return "the keys of an object are texts in quotes"
    return ""


def value_of(expression: Expression, scope: Mapping[str, Any]) -> Any:
    """Return what an expression comes to.

    Raises:
        ToolFault: `failed`: it has no value for what it was given, or one beyond the bounds.
    """
    try:
        return _within(_value(expression.tree, scope))
    except _NoValue as e:
        raise ToolFault("failed", f"failed ({quote(expression.text)}: {e})") from None
    except RecursionError:
        raise ToolFault("failed", f"failed ({quote(expression.text)} is nested too deep)") from None
    except (ArithmeticError, ValueError):  # JSON's whole numbers have no bounds, and come as arguments
        raise ToolFault("failed", f"failed ({quote(expression.text)}: a number passes {MAX_NUMBER:.0e})"
                        ) from None


class _NoValue(Exception):
    """Why there is none."""


def _value(node: ast.AST, scope: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return CONSTANTS[node.id] if node.id in CONSTANTS else scope[node.id]
    if isinstance(node, ast.Attribute):
        return _column(_value(node.value, scope), node.attr)
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, scope)
        return not _truth(inner) if isinstance(node.op, ast.Not) else -_number(inner)
    if isinstance(node, ast.BoolOp):
        wanted = isinstance(node.op, ast.Or)
        # like Python, parts behind the deciding one are not worked out
        return wanted if any(_truth(_value(part, scope)) is wanted for part in node.values) else not wanted
    if isinstance(node, ast.IfExp):
        return _value(node.body if _truth(_value(node.test, scope)) else node.orelse, scope)
    if isinstance(node, ast.Compare):
        values = [_value(part, scope) for part in (node.left, *node.comparators)]
        return all(_compared(op, left, right)
                   for op, left, right in zip(node.ops, values, values[1:], strict=False))
    if isinstance(node, ast.BinOp):
        return _bounded(_binary(node.op, _value(node.left, scope), _value(node.right, scope)))
    if isinstance(node, ast.List):
        return _bounded([_value(part, scope) for part in node.elts])
    if isinstance(node, ast.Dict):
        return {key.value: _value(part, scope) for key, part in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)}
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name), ast.dump(node)
    return _bounded(FUNCTIONS[node.func.id][0](*[_value(part, scope) for part in node.args]))


def _column(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_column(row, name) for row in value]
    if not isinstance(value, dict) or name not in value:
        raise _NoValue(f"there is no {name!r} in {_kind(value)}")
    return value[name]


def _binary(op: ast.operator, left: Any, right: Any) -> Any:
    # + joins texts or lists; a text and a number is a fault
    if isinstance(op, ast.Add) and any(
            isinstance(left, kind) and isinstance(right, kind) for kind in (str, list)):
        return left + right
    try:
        return (operator.add if isinstance(op, ast.Add) else _ARITHMETIC[type(op)])(
            _number(left), _number(right))
    except (ArithmeticError, OverflowError):
        raise _NoValue("it divides by zero, or is too large") from None


def _compared(op: ast.cmpop, left: Any, right: Any) -> bool:
    if type(op) in _SAME:
        return same(left, right) is _SAME[type(op)]
    if type(op) in _HELD:
        if isinstance(right, list):
            return any(same(left, part) for part in right) is _HELD[type(op)]
        if isinstance(right, str) and isinstance(left, str):
            return (left in right) is _HELD[type(op)]
        raise _NoValue(f"nothing is `in` {_kind(right)}")
    if not (isinstance(left, str) and isinstance(right, str)):
        left, right = _number(left), _number(right)
    return _ORDER[type(op)](left, right)


def same(left: Any, right: Any) -> bool:
    """Return whether two JSON values are the same; true is no 1, and 1 is 1.0."""
    # for Python true equals 1
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _NoValue(f"{_kind(value)} is neither true nor false")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _NoValue(f"{_kind(value)} is no number")
    return value


def _numbers(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _NoValue(f"{_kind(value)} is no list of numbers")
    return [_number(part) for part in value]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _NoValue(f"{_kind(value)} is no text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _NoValue(f"{_kind(value)} is no list")
    return value


def _first(values: Any) -> Any:
    return found[0] if (found := _list(values)) else None


def _least(values: Any) -> Any:
    return min(found) if (found := _numbers(values)) else None


def _most(values: Any) -> Any:
    return max(found) if (found := _numbers(values)) else None


def _written(value: Any) -> str:
    if isinstance(value, (bool, dict, list)) or value is None:
        raise _NoValue(f"{_kind(value)} is not written into a text")
    return str(value)


def _contains(text: Any, part: Any) -> bool:
    return _text(part).casefold() in _text(text).casefold()


def _days(first: Any, last: Any) -> int:
    return (_day(last) - _day(first)).days


def _day(value: Any) -> datetime.date:
    try:
        found = datetime.date.fromisoformat(_text(value))
    except ValueError:
        raise _NoValue(f"{quote(value)} is no day written YYYY-MM-DD") from None
    # fromisoformat takes 20260510 too, and days are compared as texts
    if found.isoformat() != value:
        raise _NoValue(f"{quote(value)} is no day written YYYY-MM-DD")
    return found


def _is_day(value: Any) -> bool:
    try:
        return bool(_day(value))
    except _NoValue:
        return False


def _rounded(value: Any, digits: Any = 0) -> Any:
    if not isinstance(digits, int) or not 0 <= digits <= 10:
        raise _NoValue("a number is rounded to 0 to 10 digits")
    return round(_number(value), digits) if digits else round(_number(value))


def _kind(value: Any) -> str:
    return {str: "a text", bool: "a yes or no", int: "a number", float: "a number", list: "a list",
            dict: "a row", type(None): "null"}.get(type(value), type(value).__name__)


def _bounded(value: Any) -> Any:
    if (isinstance(value, float) and not math.isfinite(value)) or (
            isinstance(value, (int, float)) and abs(value) > MAX_NUMBER):
        raise _NoValue(f"a number passes {MAX_NUMBER:.0e}")
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARS:
        raise _NoValue(f"a text passes {MAX_TEXT_CHARS:,} characters")
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        raise _NoValue(f"a list passes {MAX_ITEMS:,} values")
    return value


def _within(value: Any) -> Any:
    """Return a value; lists of one list, and lists of those, are small until they are written out."""
    # by a list of what is left, not by recursion: values may be nested deep
    waiting, num_parts = [value], 0
    while waiting:
        part = waiting.pop()
        if isinstance(part, (list, dict)):
            num_parts += len(part)
            if num_parts > MAX_PARTS:
                raise _NoValue(f"it has more than {MAX_PARTS:,} parts")
            waiting += part.values() if isinstance(part, dict) else part
    return value


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "count": (lambda rows: len(_list(rows)), (1,)), "sum": (lambda found: sum(_numbers(found)), (1,)),
    "first": (_first, (1,)), "min": (_least, (1,)), "max": (_most, (1,)),
    "abs": (lambda value: abs(_number(value)), (1,)),
    "round": (_rounded, (1, 2)), "text": (_written, (1,)),
    "lower": (lambda value: _text(value).casefold(), (1,)), "length": (lambda value: len(_text(value)), (1,)),
    "contains": (_contains, (2,)), "days": (_days, (2,)), "is_day": (_is_day, (1,)),
}
"""Name -> function, and how many values it takes."""


class Problems:
    """Sentences, each with the place that it is about."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def add(self, where: str, what: str) -> None:
        """Note one, unless there are `MAX_PROBLEMS`."""
        if len(self.told) < MAX_PROBLEMS:
            self.told.append(f"{where}: {what}")


def quote(value: object) -> str:
    """Return a value as a sentence may hold it."""
    return repr(str(value)[:60])
