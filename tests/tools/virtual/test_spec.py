"""What a description of a world may say; all that is wrong is told at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from megatron_sov.errors import UserError
from megatron_sov.tools.virtual.spec import problems_of, spec_of
from megatron_sov.tools.worlds.virtual import Virtual

LIBRARY = Virtual.EXAMPLES[0]["world"]
FIND, BORROW = 1, 2


def edited(edit: Callable[[Any], object]) -> Any:
    world = copy.deepcopy(LIBRARY)
    edit(world)
    return world


def test_the_example_is_sound() -> None:
    assert problems_of(LIBRARY) == []
    spec = spec_of(LIBRARY)
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
    ("the new row of loans lacks due", lambda w: w["tools"][BORROW]["does"][6]["row"].pop("due")),
    ("books has no column 'shelf'", lambda w: w["tools"][BORROW]["does"][5]["set"].update(shelf="1")),
    ("there is no table 'book'", lambda w: w["tools"][BORROW]["does"][5].update(update="book")),
    ("must be a new name", lambda w: w["tools"][FIND]["does"][0].update({"as": "title"})),
    ("`else` must be the sentence", lambda w: w["tools"][BORROW]["does"][1].update({"else": 3})),
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
    spec = spec_of(LIBRARY)
    returns = spec.tools["find_books"].returns
    assert returns.problem([{"id": "B1", "title": "x", "copies": 1}]) == ""
    assert returns.problem([{"id": "B1", "title": "x", "copies": "1"}]).startswith("0.copies: ")
    assert returns.problem([{"id": "B1", "title": "x"}]).startswith("0.copies: Field required")
