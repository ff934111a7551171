"""A response's program: the fenced block that is run."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Collection, Iterator

from megatron_sov.chat.tool_calls import parse_turn

# possessive quantifiers: a line of many blanks or backticks must not take quadratic time
_FENCE = re.compile(r"([ \t]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++)?+)(`{3,}+|~{3,}+)[ \t]*+([^`]*)")
_LANGUAGE = re.compile(r"[{.]*(\w*)")
_PYTHON = ("python", "py", "python3")
_CLOSING_INDENT = 4
"""Blanks by which a closing fence is indented less than this beyond its opening fence (CommonMark 0.31, 4.5):
a fence deeper inside is a line of a docstring."""


def extract_program(response: str, names: Collection[str] | None = None) -> str:
    """Return a response's program, outside of its thoughts.

    Blocks marked as Python come first, then blocks without a language. Of those that Python can parse, the
    last block that defines the most of `names` is the program. Without any block the whole text is.

    Args:
        response: the text of a model.
        names: what tests take from the program; empty: one function of any name; None: nothing, because the
            program reads and prints.
    """
    content = parse_turn(response).content
    blocks = list(iter_blocks(content))
    marked = [text for language, text in blocks if language in _PYTHON]
    for texts in (marked, [text for language, text in blocks if not language]):
        trees = [(text, tree) for text in texts if (tree := parse_python(text)) is not None]
        if trees:
            # max() returns the first of equals, and the last block is wanted
            return max(reversed(trees), key=lambda pair: _rate_tree(pair[1], names))[0]
    return marked[-1] if marked else content


def iter_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield the language (lower case, may be empty) and the text of each fenced block.

    A block without a closing fence ends at the next fence that names a language, or at the end of the text.
    """
    opening: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line.rstrip(" \t\r"))
        if fence is None or (opening is not None and not _ends_block(opening, fence)):
            lines.append(line)
            continue
        if opening is not None:
            yield from _read_block(opening, lines)
        opening = fence if opening is None or fence[3] else None
        lines = []
    if opening is not None:
        yield from _read_block(opening, lines)


def parse_python(text: str) -> ast.Module | None:
    """Return the tree of a Python text; None: Python cannot parse it."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def find_definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Return name -> statement for the functions, classes and variables that a program defines at its top
    level, in `if`, `try`, `with` and loops too.

    Imports define nothing: a block that shows how to use a program imports its functions.
    """
    definitions: dict[str, ast.stmt] = {}
    # a list and no recursion: `elif` may be nested as deep as the parser allows
    waiting = list(reversed(tree.body))
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            definitions[statement.name] = statement
            continue
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            definitions |= {node.id: statement for target in targets for node in ast.walk(target)
                      if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for part in ("finalbody", "orelse", "body"):
            waiting += reversed(getattr(statement, part, []))
    return definitions


def find_entry_points(source: str) -> list[str] | None:
    """Return the functions of a program that none of its other functions and classes uses, or all functions
    if each is used; None: it is no Python."""
    tree = parse_python(source)
    if tree is None:
        return None
    definitions = {name: statement for name, statement in find_definitions(tree).items()
                   if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    used = {node.id for name, statement in definitions.items() for node in ast.walk(statement)
            if isinstance(node, ast.Name) and node.id != name}
    functions = [name for name, statement in definitions.items() if not isinstance(statement, ast.ClassDef)]
    return [name for name in functions if name not in used] or functions


def _ends_block(opening: re.Match[str], fence: re.Match[str]) -> bool:
    return (fence[2].startswith(opening[2])
            and _count_columns(fence[1]) < _count_columns(opening[1]) + _CLOSING_INDENT)


def _count_columns(blanks: str) -> int:
    return len(blanks.expandtabs(4))


def _read_block(opening: re.Match[str], lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield a block without the indentation of its fence, unless it is blank."""
    text = "\n".join(lines).rstrip() + "\n"
    if not text.strip():
        return
    indent = _count_columns(opening[1])
    if indent:
        text = re.sub(rf"(?m)^[ \t]{{1,{indent}}}", "", text)
    if parse_python(text) is None:
        text = textwrap.dedent(text)
    language = _LANGUAGE.match(opening[3])
    yield (language[1].lower() if language else ""), text


def _rate_tree(tree: ast.Module, names: Collection[str] | None) -> int:
    """Return how many of the names a program defines, or 1 for a program that does anything at all."""
    if names is None:
        # a sample output such as `5` or `[1, 2]` is Python, too, and calls nothing
        return int(any(isinstance(node, ast.Call) for node in ast.walk(tree)))
    defined = find_definitions(tree)
    if names:
        return len(set(names) & defined.keys())
    return int(any(isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef)) for s in defined.values()))
