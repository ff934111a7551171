"""Run Python tests: plain assertions, HumanEval's `check`, and pytest-style functions.

Every evaluated assertion is counted, because a test without any shows nothing. The code runs in the test
process, where a solution cannot replace the counter or the module `pytest`. It is sent to the sandbox as text
and imports nothing from this package.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import math
import numbers
import re
import types
from collections.abc import Callable
from typing import Any

TICK = "__assertion__"
"""Name of the counter in instrumented tests; names from a solution never start like this."""
_ASSERTING = re.compile(r"_*assert\w*|raises|warns|fail|fail_\w+")
_RELATIVE, _ABSOLUTE = 1e-6, 1e-12
"""Default tolerances in `pytest.approx`."""


# --- assertions


def is_assertion(node: ast.AST) -> bool:
    """Return whether a node is an assertion: `assert`, `raise`, or a call such as `self.assertEqual`."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return _ASSERTING.fullmatch(name) is not None
    return isinstance(node, (ast.Assert, ast.Raise))


class AssertionCounter(ast.NodeTransformer):
    """Insert a `TICK` call before every assertion."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        self.generic_visit(node)
        return [_build_tick(node), node]

    def visit_If(self, node: ast.If) -> list[ast.stmt]:
        """Count `if f(1) != 2: raise ValueError` in either branch, including `elif` and `else`."""
        branches, last = [*node.body, *node.orelse], node
        while len(last.orelse) == 1 and isinstance(last.orelse[0], ast.If):
            last = last.orelse[0]
            branches += [*last.body, *last.orelse]
        self.generic_visit(node)
        raises = any(isinstance(statement, ast.Raise) for statement in branches)
        return [_build_tick(node), node] if raises else [node]

    def visit_Try(self, node: ast.Try) -> ast.Try:
        """Count the handler for an expected error, after `try: f(1); assert False`."""
        expects = any(is_assertion(inner) for statement in [*node.body, *node.orelse]
                      for inner in ast.walk(statement))
        self.generic_visit(node)
        for handler in node.handlers if expects else ():
            handler.body.insert(0, _build_tick(handler))
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if is_assertion(node):
            node.func = ast.Call(ast.Name(TICK, ast.Load()), [node.func], [])
        return node


def _build_tick(place: ast.AST) -> ast.Expr:
    return ast.copy_location(ast.Expr(ast.Call(ast.Name(TICK, ast.Load()), [], [])), place)


# --- a single test


class TestText:
    """A test as written by its author.

    Args:
        source: Python source.
        names: the solution's names, to which the test adds.
        entry_point: function passed to `check`, e.g. add or Solution().add.
    """

    def __init__(self, source: str, names: dict[str, Any], entry_point: str) -> None:
        self._source, self._tree = source, ast.parse(source)
        self._names, self._entry_point = names, entry_point
        self.num_assertions = 0
        """Evaluated assertions so far."""

    def run(self) -> None:
        """Run the text, then its test functions.

        Raises:
            Exception: any error in the test; AssertionError without an evaluated assertion.
        """
        calls_check = calls_name(self._tree, "check")
        self._names[TICK] = self._count_assertion
        before = dict(self._names)
        tree = ast.fix_missing_locations(AssertionCounter().visit(self._tree))
        try:
            exec(compile(tree, "test.py", "exec"), self._names)
        except SystemExit as e:
            # `sys.exit(pytest.main())` may end a test file, but a solution's exit is a failure.
            if type(e) is not SystemExit or e.code:
                raise
        for name, value in list(self._names.items()):
            # Names from the solution and from earlier tests are still defined.
            is_own = before.get(name) is not value and getattr(value, "__module__", "") == "__main__"
            if not is_own or not isinstance(value, types.FunctionType):
                continue
            if name == "check" and not calls_check:
                value(eval(self._entry_point, self._names))
            elif name.startswith("test"):
                result = value()
                if inspect.iscoroutine(result):
                    importlib.import_module("asyncio").run(result)
        if not self.num_assertions:
            raise AssertionError("evaluates no assertion")

    def _count_assertion(self, function: Any = None) -> Any:
        self.num_assertions += 1
        return function


def calls_name(tree: ast.Module, name: str) -> bool:
    """Return whether a text calls a function `name` outside its own functions and classes."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            return True
        waiting += ast.iter_child_nodes(node)
    return False


# --- numbers within a tolerance


def is_close(actual: Any, expected: Any, relative: float, absolute: float, *, nan_ok: bool = False,
             exact_integers: bool = False) -> bool:
    """Return whether data are equal, with a tolerance for numbers at any depth.

    Args:
        actual: plain data: lists, tuples, dicts, numbers.
        expected: plain data.
        relative: tolerance relative to the expected number.
        absolute: absolute tolerance; the larger tolerance counts.
        nan_ok: NaN equals NaN.
        exact_integers: an expected integer has no relative tolerance and differs from every other integer.
    """
    options: dict[str, Any] = {"nan_ok": nan_ok, "exact_integers": exact_integers}
    if isinstance(expected, dict):
        return isinstance(actual, dict) and actual.keys() == expected.keys() and all(
            is_close(actual[key], value, relative, absolute, **options) for key, value in expected.items())
    if isinstance(expected, (list, tuple)):
        return isinstance(actual, (list, tuple)) and len(actual) == len(expected) and all(
            is_close(a, e, relative, absolute, **options) for a, e in zip(actual, expected, strict=True))
    are_numbers = isinstance(actual, numbers.Number) and isinstance(expected, numbers.Number)
    if not are_numbers or actual == expected:
        return bool(actual == expected)
    if exact_integers and isinstance(expected, int):
        relative = 0.0
        if isinstance(actual, int):
            return False
    try:
        difference = abs(actual - expected)
        if math.isnan(difference) or math.isinf(difference):
            return nan_ok and actual != actual and expected != expected
        return bool(difference <= max(absolute, relative * float(abs(expected))))
    # A decimal and a float, or an integer beyond the float range.
    except (TypeError, OverflowError, ArithmeticError):
        return False


_NUMPY_COMPARISONS = ("allclose", "isclose", "testing.assert_allclose", "testing.assert_almost_equal",
                      "testing.assert_array_almost_equal", "testing.assert_array_equal")


def guard_numpy() -> None:
    """Make numpy's comparisons fail if only one side is empty: broadcasting to the empty side compares
    nothing."""
    numpy = importlib.import_module("numpy")
    for path in _NUMPY_COMPARISONS:
        *modules, name = path.split(".")
        owner = getattr(numpy, modules[0]) if modules else numpy
        setattr(owner, name, _guard_comparison(getattr(owner, name), numpy.size))


def _guard_comparison(compare: Callable[..., Any], count: Callable[[Any], int]) -> Callable[..., Any]:
    @functools.wraps(compare)
    def guarded(*arguments: Any, **named: Any) -> Any:
        sizes = []
        for side in [*arguments, *named.values()][:2]:
            try:
                sizes.append(count(side))
            except (TypeError, ValueError):  # ragged lists; numpy reports the error
                return compare(*arguments, **named)
        if min(sizes) == 0 < max(sizes):
            raise AssertionError("an empty array is compared with numbers")
        return compare(*arguments, **named)

    return guarded


# --- the part of pytest for test functions


class Approx:
    """Numbers, possibly in a list, tuple or dict, that compare equal within a tolerance."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, *,
                 nan_ok: bool = False) -> None:
        self.expected = expected.tolist() if hasattr(expected, "tolist") else expected
        # An absolute tolerance alone disables the relative one.
        default = _RELATIVE if abs is None else 0.0
        self.relative = default if rel is None else rel
        self.absolute = _ABSOLUTE if abs is None else abs
        self.nan_ok = nan_ok

    def __eq__(self, actual: object) -> bool:
        data = actual.tolist() if type(actual).__module__ == "numpy" else actual  # type: ignore[attr-defined]
        return is_close(data, self.expected, self.relative, self.absolute, nan_ok=self.nan_ok)

    __hash__ = None  # type: ignore[assignment]
    # Otherwise numpy compares item by item.
    __array_ufunc__ = None

    def __repr__(self) -> str:
        return f"approx({self.expected!r})"


class ExpectedError:
    """Context manager returned by `raises`, with the error in `value`."""

    def __init__(self, expected: Any, match: str | None) -> None:
        self._expected, self._match = expected, match
        self.value: Any = None

    def __enter__(self) -> ExpectedError:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: Any) -> bool:
        if kind is None:
            raise AssertionError(f"did not raise {self._expected}")
        if not issubclass(kind, self._expected):
            return False
        if self._match is not None and not re.search(self._match, str(value)):
            raise AssertionError(f"{str(value)!r} does not match {self._match!r}")
        self.value, self.type = value, kind
        return True

    def match(self, pattern: str) -> bool:
        """Return True if the error's text matches a regular expression; else raise AssertionError."""
        if not re.search(pattern, str(self.value)):
            raise AssertionError(f"{str(self.value)!r} does not match {pattern!r}")
        return True


def raises(expected: Any, *call: Any, match: str | None = None, **named: Any) -> ExpectedError:
    """Return a context manager that expects an error, or call a function that must raise the error."""
    context = ExpectedError(expected, match)
    if call:
        function, *arguments = call
        with context:
            function(*arguments, **named)
    return context


def _fail_test(reason: str = "", **settings: Any) -> None:
    raise AssertionError(reason or "pytest.fail")


def _run_pytest_main(*arguments: Any, **settings: Any) -> int:
    """Return success; the tests in the text run afterwards."""
    return 0


def make_pytest() -> types.ModuleType:
    """Build a module `pytest` with `approx`, `raises`, `fail` and `main`."""
    module = types.ModuleType("pytest")
    module.__dict__.update(approx=Approx, raises=raises, fail=_fail_test, main=_run_pytest_main)
    return module
