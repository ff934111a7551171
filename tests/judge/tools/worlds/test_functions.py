"""Calls that a model writes against those that are accepted, in the leaderboard's way."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from megatron_sov.base.errors import UserError
from megatron_sov.judge.tools.registry import make, order
from megatron_sov.judge.tools.worlds.functions import _all_matched

FUNCTIONS = [
    {
        "name": name,
        "description": "d",
        "parameters": {
            "type": "dict",
            "properties": {
                "city": {"type": "string"},
                "share": {"type": "float"},
                "at": {"type": "tuple", "items": {"type": "integer"}},
            },
        },
    }
    for name in ("get_weather", "get_time")
]


def reward(calls: list[Any], wanted: list[Any]) -> float:
    world, _ = make(order("functions", {}))
    world.reset({"question": "q", "functions": FUNCTIONS, "calls": wanted})
    for name, arguments in calls:
        world.call(name, arguments)
    state = json.loads(json.dumps(world.snapshot()))
    world.restore(state)
    score = world.score("")
    return score if isinstance(score, float) else score.reward


def wants(**accepted: list[Any]) -> list[Any]:
    return [{"name": "get_weather", "arguments": accepted}]


@pytest.mark.parametrize(
    ("arguments", "accepted", "right"),
    [
        ({"city": "Seoul"}, {"city": ["Seoul"]}, 1),
        ({"city": "seoul."}, {"city": ["Seoul"]}, 1),
        ({"city": "New York, NY"}, {"city": ["Seoul", "new york ny"]}, 1),
        ({"city": "Busan"}, {"city": ["Seoul"]}, 0),
        ({"city": "Seoul"}, {"city": ["Seoul"], "share": [0.5, ""]}, 1),
        ({"city": "Seoul"}, {"city": ["Seoul"], "share": [0.5]}, 0),
        ({"city": "Seoul", "share": 0.5}, {"city": ["Seoul"]}, 0),
        ({"share": 2}, {"share": [2.0]}, 1),
        ({"share": "2"}, {"share": [2.0]}, 0),
        ({"share": True}, {"share": [1]}, 0),
        ({"share": 1}, {"share": [True]}, 0),
        ({"at": [1, 2]}, {"at": [[1, 2]]}, 1),
        ({"at": [2, 1]}, {"at": [[1, 2]]}, 0),
        ({"at": [1]}, {"at": [[1, 2]]}, 0),
        ({"at": {"x": "A", "y": 2}}, {"at": [{"x": ["a"], "y": [1, 2]}]}, 1),
        ({"at": {"x": "A"}}, {"at": [{"x": ["a"], "y": [1]}]}, 0),
        ({}, {"city": ["Seoul", ""]}, 1),
    ],
)
def test_a_call_fits_where_each_argument_is_accepted(arguments: Any, accepted: Any, right: int) -> None:
    assert reward([("get_weather", arguments)], wants(**accepted)) == right


def test_calls_fit_one_for_one_in_any_order() -> None:
    seoul, either = {"city": ["Seoul"]}, {"city": ["Seoul", "Busan"]}
    wanted = [{"name": "get_weather", "arguments": either}, {"name": "get_weather", "arguments": seoul}]
    first, second = ("get_weather", {"city": "Seoul"}), ("get_weather", {"city": "Busan"})
    assert reward([first, second], wanted) == reward([second, first], wanted) == 1
    assert (
        reward([first], wanted)
        == reward([second, second], wanted)
        == reward([first, first, second], wanted)
        == 0
    )
    assert reward([first, ("get_time", {"city": "Busan"})], wanted) == 0
    assert reward([], []) == 1  # nothing to call, and nothing called
    assert reward([first], []) == 0


@given(st.lists(st.lists(st.integers(0, 4), max_size=5), max_size=5))
def test_matching_is_what_trying_all_ways_finds(fits: list[list[int]]) -> None:
    tried = any(
        all(call in fit for call, fit in zip(chosen, fits, strict=True))
        for chosen in itertools.permutations(range(5), len(fits))
    )
    assert _all_matched(fits) == tried


def test_functions_are_shown_as_openai_describes_them() -> None:
    world, _ = make(order("functions", {}))
    observation = world.reset(world.EXAMPLES[0])  # type: ignore[attr-defined]
    assert (observation.user, observation.system) == (
        "What is the weather in Seoul, in degrees Celsius?",
        "",
    )
    world.reset({"question": "q", "functions": FUNCTIONS, "calls": []})
    shown = world.tools()[0]["function"]
    assert shown["parameters"]["type"] == "object"
    assert [part["type"] for part in shown["parameters"]["properties"].values()] == [
        "string",
        "number",
        "array",
    ]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"functions": [], "calls": []}, "functions must be a list"),
        ({"functions": [{}], "calls": []}, "with a name"),
        ({"functions": FUNCTIONS}, "calls must be a list"),
        ({"functions": FUNCTIONS, "calls": [{"name": "f"}]}, "calls must"),
        ({"functions": FUNCTIONS, "calls": [{"name": "f", "arguments": {"a": 1}}]}, "calls must"),
        ({"functions": [{"name": "f", "parameters": 3}], "calls": []}, "no object"),
    ],
)
def test_a_task_of_another_form_is_refused(task: dict[str, Any], said: str) -> None:
    world, _ = make(order("functions", {}))
    with pytest.raises(UserError, match=said):
        world.reset({"question": "q", **task})
