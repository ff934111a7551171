"""The language of values: as Python where Python has it, and nothing beyond what was given."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sov.tools.faults import ToolFault
from megatron_sov.tools.virtual.expressions import MAX_CHARS, MAX_TEXT_CHARS, Problems, read, value_of

SCOPE: dict[str, Any] = {"n": 7, "x": 2.5, "word": "Seoul", "on": True, "none": None, "list_": [3, 1, 2],
                         "row": {"id": "B1", "price": 3}, "rows": [{"id": "B1", "price": 3},
                                                                   {"id": "B2", "price": 4}]}


def value(text: str, scope: dict[str, Any] = SCOPE) -> Any:
    problems = Problems()
    expression = read(text, dict.fromkeys(scope), "here", problems)
    assert not problems.told, problems.told
    return value_of(expression, scope)


@pytest.mark.parametrize("text", [
    "n + 1", "n - x * 2", "n / 2", "n // 2", "n % 4", "-n + 3", "(n + 1) * 2", "n > 3", "1 < n <= 7",
    "n == 7.0", "word == 'Seoul'", "word != 'seoul'", "word < 'Tokyo'", "'eou' in word", "n in [1, 7]",
    "n not in list_", "on and n > 3", "not on or n == 7", "1 if n > 3 else 2", "word + '!'", "list_ + [4]",
    "{'a': n, 'b': [x]}", "sum(list_)", "max(list_)", "min([4, 2])", "abs(-x)", "round(2.345, 2)", "round(x)",
    "none == None", "on == True", "'a\"b' + \"c'd\""])
def test_what_python_has_means_the_same(text: str) -> None:
    assert value(text) == eval(text, dict(SCOPE))


@pytest.mark.parametrize("text, wanted", [
    ("count(rows)", 2), ("rows.price", [3, 4]), ("sum(rows.price)", 7), ("first(rows).id", "B1"),
    ("row.id", "B1"), ("first([])", None), ("min([])", None), ("true", True), ("null", None),
    ("1 == true", False), ("1 in [true]", False), ("contains(word, 'SEO')", True), ("lower(word)", "seoul"),
    ("length(word)", 5), ("text(n) + ' nights'", "7 nights"), ("days('2024-02-28', '2024-03-01')", 2),
    ("is_day('2026-02-30')", False), ("is_day('2026-2-3')", False), ("is_day('2026-02-03')", True),
    ("false and 1 / 0 == 1", False)])
def test_what_python_has_not(text: str, wanted: Any) -> None:
    assert value(text) == wanted and type(value(text)) is type(wanted)


@pytest.mark.parametrize("text", [
    "__import__('os')", "().__class__", "[r for r in rows]", "lambda: 1", "rows[0]", "word.upper()", "n ** 9",
    "f'{n}'", "(n := 1)", "open('x')", "print", "b'x'", "1j", "count(rows, rows)", "days(*rows)", "nobody",
    "{n: 1}", "sum", "n +", "", "x" * (MAX_CHARS + 1), "n" + " + n" * 100])
def test_what_is_not_in_the_language_is_told_and_never_worked_out(text: str) -> None:
    problems = Problems()
    expression = read(text, dict.fromkeys(SCOPE), "here", problems)
    assert problems.told and problems.told[0].startswith("here: ")
    assert value_of(expression, {}) is None


@pytest.mark.parametrize("text", [
    "n + word", "n + on", "n and on", "not n", "n / 0", "n % 0", "word < n", "none.id", "row.nobody",
    "sum(word)", "n in n", "days(word, word)", "text(row)", "1 if n else 2", "-word", "lower(n)",
    "round(x, 99)", "1e308 * 1e10", "999999999999999 * 9"])
def test_a_value_that_there_is_not_is_a_fault_of_the_world(text: str) -> None:
    with pytest.raises(ToolFault) as told:
        value(text)
    assert told.value.code == "failed"


def test_nothing_grows_beyond_the_bounds() -> None:
    scope: dict[str, Any] = {"a": "x" * 60}
    with pytest.raises(ToolFault, match="a text passes"):
        for _ in range(40):
            scope["a"] = value("a + a", scope)
    assert len(scope["a"]) <= MAX_TEXT_CHARS


def test_columns_are_known_before_there_are_values() -> None:
    problems = Problems()
    read("row.titel == 'x'", {"row": {"title", "id"}}, "tool find", problems)
    assert problems.told == ["tool find: \"row.titel == 'x'\": row has no column 'titel'; it has id, title"]


def test_a_text_without_quotes_is_told_how_to_be_written() -> None:
    problems = Problems()
    read("open", {"row": None}, "here", problems)
    assert "a text stands in quotes: \"'open'\"" in problems.told[0]


@pytest.mark.parametrize("text", ["sum([0.5, n])", "text(n)", "n + 0.5"])
def test_a_whole_number_without_bounds_is_a_fault_of_the_call(text: str) -> None:
    with pytest.raises(ToolFault):
        value(text, {"n": 10 ** 5000})


def test_lists_of_one_list_do_not_grow_beyond_the_bounds() -> None:
    found: Any = [1]
    with pytest.raises(ToolFault, match="parts"):
        for _ in range(5):
            found = value(f"[{', '.join(['a'] * 70)}]", {"a": found})
