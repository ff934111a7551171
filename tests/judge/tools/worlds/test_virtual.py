"""Worlds that are data: how their tools act, and when a goal is reached."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.chat.tool_calls import ToolCall
from megatron_sov.judge.tools.environment import LIMITS, ToolFault
from megatron_sov.judge.tools.host import EnvironmentHost
from megatron_sov.judge.tools.registry import order
from megatron_sov.judge.tools.virtual.expressions import MAX_CHARS, MAX_TEXT_CHARS, Problems, read, value_of
from megatron_sov.judge.tools.virtual.spec import problems_of, spec_of
from megatron_sov.judge.tools.worlds.virtual import Virtual

LIBRARY = Virtual.EXAMPLES[0]["world"]
BORROW = {"member_id": "M1", "book_id": "B3", "due": "2026-06-30"}


def begun(goal: Any = None, **more: Any) -> Virtual:
    world = Virtual()
    world.reset({"question": "?", "world": LIBRARY, "goal": goal or {}, **more})
    return world


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize("name, arguments, code, told", [
    ("borrow_book", {**BORROW, "member_id": "M2"}, "refused", "card is not active"),
    ("borrow_book", {**BORROW, "book_id": "B2"}, "refused", "no copy is on the shelf"),
    ("borrow_book", {**BORROW, "book_id": "B9"}, "refused", "there is no 'B9' in books"),
    ("borrow_book", {**BORROW, "due": "soon"}, "refused", "written YYYY-MM-DD"),
    ("borrow_book", {**BORROW, "note": 3}, "arguments", "note: "),
    ("borrow_book", {"member_id": "M1"}, "arguments", "book_id: is missing"),
    ("find_member", {"email": "nobody"}, "refused", "no member has this address"),
    ("fly", {}, "unknown_tool", "there is no tool 'fly'")])
def test_a_call_that_is_refused_changes_nothing(name: str, arguments: Any, code: str, told: str) -> None:
    world = begun()
    first = world.snapshot()
    with pytest.raises(ToolFault, match=told) as fault:
        world.call(name, arguments)
    assert fault.value.code == code and world.snapshot() == first


def test_steps_that_fail_halfway_leave_the_tables_as_they_were() -> None:
    bent = copy.deepcopy(LIBRARY)
    bent["tools"][4]["does"][-1] = {"return": "1 / 0"}  # behind two updates
    world = Virtual()
    world.reset({"question": "?", "world": bent, "goal": {}})
    first = world.snapshot()
    with pytest.raises(ToolFault, match="divides by zero"):
        world.call("return_book", {"loan_id": "L1"})
    assert world.snapshot() == first


def test_new_rows_are_compared_without_their_keys_and_free_columns() -> None:
    """Two books may be lent in either order, and the desk's note is nobody's goal."""
    both = [call("borrow_book", **BORROW), call("borrow_book", **BORROW | {"book_id": "B1"})]
    world = begun({"calls": both})
    for made in reversed(both):
        world.call(made["name"], made["arguments"] | {"note": "as asked"})
    assert world.score("").reward == 1
    world.call("extend_loan", {"loan_id": "L1", "due": "2026-07-07"})
    assert world.score("").reward == 0  # nobody asked for it


def test_the_same_row_twice_is_not_once() -> None:
    world = begun({"calls": [call("borrow_book", **BORROW)]})
    for _ in range(2):
        world.call("borrow_book", BORROW)
    assert world.score("").reward == 0


def test_a_task_may_have_tables_of_its_own() -> None:
    rows = {"B7": {"title": "The Old Man and the Sea", "copies": 3},
            "B2": {"title": "Four Reigns", "copies": 0}}
    world = begun(tables={"books": rows})
    assert world.call("find_books", {"title": "sea"}) == [{"id": "B7", **rows["B7"]}]
    assert world.call("find_member", {"email": "mina@example.com"})["loans"] == ["L1"]


@pytest.mark.parametrize("task, told", [
    ({}, "the task's world: 1 problem"), ({"world": {"name": "x"}}, "the task's world: "),
    ({"world": LIBRARY}, "has no goal"),
    ({"world": LIBRARY, "goal": {}, "tables": {"books": {}}}, "book is 'B2', which books has not"),
    ({"world": LIBRARY, "goal": {"calls": [call("borrow_book")]}}, r"calls\[0\] gives no result")])
def test_a_task_that_is_none_is_refused(task: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Virtual().reset({"question": "?", **task})


def test_it_plays_in_a_process_of_its_own_and_goes_on_from_its_state() -> None:
    task = {**Virtual.EXAMPLES[1]}
    with EnvironmentHost(order("virtual", {}), LIMITS["test"]) as host:
        opening = host.reset(task)
        assert opening.tools[0]["function"]["name"] == "find_member"
        assert host.call(ToolCall("return_book", {"loan_id": "L1"})).text == "Four Reigns is back"
        assert host.call(ToolCall("return_book", {"loan_id": "L1"})).fault == "refused"
        state = host.state
        host.resume(task, state)
        assert host.score("Done.").reward == 1


LIBRARY_OF_SPEC = Virtual.EXAMPLES[0]["world"]
FIND, BORROW_OF_SPEC = 1, 2


def edited(edit: Callable[[Any], object]) -> Any:
    world = copy.deepcopy(LIBRARY_OF_SPEC)
    edit(world)
    return world


def test_the_example_is_sound() -> None:
    assert problems_of(LIBRARY_OF_SPEC) == []
    spec = spec_of(LIBRARY_OF_SPEC)
    assert [tool.name for tool in spec.tools.values() if tool.changes] == ["borrow_book", "extend_loan",
                                                                           "return_book"]
    assert spec.tables["loans"].free == {"note"}


@pytest.mark.parametrize("told, edit", [
    ("rules is 'None', must be text", lambda w: w.pop("rules")),
    ("has 'state'; it may have name, rules, tables, tools", lambda w: w.update(state={})),
    ("prefix is '7', must be 1 to 12 letters", lambda w: w["tables"]["books"].update(prefix="7")),
    ("a prefix of its own", lambda w: w["tables"]["books"].update(prefix="M")),
    ("are not id, the key's name", lambda w: w["tables"]["books"]["columns"].update(id={"type": "string"})),
    ("type is 'text', must be one of", lambda w: w["tables"]["books"]["columns"].update(x={"type": "text"})),
    ("references 'shops': must be a table", lambda w: w["tables"]["loans"]["columns"]["book"].update(
        references="shops")),
    ('references "[', lambda w: w["tables"]["loans"]["columns"]["book"].update(references=["books"])),
    ("references 'None'", lambda w: w["tables"]["loans"]["columns"]["book"].update(references=None)),
    ("row B1 of books: copies: Input should be a valid integer",
     lambda w: w["tables"]["books"]["rows"]["B1"].update(copies="1")),
    ("row L1 of loans: member is 'M9', which members has not",
     lambda w: w["tables"]["loans"]["rows"]["L1"].update(member="M9")),
    ("row B2 of books: colour: Extra inputs",
     lambda w: w["tables"]["books"]["rows"]["B2"].update(colour="x")),
    ("tool find_member: stands there twice", lambda w: w["tools"].append(w["tools"][0])),
    ("its name must have letters", lambda w: w["tools"][0].update(name="find member")),
    ("has 'pattern', which nothing would hold to", lambda w: w["tools"][FIND]["parameters"]["properties"][
        "title"].update(pattern="x")),
    ("its default '3' is not of its type", lambda w: w["tools"][FIND]["parameters"]["properties"][
        "on_shelf"].update(default=3)),
    ("required is", lambda w: w["tools"][FIND]["parameters"].update(required=["name"])),
    ("must end with its only `return`", lambda w: w["tools"][FIND]["does"].reverse()),
    ("must be an object with one of get, find", lambda w: w["tools"][FIND]["does"].insert(0, {"do": "it"})),
    ("a find has no 'key'", lambda w: w["tools"][FIND]["does"][0].update(key="title")),
    ("a get needs `key` or `where`", lambda w: w["tools"][0]["does"][0].pop("where")),
    ("the new row of loans lacks due", lambda w: w["tools"][BORROW_OF_SPEC]["does"][6]["row"].pop("due")),
    ("books has no column 'shelf'", lambda w: w["tools"][BORROW_OF_SPEC]["does"][5]["set"].update(shelf="1")),
    ("there is no table 'book'", lambda w: w["tools"][BORROW_OF_SPEC]["does"][5].update(update="book")),
    ("must be a new name", lambda w: w["tools"][FIND]["does"][0].update({"as": "title"})),
    ("`else` must be the sentence", lambda w: w["tools"][BORROW_OF_SPEC]["does"][1].update({"else": 3})),
    ("must be a list of 1 to 32 tools", lambda w: w.update(tools=[]))])
def test_a_rule_that_is_broken_is_told(told: str, edit: Callable[[Any], object]) -> None:
    problems = problems_of(edited(edit))
    assert any(told in problem for problem in problems), problems


@pytest.mark.parametrize("world", [
    None, [], "x", {"tables": float("nan")}, {"tables": {"a": 1, 3: 2}, "tools": [3, None]},
    {"tables": {"a": {"columns": {"b": 3}, "rows": {"A1": None}}}, "tools": [{"does": 4, "name": 3}]},
    {"name": "x", "rules": "y" * 500_000}])
def test_rubbish_is_told_and_never_an_error(world: Any) -> None:
    assert problems_of(world)
    with pytest.raises(UserError):
        spec_of(world)


def test_everything_is_told_at_once() -> None:
    world = edited(lambda w: (w.pop("rules"), w["tables"]["books"].update(prefix=""),
                              w["tools"][FIND]["does"][0].update(where="row.name == titel")))
    assert len(problems_of(world)) == 4


def test_an_object_in_a_result_is_held_to_as_well() -> None:
    spec = spec_of(LIBRARY_OF_SPEC)
    returns = spec.tools["find_books"].returns
    assert returns.problem([{"id": "B1", "title": "x", "copies": 1}]) == ""
    assert returns.problem([{"id": "B1", "title": "x", "copies": "1"}]).startswith("0.copies: ")
    assert returns.problem([{"id": "B1", "title": "x"}]).startswith("0.copies: Field required")


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
