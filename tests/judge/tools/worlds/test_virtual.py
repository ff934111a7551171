"""The `virtual` world: tables and tools that a task defines, their validation, and goals of tasks."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.chat.tool_calls import ToolCall
from megatron_sov.judge.tools.environment import LIMITS, ToolFault
from megatron_sov.judge.tools.host import EnvironmentHost
from megatron_sov.judge.tools.registry import request_environment
from megatron_sov.judge.tools.worlds import virtual
from megatron_sov.judge.tools.worlds.virtual import Virtual, find_world_problems, read_world

LIBRARY = Virtual.EXAMPLES[0]["world"]
BORROW = {"member_id": "M1", "book_id": "B3", "due": "2026-06-30"}


def begin_task(goal: Any = None, **more: Any) -> Virtual:
    """Return a world after the reset with a task of the example library, this goal and further fields."""
    world = Virtual()
    world.reset({"question": "?", "world": LIBRARY, "goal": goal or {}, **more})
    return world


def build_call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


@pytest.mark.each("name, arguments, code, message", [
    ("borrow_book", {**BORROW, "member_id": "M2"}, "refused", "card is not active"),
    ("borrow_book", {**BORROW, "book_id": "B2"}, "refused", "no copy is on the shelf"),
    ("borrow_book", {**BORROW, "book_id": "B9"}, "refused", "there is no 'B9' in books"),
    ("borrow_book", {**BORROW, "due": "soon"}, "refused", "written YYYY-MM-DD"),
    ("borrow_book", {**BORROW, "note": 3}, "arguments", "note: "),
    ("borrow_book", {"member_id": "M1"}, "arguments", "book_id: is missing"),
    ("find_member", {"email": "nobody"}, "refused", "no member has this address"),
    ("fly", {}, "unknown_tool", "there is no tool 'fly'")])
def test_a_refused_call_does_not_change_state(name: str, arguments: Any, code: str, message: str) -> None:
    world = begin_task()
    first = world.snapshot()
    with pytest.raises(ToolFault, match=message) as fault:
        world.call(name, arguments)
    assert fault.value.code == code and world.snapshot() == first


@pytest.mark.parametrize("last, code, message", [
    ("1 / 0", "failed", "ZeroDivisionError"), ("raise SystemExit", "failed", "SystemExit"),
    ("print('x'); loan['status'] = 3", "state", "row L1 of loans: status"),
    ("tables['loans'] = {}; return {1}", "failed", "not JSON serializable"),
    ("tables.pop('books')", "state", "the tables must be"), ("while True: pass", "failed", "processor")])
def test_code_that_fails_halfway_leaves_the_tables_as_they_were(last: str, code: str, message: str,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual, "CALL_LIMITS", replace(virtual.CALL_LIMITS, cpu_s=0.5))
    ending = 'return f"{book[\'title\']} is back"'
    failing = edit_world(lambda world: world.update(code=world["code"].replace(ending, last)))
    assert failing != LIBRARY
    world = begin_task(world=failing)
    first = world.snapshot()
    with pytest.raises(ToolFault, match=f"(?i){message}") as fault:
        world.call("return_book", {"loan_id": "L1"})
    assert fault.value.code == code and world.snapshot() == first


def test_new_rows_are_compared_without_their_keys_and_free_columns() -> None:
    """Two books may be lent in either order, and `note` is a free column."""
    calls = [build_call("borrow_book", **BORROW), build_call("borrow_book", **BORROW | {"book_id": "B1"})]
    world = begin_task({"calls": calls})
    for call in reversed(calls):
        world.call(call["name"], call["arguments"] | {"note": "as asked"})
    assert world.score("").reward == 1
    world.call("extend_loan", {"loan_id": "L1", "due": "2026-07-07"})
    assert world.score("").reward == 0  # a change that the task does not require


def test_the_same_row_twice_is_not_once() -> None:
    world = begin_task({"calls": [build_call("borrow_book", **BORROW)]})
    for _ in range(2):
        world.call("borrow_book", BORROW)
    assert world.score("").reward == 0


def test_a_task_may_define_its_own_tables() -> None:
    rows = {"B7": {"title": "The Old Man and the Sea", "copies": 3},
            "B2": {"title": "Four Reigns", "copies": 0}}
    world = begin_task(tables={"books": rows})
    assert world.call("find_books", {"title": "sea"}) == [{"id": "B7", **rows["B7"]}]
    assert world.call("find_member", {"email": "mina@example.com"})["loans"] == ["L1"]


@pytest.mark.each("task, message", [
    ({}, "the task's world: 1 problem"), ({"world": {"name": "x"}}, "the task's world: "),
    ({"world": LIBRARY}, "has no goal"),
    ({"world": LIBRARY, "goal": {}, "tables": {"books": {"B1": {}}}}, "title: Field required"),
    ({"world": LIBRARY, "goal": {}, "tables": {"flights": {}}}, "tables must be an object of members"),
    ({"world": LIBRARY, "goal": {"answers": [1]}}, "must be a list of texts"),
    ({"world": LIBRARY, "goal": {"calls": [build_call("borrow_book")]}}, r"calls\[0\] gives no result")])
def test_invalid_tasks_are_refused(task: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Virtual().reset({"question": "?", **task})


def test_world_resumes_in_a_process_from_its_state() -> None:
    task = {**Virtual.EXAMPLES[1]}
    with EnvironmentHost(request_environment("virtual", {}), LIMITS["test"]) as host:
        opening = host.reset(task)
        assert opening.tools[0]["function"]["name"] == "find_member"
        assert host.call(ToolCall("return_book", {"loan_id": "L1"})).text == "Four Reigns is back"
        assert host.call(ToolCall("return_book", {"loan_id": "L1"})).fault == "refused"
        state = host.state
        host.resume(task, state)
        assert host.score("Done.").reward == 1


@pytest.mark.each("answer, counts", [("It costs 220.", True), ("$220!", True), ("1,220", False),
                                     ("220.5", False), ("2200", False), ("A220", False)])
def test_answers_match_complete_words(answer: str, counts: bool) -> None:
    assert begin_task({"answers": ["220"]}).score(answer).reward == counts


def edit_world(edit: Callable[[Any], object]) -> Any:
    """Return a copy of the example library that `edit` has changed in place."""
    world = copy.deepcopy(LIBRARY)
    edit(world)
    return world


def edit_code(old: str, new: str) -> Callable[[Any], object]:
    """Return an edit for `edit_world` that replaces text of the world's code."""
    return lambda world: world.update(code=world["code"].replace(old, new))


def test_example_world_is_valid() -> None:
    assert find_world_problems(LIBRARY) == []
    borrow = begin_task().tools()[2]["function"]
    assert borrow["description"] == "Lend a book to a member."
    assert borrow["parameters"]["required"] == ["member_id", "book_id", "due"]
    assert borrow["parameters"]["properties"]["book_id"] == {
        "type": "string", "description": "as find_books gives it."}


@pytest.mark.each("message, edit", [
    ("rules is 'None', must be text", lambda w: w.pop("rules")),
    ("has 'state'; it may have code, examples", lambda w: w.update(state={})),
    ("'text' is no type; a type is made of", lambda w: w["tables"]["books"]["columns"].update(x="text")),
    ("is no type", lambda w: w["tables"]["books"]["columns"].update(x="__import__('os')")),
    ("tables.books.free: must be a list of columns", lambda w: w["tables"]["books"].update(free=["x"])),
    ("row B1 of books: copies: Input should be a valid integer",
     lambda w: w["tables"]["books"]["rows"]["B1"].update(copies="1")),
    ("row B2 of books: colour: Extra inputs",
     lambda w: w["tables"]["books"]["rows"]["B2"].update(colour="x")),
    ("code: is no Python", edit_code("def find_books(", "def find books(")),
    ("code: imports os.path; it may import", edit_code("from datetime import date", "import os.path")),
    ("code: uses .today", edit_code("date.fromisoformat(text)", "date.today()")),
    ("tool find_books: its argument title must have a type", edit_code("title: str", "title")),
    ("tool find_books: must take `tables` first", edit_code("def find_books(tables, ", "def find_books(")),
    ("tool find_books: 'open(1)' is no type", edit_code("title: str", "title: open(1)")),
    ("find_books was given wrong arguments: title", edit_code("title: str", "title: Literal[('a',)]")),
    ("tables.books.free: must be a list of columns", lambda w: w["tables"]["books"].update(free=[["x"]])),
    ("tool return_book: has no docstring", edit_code('"""Take a book back.', 'f"""Take a book back.')),
    ("examples: have no call of return_book", lambda w: w["examples"].pop()),
    ("examples[0]: find_member was given wrong arguments: email",
     lambda w: w["examples"][0].update(arguments={})),
    ("examples[0]: there is no tool 'fly'", lambda w: w["examples"][0].update(name="fly"))])
def test_broken_rules_are_reported(message: str, edit: Callable[[Any], object]) -> None:
    problems = find_world_problems(edit_world(edit))
    assert any(message in problem for problem in problems), problems


@pytest.mark.each("kind", [
    "'{}'", "list['{}']", "str | '{}'", "dict[str, '{}']", "list[Literal['a'], '{}']", "(str, int)", "3"])
def test_no_type_of_a_world_is_evaluated_in_this_process(kind: str, tmp_path: Path) -> None:
    """Pydantic would evaluate a forward reference, a type given as text, as Python."""
    kind = kind.format(f"open({str(tmp_path / 'made')!r}, chr(119)).close()".replace("'", '"'))
    column = edit_world(lambda w: w["tables"]["books"]["columns"].update(x=kind))
    for world in (column, edit_world(edit_code("title: str", f"title: {kind}"))):
        assert any("is no type" in problem for problem in find_world_problems(world))
    assert not (tmp_path / "made").exists()


@pytest.mark.each("world", [
    None, [], "x", {"tables": float("nan")}, {"tables": {"a": 1}, "code": 3, "examples": [3, None]},
    {"tables": {"a": {"columns": {"b": 3}, "rows": {"A1": None}}}, "code": "def f(): pass"},
    {"name": "x", "rules": "y" * 500_000}])
def test_malformed_worlds_are_reported(world: Any) -> None:
    assert find_world_problems(world)
    with pytest.raises(UserError):
        read_world(world)


def test_all_problems_are_reported() -> None:
    world = edit_world(lambda w: (w.pop("rules"), w["tables"]["books"].update(rows=[]), w["examples"].pop()))
    assert len(find_world_problems(world)) == 3
