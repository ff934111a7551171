"""Programs as texts: tasks, assertions and programs read from what models write, and programs with one small
mistake, which tests have to notice.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

# Mutation analysis: DeMillo, Lipton and Sayward, Computer 11, 1978. The mistakes are the usual ones of mutmut
# and of mutpy.

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
        setattr(self._node, self._field, self._value)


def stubs(entry_point: str) -> list[str]:
    return [f"def {entry_point}(*args, **kwargs):\n    return {value}\n" for value in STUBS]


def mutants(source: str, most: int) -> list[str]:
    """Return up to `most` programs that differ from a program in one place, the same ones each time.

    Args:
        source: a program that can be parsed.
        most: programs; of more those whose places have the smallest hashes, so that they come from all of it.
    """
    tree = ast.parse(source)
    # texts are compared, since a change of a node may leave the text as it is
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
    other = copy.deepcopy(tree)
    # the copy has its nodes in the same order, so a number finds the same place
    place = next(node for i, node in enumerate(_places(other)) if i == number)
    _changes(place)[choice]()
    return ast.unparse(ast.fix_missing_locations(other))


def _places(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes inside of functions and classes, but for annotations and docstrings."""
    # no test of results can notice a change in annotations, decorators or docstrings
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


# What models write as code, read: nothing here is run.

MODULES = frozenset((
    "__future__", "abc", "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal",
    "enum", "fractions", "functools", "heapq", "itertools", "json", "math", "numbers", "operator", "re",
    "statistics", "string", "textwrap", "typing", "unicodedata"))
"""What a program may import: no door to files, processes, networks, clocks or chance."""
_CLOCKS = frozenset(("now", "today", "utcnow"))
_REFUSED_NAMES = frozenset((
    "open", "input", "exec", "eval", "compile", "breakpoint", "exit", "quit", "globals", "locals", "vars",
    "help", "__import__", "__builtins__", "__loader__", "print_exc"))
_REFUSED_ATTRIBUTES = frozenset((
    "__subclasses__", "__globals__", "__builtins__", "__code__", "__loader__", "__bases__", "__mro__",
    "__closure__", "__import__", "f_back", "f_globals", "gi_frame"))
_FENCED = re.compile(r"^[ \t]*```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^[ \t]*```[ \t]*$",
                     re.DOTALL | re.MULTILINE | re.IGNORECASE)
MAX_CHARS = 20_000
"""Of a task or a program."""
MAX_LEVELS = 100
"""Of a program's tree."""
MAX_TEST_CHARS = 2_000
"""Of one assertion; a longer one is data and not a test."""


@dataclass(frozen=True)
class CodeTask:
    """What is asked."""

    text: str
    """For people and models."""
    entry_point: str
    """Name of the function."""


def read_task(text: str, entry_point: str = "") -> CodeTask | str:
    """Return the task of a text, or why it is none.

    Args:
        text: with a block of Python that holds the function's first line.
        entry_point: name of the function; empty: the only one of the last block.
    """
    text = text.strip()
    if not text or len(text) > MAX_CHARS:
        return f"has {len(text):,} characters"
    blocks = _FENCED.findall(text)
    for block in reversed(blocks):
        # a head without a body is no program until it gets a `pass`
        tree = parsed(block) or parsed(f"{block.rstrip()}\n    pass\n")
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)] if tree else []
        if entry_point:
            functions = [node for node in functions if node.name == entry_point]
        if len(functions) == 1:
            if says_more_than_its_head(functions[0]):
                return "its block holds the program as well"
            return CodeTask(text, functions[0].name)
    return "has no block of Python with the first line of its function alone"


def says_more_than_its_head(function: ast.FunctionDef) -> bool:
    """Return whether a function has a body besides a docstring, `pass` and `...`."""
    return any(not isinstance(node, ast.Pass) and not (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in function.body)


def parsed(source: str) -> ast.Module | None:
    """Return the tree of a program; None: it is none, or one so deep that Python cannot walk it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    # unparsing and copying recurse: a deep tree would end them, far from here
    level: list[ast.AST] = [tree]
    for _ in range(MAX_LEVELS):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return tree
    return None


def assertions(text: str, entry_point: str) -> Iterator[str]:
    """Yield the assertions of a reply's blocks that call a function, as Python writes them, each once.

    What else stands there (imports, functions, loops) is passed over: an assertion stands for itself.
    """
    seen: set[str] = set()
    for block in _FENCED.findall(text):
        for node in _statements(block):
            if not isinstance(node, ast.Assert) or not _calls(node.test, entry_point) or _is_loose(node):
                continue
            # without its message: equal tests with other messages are one
            said = ast.unparse(ast.Assert(node.test, None))
            if said not in seen and len(said) <= MAX_TEST_CHARS:
                seen.add(said)
                yield said


def _statements(block: str) -> Iterator[ast.stmt]:
    """Yield the statements of a block; where it is no program as a whole, of those lines that are one."""
    tree = parsed(block)
    if tree is not None:
        yield from tree.body
        return
    for line in block.split("\n"):
        tree = parsed(line.strip())
        if tree is not None:
            yield from tree.body


def _calls(test: ast.expr, entry_point: str) -> bool:
    return any(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == entry_point
               for node in ast.walk(test))


def _is_loose(node: ast.Assert) -> bool:
    """Return whether an assertion holds for every answer: a tuple that is never empty, `... or True`."""
    return isinstance(node.test, (ast.Tuple, ast.List, ast.Dict, ast.JoinedStr)) or any(
        isinstance(part, ast.BoolOp) and isinstance(part.op, ast.Or) and any(
            isinstance(value, ast.Constant) and value.value for value in part.values)
        for part in ast.walk(node))


def reaches_out(source: str) -> str:
    """Return what a program reaches for beside its arguments; empty: nothing.

    That is for clean data: what keeps a program in is the sandbox.
    """
    tree = parsed(source)
    if tree is None:
        return "is no Python"
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        if other := [name for name in names if name.partition(".")[0] not in MODULES]:
            return f"imports {other[0]}"
        if isinstance(node, ast.ImportFrom) and node.level:
            return "imports a file beside it"
        if isinstance(node, ast.Name) and node.id in _REFUSED_NAMES:
            return f"uses {node.id}"
        if isinstance(node, ast.Attribute) and node.attr in _REFUSED_ATTRIBUTES | _CLOCKS:
            return f"uses {node.attr}"
    return ""


def defines(source: str, entry_point: str) -> bool:
    """Return whether a program has the function at its top."""
    tree = parsed(source)
    return tree is not None and any(entry_point in _names(node) for node in tree.body)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
