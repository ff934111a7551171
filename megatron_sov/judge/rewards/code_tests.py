"""The tests of a row for programs: read, checked for whether they test anything, and output compared."""

from __future__ import annotations

import ast
import builtins
import contextlib
import decimal
import json
import re
import symtable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sov.judge.rewards.program_text import find_definitions
from megatron_sov.judge.rewards.reward import Refused, Row, format_short
from megatron_sov.judge.rewards.solution_frameworks import calls_name, is_assertion
from megatron_sov.judge.rewards.solution_tests import SHARED_MODULES

MAX_TESTS = 10_000
CANDIDATE = "candidate"
"""Function of a program that does nothing, for a `check` without an entry point."""
CompareBy = Literal["lines", "tokens"]
_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\(\))?(?:\.[A-Za-z_]\w*(?:\(\))?)*", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d++\.?+\d*+|\.\d++)(?:[eE][+-]?\d{1,6})?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)


@dataclass(frozen=True)
class RowTests:
    """The tests of a row: either texts of Python or runs with an input."""

    texts: tuple[str, ...] = ()
    """Tests that call the program's functions."""
    runs: tuple[tuple[str, str], ...] = ()
    """Standard input and the expected output of each run."""
    names: frozenset[str] = frozenset()
    """Names that the texts take from the program."""
    entry_point: str = ""
    """The function for a test's `check`, such as add or Solution().add."""
    needs_entry_point: bool = False
    """A text has a `check`, and the row names no entry point."""
    number_tolerance: float = 0.0
    """Absolute and relative difference that decimals may have."""
    compare_by: CompareBy = "lines"
    """How outputs are compared."""

    def __len__(self) -> int:
        return len(self.texts or self.runs)

    def stub_program(self, value: str) -> str:
        """Return a program that has the functions and classes which the tests use, and does nothing.

        Args:
            value: expression that each function and method returns.
        """
        lines = ["class _Stub:", "    def __init__(self, *arguments, **named): pass",
                 "    def __getattr__(self, name): return lambda *arguments, **named: _value",
                 f"_value = {value}"]
        for name in sorted(self.names | ({CANDIDATE} if self.needs_entry_point else set())):
            if name in SHARED_MODULES:
                lines.append(f"import {name}")
            elif name[:1].isupper():
                lines.append(f"class {name}(_Stub): pass")
            else:
                lines.append(f"def {name}(*arguments, **named): return _value")
        return "\n".join(lines) + "\n"


def read_tests(row: Row, number_tolerance: float, compare_by: CompareBy) -> RowTests:
    """Read a row's `tests`, and its `entry_point`, `number_tolerance` and `compare_by` if it has them.

    Args:
        row: the row.
        number_tolerance: of a row that names none.
        compare_by: likewise.

    Raises:
        Refused: there are no tests, they differ in kind, or one of them tests nothing.
    """
    tolerance, compared = row.get("number_tolerance"), row.get("compare_by")
    tolerance = number_tolerance if tolerance is None else tolerance
    compared = compare_by if compared is None else compared
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance <= 1:
        raise Refused(f"number_tolerance = {format_short(tolerance)} must be a number from 0 to 1")
    if compared not in ("lines", "tokens"):
        raise Refused(f"compare_by = {format_short(compared)} must be lines or tokens")
    entry_point = row.get("entry_point") or ""
    if entry_point and not (isinstance(entry_point, str) and _FUNCTION.fullmatch(entry_point)):
        raise Refused(f"entry_point = {format_short(entry_point)} must be the name of a function, such as "
                      "add or Solution().add")
    tests = _list_tests(row)
    texts = tuple(test for test in tests if isinstance(test, str))
    if texts and len(texts) < len(tests):
        raise Refused("tests has inputs to read beside calls or assertions: give them rows of their own")
    if not texts:
        return _read_runs(tests, tolerance, compared)
    trees = [_parse_test(text) for text in texts]
    checks = any(isinstance(find_definitions(tree).get("check"), ast.FunctionDef)
                 and not calls_name(tree, "check") for tree in trees)
    names = _find_names(texts, trees) | ({entry_point.partition(".")[0].removesuffix("()")} - {""})
    return RowTests(texts=texts, names=frozenset(names), entry_point=entry_point,
                    needs_entry_point=checks and not entry_point, number_tolerance=tolerance)


def _read_runs(tests: list[Any], tolerance: float, compared: CompareBy) -> RowTests:
    runs = tuple((test["stdin"], test["stdout"]) for test in tests)
    if not any(stdout.split() for _, stdout in runs):
        raise Refused("tests expect no output: a program that does nothing passes them")
    return RowTests(runs=runs, number_tolerance=tolerance, compare_by=compared)


def _list_tests(row: Row) -> list[Any]:
    """Return tests as texts of Python or as objects with stdin and stdout."""
    tests = row.get("tests")
    if tests is None:
        raise Refused("has no 'tests'")
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            tests = json.loads(tests)  # as TACO and LiveCodeBench have them
    if isinstance(tests, dict) and {"inputs", "outputs"} <= set(tests):
        tests = _pair_tests(tests)
    tests = [tests] if isinstance(tests, str) else tests
    if not isinstance(tests, list) or not 0 < len(tests) <= MAX_TESTS:
        raise Refused(f"tests = {format_short(tests)} must be a list of 1 to {MAX_TESTS:,} tests")
    return [_read_test(test) for test in tests]


def _pair_tests(tests: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tests of TACO and APPS, which list all inputs, then all outputs."""
    inputs, outputs = tests["inputs"], tests["outputs"]
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
        raise Refused("tests: inputs and outputs must be lists of one length")
    if tests.get("fn_name"):
        # data sets disagree on whether a result stands in a list of its own
        raise Refused("tests with fn_name: write each as function, arguments and expected")
    return [{"stdin": stdin, "stdout": expected} for stdin, expected in zip(inputs, outputs, strict=True)]


def _read_test(test: Any) -> str | Mapping[str, str]:
    if isinstance(test, str):
        return test
    if (isinstance(test, dict) and {"input", "output"} <= set(test)
            and test.get("testtype", "stdin") == "stdin"):
        test = {"stdin": test["input"], "stdout": test["output"]}  # as LiveCodeBench names them
    if isinstance(test, dict) and {"stdin", "stdout"} <= set(test):
        texts = {name: _join_lines(test[name]) for name in ("stdin", "stdout")}
        if not all(isinstance(text, str) for text in texts.values()):
            raise Refused(f"test {format_short(test)}: stdin and stdout must be texts")
        return texts
    if isinstance(test, dict) and {"function", "expected"} <= set(test):
        return _write_call(test)
    raise Refused(f"test {format_short(test)} must be a text of Python, or have stdin and stdout, or "
                  "function, arguments and expected")


def _join_lines(value: Any) -> Any:
    """Return a list of lines, as TACO has some of them, as a text; everything else as it is."""
    is_lines = isinstance(value, list) and all(isinstance(line, str) for line in value)
    return "\n".join(value) if is_lines else value


def _write_call(test: Mapping[str, Any]) -> str:
    """Return the assertion of a call: its result is compared as JSON has it."""
    function, arguments = test["function"], test.get("arguments", [])
    if not (isinstance(function, str) and _FUNCTION.fullmatch(function)):
        raise Refused(f"function = {format_short(function)} must be a name, such as add or Solution().add")
    if not isinstance(arguments, (list, dict)):
        raise Refused(f"arguments = {format_short(arguments)} must be a list, or an object by name")
    # arguments stand in the test as Python literals
    stars = "**" if isinstance(arguments, dict) else "*"
    return f"assert __same__({function}({stars}{arguments!r}), {test['expected']!r})"


def _parse_test(text: str) -> ast.Module:
    """Return the tree of a test.

    Raises:
        Refused: it is no Python, or asserts nothing when it runs.
    """
    try:
        compile(text, "test", "exec")
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise Refused(f"test {format_short(text)} is no Python: {e}") from None
    if not _runs_assertion(tree):
        raise Refused(f"test {format_short(text)} asserts nothing when it runs; write an assertion, a "
                      "function named test..., or `check`")
    return tree


def _runs_assertion(tree: ast.Module) -> bool:
    """Return whether an assertion stands in code that runs: at the top level, in functions that are called
    by their form, or in functions and classes that such code names."""
    functions = {name: node for name, node in find_definitions(tree).items()
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    waiting: list[ast.AST] = [node for node in tree.body
                              if functions.get(getattr(node, "name", "")) is not node]
    waiting += [functions.pop(name) for name, node in list(functions.items()) if _is_called(name, node)]
    while waiting:
        for node in ast.walk(waiting.pop()):
            if is_assertion(node):
                return True
            if isinstance(node, ast.Name) and node.id in functions:
                waiting.append(functions.pop(node.id))
    return False


def _is_called(name: str, node: ast.stmt) -> bool:
    """Return whether HumanEval's or pytest's form has a function called.

    Raises:
        Refused: pytest or unittest would call a class, or give arguments to a function; nothing does here.
    """
    if isinstance(node, ast.ClassDef):
        if any(getattr(part, "name", "").startswith("test") for part in node.body):
            raise Refused(f"class {name} holds tests; write each as a function named test...")
        return False
    if not name.startswith("test"):
        return name == "check"
    arguments = getattr(node, "args", None)
    if arguments is not None and (len(arguments.posonlyargs + arguments.args) > len(arguments.defaults)
                                  or None in arguments.kw_defaults):
        raise Refused(f"{name} takes arguments, which no fixture or parameter gives here; write them "
                      "into the test")
    return True


def _find_names(texts: tuple[str, ...], trees: list[ast.Module]) -> set[str]:
    """Return the names that tests take from the program, also through a module `solution`."""
    read: set[str] = set()
    bound = {"__same__", *dir(builtins)}
    tables = [symtable.symtable(text, "test", "exec") for text in texts]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        is_top = table.get_type() == "module"
        for symbol in table.get_symbols():
            if not (is_top or symbol.is_global()):
                continue
            is_bound = symbol.is_assigned() or symbol.is_imported()
            (bound if is_bound else read).add(symbol.get_name())
    imported: set[str] = set().union(*map(_find_imported, trees))
    return {name for name in read - bound if not name.startswith("__")} | imported


def _find_imported(tree: ast.Module) -> set[str]:
    """Return the names of `from solution import name` and `solution.name`."""
    aliases, names = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name for alias in node.names if alias.name == "solution"}
        elif isinstance(node, ast.ImportFrom) and node.module == "solution":
            names |= {alias.name for alias in node.names} - {"*"}
    if not aliases:
        return names
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name) and node.value.id in aliases}


# --- outputs


def is_same_output(printed: str, expected: str, compare_by: CompareBy, tolerance: float) -> bool:
    """Return whether a program printed what it should have.

    Lines are compared without blanks at their ends and without empty lines at the end; tokens are what stands
    between blanks and ends of lines. With a tolerance, lines are equal if their tokens are.
    """
    if compare_by == "tokens":
        return _are_same_tokens(printed, expected, tolerance)
    lines, expected_lines = _split_output_lines(printed), _split_output_lines(expected)
    if lines == expected_lines:
        return True
    return tolerance > 0 and len(lines) == len(expected_lines) and all(
        line == other or _are_same_tokens(line, other, tolerance)
        for line, other in zip(lines, expected_lines, strict=True))


def _are_same_tokens(printed: str, expected: str, tolerance: float) -> bool:
    tokens, expected_tokens = (re.split("[ \t\r\n]+", text.strip(" \t\r\n")) for text in (printed, expected))
    return len(tokens) == len(expected_tokens) and all(
        token == other or (tolerance > 0 and _is_close(token, other, tolerance))
        for token, other in zip(tokens, expected_tokens, strict=True))


def _is_close(token: str, expected: str, tolerance: float) -> bool:
    """Return whether two tokens are numbers within a tolerance, absolutely or relative to the expected one.

    An expected integer has no relative tolerance: 1000000007 is not 1000000008.0.
    """
    if not (_NUMBER.fullmatch(token) and _NUMBER.fullmatch(expected)):
        return False
    is_integer = _INTEGER.fullmatch(expected) is not None
    if is_integer and _INTEGER.fullmatch(token):
        return False
    # decimals and no floats: these do not tell large integers apart
    with decimal.localcontext(decimal.Context(prec=60)):
        right = decimal.Decimal(expected)
        bound = decimal.Decimal(str(tolerance)) * (1 if is_integer else max(decimal.Decimal(1), abs(right)))
        return abs(decimal.Decimal(token) - right) <= bound


def _split_output_lines(text: str) -> list[str]:
    """Return what counts of an output: its lines without blanks at their ends, and no empty ones last.

    Only "\\n" and "\\r\\n" end a line, and only blanks, tabs and "\\r" are blank: all else a program printed.
    """
    return "\n".join(line.rstrip(" \t\r") for line in text.split("\n")).rstrip("\n").split("\n")
