"""Extract the program from a response: the fenced block to run."""

import ast
import re
import textwrap
from collections.abc import Collection, Iterator

from megatron_sov.chat.tool_calls import parse_turn

# Possessive quantifiers avoid quadratic time on long lines with blanks or backticks.
_FENCE = re.compile(r"([ \t]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++)?+)(`{3,}+|~{3,}+)[ \t]*+([^`]*)")
_LANGUAGE = re.compile(r"[{.]*(\w*)")
_PYTHON = ("python", "py", "python3")
_CLOSING_INDENT = 4
"""A closing fence must be indented by less than this beyond its opening fence (CommonMark 0.31, 4.5); deeper
fences belong to a docstring."""


def extract_program(response: str, names: Collection[str] | None = None) -> str:
    """Return the program in a response, ignoring thoughts.

    Blocks marked as Python take precedence over unmarked blocks. Among parsable blocks, the last block that
    defines the most `names` wins. Without blocks, return the whole text.

    Args:
        response: model output.
        names: names used by the tests; empty: any function; None: the program reads and prints.
    """
    content = parse_turn(response).content
    blocks = list(iter_blocks(content))
    marked = [text for language, text in blocks if language in _PYTHON]
    for texts in (marked, [text for language, text in blocks if not language]):
        trees = [(text, tree) for text in texts if (tree := parse_python(text)) is not None]
        if trees:
            # max() returns the first among equals; the last block is wanted.
            return max(reversed(trees), key=lambda pair: _rate_tree(pair[1], names))[0]
    return marked[-1] if marked else content


def iter_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield the lower-case language (or "") and the text for each fenced block.

    An unclosed block ends at the next fence with a language, or at the end.
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
    """Parse Python source; None if invalid."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def find_definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Return name -> statement for top-level functions, classes and variables, also inside `if`, `try`,
    `with` and loops.

    Imports do not count, because usage examples import the program's functions.
    """
    definitions: dict[str, ast.stmt] = {}
    # Iterative, because `elif` chains may be nested deeply.
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
    """Return the functions unused by other definitions, or all functions; None for invalid Python."""
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
    """Yield a non-blank block without its fence's indentation."""
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
    """Count the `names` defined by a program; without names, 1 for a program with effects."""
    if names is None:
        # Sample outputs such as `5` or `[1, 2]` are valid Python without calls.
        return int(any(isinstance(node, ast.Call) for node in ast.walk(tree)))
    defined = find_definitions(tree)
    if names:
        return len(set(names) & defined.keys())
    return int(any(isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef)) for s in defined.values()))
