"""Read and validate the tests in a row, and compare outputs."""

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
"""Stub function for a `check` without an entry point."""
CompareBy = Literal["lines", "tokens"]
_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\(\))?(?:\.[A-Za-z_]\w*(?:\(\))?)*", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d++\.?+\d*+|\.\d++)(?:[eE][+-]?\d{1,6})?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)


@dataclass(frozen=True)
class RowTests:
    """Tests in a row: Python texts, or runs with standard input."""

    texts: tuple[str, ...] = ()
    """Python tests that call the program's functions."""
    runs: tuple[tuple[str, str], ...] = ()
    """(standard input, expected output) per run."""
    names: frozenset[str] = frozenset()
    """Names that the Python tests use from the program."""
    entry_point: str = ""
    """Function passed to `check`, e.g. add or Solution().add."""
    needs_entry_point: bool = False
    """A test has a `check`, and the row has no `entry_point`."""
    number_tolerance: float = 0.0
    """Absolute and relative tolerance for decimals."""
    compare_by: CompareBy = "lines"
    """Comparison by lines or tokens."""

    def __len__(self) -> int:
        return len(self.texts or self.runs)

    def stub_program(self, value: str) -> str:
        """Return a program with stubs for the functions and classes in the tests.

        Args:
            value: expression that every stub returns.
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
    """Read `tests`, and optional `entry_point`, `number_tolerance` and `compare_by`.

    Args:
        row: the row.
        number_tolerance: default for rows without the field.
        compare_by: default for rows without the field.

    Raises:
        Refused: tests are missing, mixed, malformed or trivial.
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
    """Return tests as Python texts or as objects with stdin and stdout."""
    tests = row.get("tests")
    if tests is None:
        raise Refused("has no 'tests'")
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            tests = json.loads(tests)  # TACO and LiveCodeBench store JSON text
    if isinstance(tests, dict) and {"inputs", "outputs"} <= set(tests):
        tests = _pair_tests(tests)
    tests = [tests] if isinstance(tests, str) else tests
    if not isinstance(tests, list) or not 0 < len(tests) <= MAX_TESTS:
        raise Refused(f"tests = {format_short(tests)} must be a list of 1 to {MAX_TESTS:,} tests")
    return [_read_test(test) for test in tests]


def _pair_tests(tests: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pair the inputs and outputs in the format used by TACO and APPS."""
    inputs, outputs = tests["inputs"], tests["outputs"]
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
        raise Refused("tests: inputs and outputs must be lists of one length")
    if tests.get("fn_name"):
        # Data sets disagree on whether a result is wrapped in a list.
        raise Refused("tests with fn_name: write each as function, arguments and expected")
    return [{"stdin": stdin, "stdout": expected} for stdin, expected in zip(inputs, outputs, strict=True)]


def _read_test(test: Any) -> str | Mapping[str, str]:
    if isinstance(test, str):
        return test
    if (isinstance(test, dict) and {"input", "output"} <= set(test)
            and test.get("testtype", "stdin") == "stdin"):
        test = {"stdin": test["input"], "stdout": test["output"]}  # field names in LiveCodeBench
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
    """Join a list with lines, as in TACO, into a text; return other values unchanged."""
    is_lines = isinstance(value, list) and all(isinstance(line, str) for line in value)
    return "\n".join(value) if is_lines else value


def _write_call(test: Mapping[str, Any]) -> str:
    """Return an assertion that compares a call's result as JSON."""
    function, arguments = test["function"], test.get("arguments", [])
    if not (isinstance(function, str) and _FUNCTION.fullmatch(function)):
        raise Refused(f"function = {format_short(function)} must be a name, such as add or Solution().add")
    if not isinstance(arguments, (list, dict)):
        raise Refused(f"arguments = {format_short(arguments)} must be a list, or an object by name")
    # Arguments are Python literals in the test.
    stars = "**" if isinstance(arguments, dict) else "*"
    return f"assert __same__({function}({stars}{arguments!r}), {test['expected']!r})"


def _parse_test(text: str) -> ast.Module:
    """Parse a test.

    Raises:
        Refused: the text is not Python, or asserts nothing.
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
    """Return whether code that runs contains an assertion: top level, test functions, and definitions used
    there."""
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
    """Return whether HumanEval or `pytest` conventions call a function.

    Raises:
        Refused: `pytest` or unittest would call a class or pass arguments, which is not supported.
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
    """Return the names in `from solution import name` and `solution.name`."""
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
    """Return whether the output is as expected.

    Trailing blanks and trailing empty lines are ignored. Tokens are separated by whitespace. With a
    tolerance, lines are compared by tokens.
    """
    if compare_by == "tokens":
        return _are_same_tokens(printed, expected, tolerance)
    lines, expected_lines = _split_output_lines(printed), _split_output_lines(expected)
    if lines == expected_lines:
        return True
    return tolerance > 0 and len(lines) == len(expected_lines) and all(
        line == expected_line or _are_same_tokens(line, expected_line, tolerance)
        for line, expected_line in zip(lines, expected_lines, strict=True))


def _are_same_tokens(printed: str, expected: str, tolerance: float) -> bool:
    tokens, expected_tokens = (re.split("[ \t\r\n]+", text.strip(" \t\r\n")) for text in (printed, expected))
    return len(tokens) == len(expected_tokens) and all(
        token == expected_token or (tolerance > 0 and _is_close(token, expected_token, tolerance))
        for token, expected_token in zip(tokens, expected_tokens, strict=True))


def _is_close(token: str, expected: str, tolerance: float) -> bool:
    """Return whether two tokens are numbers within an absolute or relative tolerance.

    An expected integer has no relative tolerance: 1000000007 is not 1000000008.0.
    """
    if not (_NUMBER.fullmatch(token) and _NUMBER.fullmatch(expected)):
        return False
    is_integer = _INTEGER.fullmatch(expected) is not None
    if is_integer and _INTEGER.fullmatch(token):
        return False
    # Decimal, because floats cannot distinguish large integers.
    with decimal.localcontext(decimal.Context(prec=60)):
        right = decimal.Decimal(expected)
        bound = decimal.Decimal(str(tolerance)) * (1 if is_integer else max(decimal.Decimal(1), abs(right)))
        return abs(decimal.Decimal(token) - right) <= bound


def _split_output_lines(text: str) -> list[str]:
    """Split an output into lines without trailing blanks and trailing empty lines.

    Only "\\n" and "\\r\\n" end a line; only spaces, tabs and "\\r" are blank.
    """
    return "\n".join(line.rstrip(" \t\r") for line in text.split("\n")).rstrip("\n").split("\n")
