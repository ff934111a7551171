"""What models write as code, read: tasks with the function that they ask for, assertions, programs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

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
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                 [node.module or "."] if isinstance(node, ast.ImportFrom) else [])
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
    """Return the names that a statement gives to functions and values."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
