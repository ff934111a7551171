"""Programs with one small mistake: what tests have to notice (mutation analysis: DeMillo, Lipton and Sayward,
Computer 11, 1978).  The mistakes are the usual ones of mutmut and of mutpy."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd}
STUBS = ("None", "0", "1", "-1", "True", "False", "''", "[]", "{}", "()", "args[0] if args else None")
"""What programs return that know nothing of their task; the last one gives back what it is given."""


class Change:
    """One field of one node, and what it becomes."""

    def __init__(self, node: ast.AST, field: str, value: object) -> None:
        self._node, self._field, self._value = node, field, value

    def __call__(self) -> None:
        """Make the change."""
        setattr(self._node, self._field, self._value)


def stubs(entry_point: str) -> list[str]:
    """Return programs that know nothing of their task."""
    return [f"def {entry_point}(*args, **kwargs):\n    return {value}\n" for value in STUBS]


def mutants(source: str, most: int) -> list[str]:
    """Return up to `most` programs that differ from a program in one place, the same ones each time.

    Args:
        source: a program that can be parsed.
        most: programs; of more those whose places have the smallest hashes, so that they come from all of it.
    """
    tree = ast.parse(source)
    plain = ast.unparse(tree)
    found: dict[str, None] = {}
    changes = [(number, choice) for number, node in enumerate(_places(tree))
               for choice in range(len(_changes(node)))]
    for change in sorted(changes, key=lambda pair: hashlib.sha256(f"{pair} {source}".encode()).digest()):
        if len(found) == most:
            break
        if (text := _changed(tree, *change)) != plain:
            found[text] = None
    return list(found)


def _changed(tree: ast.Module, number: int, choice: int) -> str:
    """Return the text of a program with one change at one place."""
    other = copy.deepcopy(tree)
    place = next(node for i, node in enumerate(_places(other)) if i == number)
    _changes(place)[choice]()
    return ast.unparse(ast.fix_missing_locations(other))


def _places(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes inside of functions and classes, but for annotations and docstrings."""
    hidden: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            outside = [*node.decorator_list, *([node.returns] if node.returns else []),
                       *(argument.annotation for argument in ast.walk(node.args)
                         if isinstance(argument, ast.arg) and argument.annotation)]
            hidden |= {id(inner) for part in outside for inner in ast.walk(part)}
        if isinstance(node, ast.AnnAssign):
            hidden |= {id(inner) for inner in ast.walk(node.annotation)}
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            hidden.add(id(node.value))
    for statement in tree.body:
        if not isinstance(statement, (ast.Import, ast.ImportFrom)):
            yield from (node for node in ast.walk(statement) if id(node) not in hidden)


def _changes(node: ast.AST) -> list[Change]:
    """Return what may be changed at a node; each entry changes it in place."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _COMPARISONS:
            return [Change(node, "ops", [_COMPARISONS[type(operator)]()])]
        case ast.BinOp() | ast.AugAssign() if type(node.op) in _OPERATORS:
            return [Change(node, "op", _OPERATORS[type(node.op)]())]
        case ast.BoolOp():
            return [Change(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())]
        case ast.UnaryOp(op=ast.Not()) | ast.UnaryOp(op=ast.USub()):
            return [Change(node, "op", ast.UAdd())] if isinstance(node.op, ast.USub) else [
                Change(node, "operand", ast.UnaryOp(ast.Not(), node.operand))]
        case ast.Constant(value=bool()):
            return [Change(node, "value", not node.value)]
        case ast.Constant(value=int() | float() as number):
            return [Change(node, "value", number + 1), Change(node, "value", number - 1)]
        case ast.Constant(value=str(text)):
            return [Change(node, "value", f"{text}X")]
        case ast.Return(value=ast.expr()):
            return [Change(node, "value", ast.Constant(None))]
        case ast.If() | ast.While() | ast.IfExp():
            return [Change(node, "test", ast.UnaryOp(ast.Not(), node.test))]
    return []
