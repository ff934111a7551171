"""Tool schemas from signatures and docstrings, and argument validation."""

from typing import Any, Literal

import pytest
from transformers.utils import get_json_schema

from megatron_sov.base.errors import UserError
from megatron_sov.judge.tools.environment import Tool, ToolFault, build_tool


def find_room(city: str, nights: int, kinds: list[str], view: Literal["sea", "yard"] = "yard",
              price: float | None = None) -> str:
    """
    Find a room that is free. Looks in all houses.

    Args:
        city: Where, in English
            or Korean.
        nights: How many.
        kinds: Any of these.
        view: To which side.
        price: At most.

    Returns:
        Its number.
    """
    return repr((city, nights, kinds, view, price))


def test_schema_equals_transformers() -> None:
    ours, theirs = build_tool(find_room).describe_for_models(), get_json_schema(find_room)
    function, expected = ours["function"], theirs["function"]
    assert (ours["type"], function["name"], function["description"]) == (
        "function", expected["name"], expected["description"])
    schema = function["parameters"]
    assert schema["required"] == expected["parameters"]["required"]
    expected_properties = expected["parameters"]["properties"]
    for name, argument in expected_properties.items():
        assert schema["properties"][name]["description"] == argument["description"]
    for name in ("city", "nights", "kinds"):
        assert schema["properties"][name]["type"] == expected_properties[name]["type"]
    assert schema["properties"]["view"] == {"enum": ["sea", "yard"], "type": "string", "default": "yard",
                                            "description": "To which side."}


def test_arguments_of_the_right_types_reach_the_function() -> None:
    tool = build_tool(find_room)
    assert tool.call({"city": "Busan", "nights": 2, "kinds": ["a"]}) == "('Busan', 2, ['a'], 'yard', None)"
    result = tool.call({"city": "", "nights": 0, "kinds": [], "view": "sea", "price": 1})
    assert result.endswith("'sea', 1.0)")


@pytest.mark.each("change, message", [
    ({"nights": "2"}, "nights: Input should be a valid integer"), ({"nights": True}, "nights: "),
    ({"nights": 2.5}, "nights: "), ({"kinds": "a"}, "kinds: "), ({"kinds": [1]}, "kinds.0: "),
    ({"view": "lake"}, "view: Input should be 'sea' or 'yard'"), ({"city": None}, "city: "),
    ({"x": 1}, "x: there is no such argument")])
def test_arguments_of_other_types_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolFault, match="find_room was given wrong arguments") as caught:
        build_tool(find_room).call({"city": "Busan", "nights": 2, "kinds": ["a"]} | change)
    assert caught.value.code == "arguments" and message in caught.value.reason


def untyped(x) -> None:
    """Take anything."""


def silent(x: int) -> None:
    pass


def many(*x: int) -> None:
    """Take many."""


def odd(x: Tool) -> None:
    """Take a tool."""


@pytest.mark.each("function, message", [(untyped, "must have a name and a type"),
                                        (silent, "has no docstring"), (many, "must have a name"),
                                        (odd, "have no JSON schema")])
def test_functions_without_a_schema_are_refused(function: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"tool {function.__name__}: .*{message}"):
        build_tool(function)
