"""The parts of pytest that the reward `code` reimplements equal pytest, and assertions are counted."""

import ast
import itertools
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from megatron_sov.judge.rewards.solution_frameworks import (
    TICK, AssertionCounter, calls_name, is_assertion, is_close, make_pytest)

OUR_PYTEST: Any = make_pytest()
VALUES = [0, 1, -1, 1.0, 1.0000001, 0.999999, 1e-13, 1e-7, 1e6, 1e6 + 0.5, math.inf, -math.inf, math.nan, "x",
          None, "1", 1j, 1 + 1e-9j, Fraction(1, 3), 1 / 3, [0.1], [0.1 + 1e-9], (0.1,), [0.1, 0.2],
          {"a": 0.1}, {"a": 0.1 + 1e-9}, {"b": 0.1}, [], 10 ** 400]


def test_approx_equals_pytest() -> None:
    for expected, actual in itertools.product(VALUES, VALUES):
        for settings in ({}, {"rel": 1e-3}, {"abs": 1e-3}, {"rel": 1e-9, "abs": 1e-8}, {"nan_ok": True}):
            try:
                theirs = bool(actual == pytest.approx(expected, **settings))
            except (TypeError, OverflowError):
                continue
            ours = bool(actual == OUR_PYTEST.approx(expected, **settings))
            assert ours == theirs, (actual, expected, settings)
            assert bool(actual != OUR_PYTEST.approx(expected, **settings)) is not ours


def test_approx_takes_arrays_and_decimals() -> None:
    import numpy as np

    assert np.array([0.1, 0.2]) == OUR_PYTEST.approx(np.array([0.1 + 1e-9, 0.2]))
    assert OUR_PYTEST.approx([0.1]) == np.array([0.1 + 1e-9])
    assert np.float64(0.1) == OUR_PYTEST.approx(0.1 + 1e-9)
    assert np.array([0.1, 0.2]) != OUR_PYTEST.approx([0.1])
    assert OUR_PYTEST.approx(Decimal("0.1")) == Decimal("0.1")
    assert Decimal("0.1") != OUR_PYTEST.approx(0.2)


@pytest.mark.each("error", [ValueError("bad 3"), KeyError("x"), None, SystemExit(0)])
@pytest.mark.each("expected", [ValueError, (KeyError, ValueError), Exception, SystemExit])
@pytest.mark.each("match", [None, r"bad \d", "other"])
def test_raises_equals_pytest(error: BaseException | None, expected: Any, match: str | None) -> None:
    def outcome(library: Any) -> str:
        try:
            with library.raises(expected, match=match) as info:
                if error is not None:
                    raise error
        except BaseException as e:
            return "AssertionError" if type(e).__name__ in ("AssertionError", "Failed") else type(e).__name__
        return repr(info.value)

    assert outcome(OUR_PYTEST) == outcome(pytest)


@pytest.mark.each("text, counted", [
    ("assert x", 1), ("assert x\nassert x", 2), ("for _ in range(3):\n    assert x", 3), ("x == 1", 0),
    ("if x != 1: raise ValueError", 1), ("if x == 1:\n    pass\nelse:\n    raise ValueError", 1),
    ("if x == 1:\n    pass\nelif x: raise ValueError", 1), ("if x:\n    y = 2", 0),
    ("try:\n    int('x')\n    assert False\nexcept ValueError:\n    pass", 1),
    ("try:\n    int('x')\nexcept ValueError:\n    pass\nelse:\n    raise KeyError", 1),
    ("try:\n    int('x')\nexcept ValueError:\n    pass", 0), ("def f():\n    assert x", 0),
    ("def f():\n    assert x\nf()\nf()", 2), ("lib.assertEqual(1, 1)", 1), ("assert_close(1)", 1),
    ("with lib.raises(1): pass", 1), ("y = [assert_close(i) for i in (1, 2)]", 2), ("insert(1)", 0),
    ("assert assert_close(1) is None", 2), ("from __future__ import annotations\nassert x", 1)])
def test_assertions_are_counted_where_they_are_evaluated(text: str, counted: int) -> None:
    class Library:
        def __getattr__(self, name: str) -> Any:
            return lambda *given: Library()

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    ticks: list[Any] = []

    def tick(function: Any = None) -> Any:
        ticks.append(function)
        return function

    names = {"x": 1, "lib": Library(), "assert_close": lambda y: None, "insert": int, TICK: tick}
    tree = ast.fix_missing_locations(AssertionCounter().visit(ast.parse(text)))
    exec(compile(tree, "test", "exec"), names)
    assert len(ticks) == counted


def test_top_level_calls_are_found() -> None:
    assert calls_name(ast.parse("if x:\n    check(f)"), "check")
    assert calls_name(ast.parse("y = [check(1)]"), "check")
    assert not calls_name(ast.parse("def g(): check(f)\nx = lambda: check(f)\ncheck"), "check")
    found = [is_assertion(node) for node in ast.walk(ast.parse("self.assertTrue(x)"))]
    assert sum(found) == 1


@pytest.mark.each("actual, expected, close", [
    (0.1 + 0.2, 0.3, True), ([0.1 + 0.2, [1]], [0.3, [1]], True), ([1], [1, 1], False),
    ({"a": 1.0}, {"a": 1}, True),
    (1000000008, 1000000007, False), (1000000008.0, 1000000007, False), (1000000008.0, 1000000007.0, True),
    (2.0000001, 2, True), (True, 1, True), ("0.30000001", "0.3", False), (None, 0.0, False),
    (math.nan, math.nan, False),
    (math.inf, math.inf, True), (10 ** 400, 0.5, False), ("x", "x", True), (0.5, "0.5", False)])
def test_results_are_compared_within_a_tolerance(actual: Any, expected: Any, close: bool) -> None:
    assert is_close(actual, expected, 1e-6, 1e-6, exact_integers=True) is close
    assert is_close(actual, expected, 0.0, 0.0, exact_integers=True) is (actual == expected)
