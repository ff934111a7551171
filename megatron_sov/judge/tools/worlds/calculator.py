"""Calculator environment: exact arithmetic within bounds."""

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_sov.judge.tools.environment import ToolRefused, tool
from megatron_sov.judge.tools.worlds.goals import AnsweredWorld

MAX_CHARS, MAX_NODES, MAX_BITS = 1000, 200, 4096
"""Bounds for expression length, syntax nodes, and integer size."""
Number = int | float | Fraction
_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
_UNARY: dict[type[ast.AST], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_NAMES = {"pi": math.pi, "e": math.e}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "min": min, "max": max, "round": round, "sqrt": math.sqrt, "exp": math.exp, "log": math.log,
    "log2": math.log2, "log10": math.log10, "sin": math.sin, "cos": math.cos, "tan": math.tan,
    "asin": math.asin, "acos": math.acos, "atan": math.atan, "floor": math.floor, "ceil": math.ceil,
    "gcd": math.gcd, "factorial": math.factorial, "comb": math.comb}
_MAX_ARGUMENTS = {"factorial": 400, "comb": 1000}
"""Largest argument for fast-growing functions."""
MAX_DIGITS = 300
"""Largest number of digits for rounding."""


@dataclass
class Calculator(AnsweredWorld):
    """Arithmetic tasks with a numeric answer."""

    SYSTEM = 'Use the calculator for arithmetic. End with "The answer is" and the number.'
    EXAMPLES = ({"question": "What is 17 * 23 + 2 ** 10?", "answer": "1415"},
                {"question": "What is 1/3 + 1/6?", "answer": "0.5"})

    relative_tolerance: float = 1e-6
    """Relative tolerance for answers."""

    @tool
    def calculate(self, expression: str) -> str:
        """Work out an arithmetic expression.

        Args:
            expression: numbers, + - * / // % **, brackets, pi, e, and functions such as sqrt, log, sin,
                round, min, max, gcd, factorial, comb.
        """
        return evaluate_expression(expression)


def evaluate_expression(expression: str) -> str:
    """Evaluate an expression; return an integer, a fraction with its decimal value, or a decimal.

    Raises:
        ToolRefused: the expression is invalid, undefined, or out of bounds.
    """
    if len(expression) > MAX_CHARS:
        raise ToolRefused(f"the expression has {len(expression):,} characters, at most {MAX_CHARS:,}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        reason = e.msg if isinstance(e, SyntaxError) else "it cannot be read"
        raise ToolRefused(f"is no arithmetic expression ({reason})") from None
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise ToolRefused(f"the expression has more than {MAX_NODES} parts")
    try:
        return _format_number(_check_bounds(_evaluate_node(tree.body)))
    except ZeroDivisionError:
        raise ToolRefused("divides by zero") from None
    except (ArithmeticError, ValueError, TypeError) as e:
        raise ToolRefused(f"has no value ({e})") from None


def _evaluate_node(node: ast.AST) -> Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _check_bounds(node.value)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _check_bounds(_UNARY[type(node.op)](_evaluate_node(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _apply_operator(node.op, _evaluate_node(node.left), _evaluate_node(node.right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in _FUNCTIONS:
            raise ToolRefused(f"there is no function {node.func.id[:40]!r}; there are "
                              f"{', '.join(_FUNCTIONS)}")
        return _call_function(node.func.id, [_evaluate_node(argument) for argument in node.args])
    raise ToolRefused("only numbers, + - * / // % **, brackets, pi, e and functions are arithmetic")


def _apply_operator(op: ast.operator, left: Number, right: Number) -> Number:
    # Integers divide exactly: 1/3 + 1/6 is 1/2.
    if isinstance(op, ast.Div) and not isinstance(left, float) and not isinstance(right, float):
        return _check_bounds(Fraction(left) / Fraction(right))
    if isinstance(op, ast.Pow) and not isinstance(left, float):
        # Check before computing: 9 ** 9 ** 9 has 369 million digits.
        bits = max(Fraction(left).numerator.bit_length(), Fraction(left).denominator.bit_length())
        if not -MAX_BITS <= right * bits <= MAX_BITS:
            raise ToolRefused(f"a power has more than {MAX_BITS} bits")
    return _check_bounds(_BINARY[type(op)](left, right))


def _call_function(name: str, arguments: list[Number]) -> Number:
    most = _MAX_ARGUMENTS.get(name)
    if most is not None and any(argument > most for argument in arguments):
        raise ToolRefused(f"{name} takes numbers up to {most}")
    if name == "round" and len(arguments) > 1 and not -MAX_DIGITS <= arguments[1] <= MAX_DIGITS:
        raise ToolRefused(f"round takes at most {MAX_DIGITS} digits")
    return _check_bounds(_FUNCTIONS[name](*arguments))


def _check_bounds(value: Any) -> Number:
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolRefused("has no finite value")
    # (-1) ** 0.5 is complex in Python.
    if isinstance(value, complex) or not isinstance(value, Number):
        raise ToolRefused("has no real value")
    if not isinstance(value, float) and max(Fraction(value).numerator.bit_length(),
                                            Fraction(value).denominator.bit_length()) > MAX_BITS:
        raise ToolRefused(f"comes to a number of more than {MAX_BITS} bits")
    return value


def _format_number(value: Number) -> str:
    if isinstance(value, Fraction):
        if value.denominator == 1:
            return str(value.numerator)
        return f"{value} = {value.numerator / value.denominator!r}"
    return str(value) if isinstance(value, int) else repr(value)
