"""Worlds that are data: how their tools act, and when a goal is reached."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from megatron_sov.chat.tool_calls import ToolCall
from megatron_sov.errors import UserError
from megatron_sov.tools.faults import ToolFault
from megatron_sov.tools.host import EnvironmentHost
from megatron_sov.tools.limits import LIMITS
from megatron_sov.tools.registry import order
from megatron_sov.tools.worlds.virtual import Virtual

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
