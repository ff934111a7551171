"""Functions that a task describes and nobody runs: what counts is which calls a model writes.

In the style of the Berkeley Function Calling Leaderboard (gorilla-llm, its check of syntax trees): a call is
right where its name fits and each argument is one of those that are accepted; the order of calls does not
count, and one too many is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.reward import Score
from megatron_sov.judge.tools.environment import Observation, Task, ToolFault, World

LEFT_OUT = ""
"""Among accepted values: the argument may be left out."""
_NOISE = re.compile(r"[ ,./\-_*^'\"]")


@dataclass
class Functions(World):
    """Notes calls; gives 1 where they are the task's `calls`, each {"name", "arguments": {argument: [accepted
    values]}}, else 0."""

    EXAMPLES = ({
        "question": "What is the weather in Seoul, in degrees Celsius?",
        "functions": [{"name": "get_weather", "description": "Get the weather of a city.", "parameters": {
            "type": "object", "required": ["city"], "properties": {
                "city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}}}}],
        "calls": [{"name": "get_weather", "arguments": {"city": ["Seoul"], "unit": ["celsius", LEFT_OUT]}}]},)

    def reset(self, task: Task) -> Observation:
        """Begin an episode of a task that has functions and calls."""
        observation = super().reset(task)
        functions = task.get("functions")
        if not isinstance(functions, list) or not functions:
            raise UserError("the task's functions must be a list of functions as OpenAI describes them")
        self._tools = [_described(function) for function in functions]
        wanted = task.get("calls")
        if not isinstance(wanted, list) or not all(map(_is_call, wanted)):
            raise UserError('the task\'s calls must be a list of {"name": ..., "arguments": {argument: '
                            "[accepted values]}}; empty where none is right")
        self._wanted = wanted
        return observation

    def first_state(self, task: Task) -> dict[str, Any]:
        return {"calls": []}

    def tools(self) -> list[dict[str, Any]]:
        return self._tools

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Note a call.

        Raises:
            ToolFault: the arguments are no object.
        """
        if not isinstance(arguments, Mapping):
            raise ToolFault("arguments", f"{name} was given no object of arguments")
        self.state["calls"].append({"name": name, "arguments": dict(arguments)})
        return "noted"

    def score(self, answer: str) -> Score:
        """Return whether the calls are those that are wanted, one for one."""
        made = self.state["calls"]
        # one call may fit several wanted ones, so the first that fits need not be the right one: matched
        # below
        fits = [[i for i, call in enumerate(made) if _fits(call, wanted)] for wanted in self._wanted]
        right = len(made) == len(self._wanted) and _all_matched(fits)
        return Score(float(right), {"calls": len(made), "wanted": len(self._wanted)})


def _described(function: Any) -> dict[str, Any]:
    """Return a function as OpenAI describes tools; the leaderboard's files have `dict` for `object`."""
    function = function.get("function", function) if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError("each of the task's functions must be an object with a name")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise UserError(f"the function {function['name'][:60]!r} has parameters that are no object")
    return {"type": "function", "function": {"name": function["name"],
                                             "description": str(function.get("description", "")),
                                             "parameters": _json_schema(parameters)}}


def _json_schema(value: Any) -> Any:
    """Return a schema with JSON schema's names of types in place of Python's."""
    if isinstance(value, list):
        return [_json_schema(part) for part in value]
    if not isinstance(value, dict):
        return value
    # templates and models know JSON schema's names
    names = {"dict": "object", "float": "number", "tuple": "array"}
    return {key: names.get(part, part) if key == "type" and isinstance(part, str) else _json_schema(part)
            for key, part in value.items()}


def _is_call(call: Any) -> bool:
    return (isinstance(call, dict) and isinstance(call.get("name"), str)
            and isinstance(call.get("arguments"), dict)
            and all(isinstance(accepted, list) and accepted for accepted in call["arguments"].values()))


def _fits(call: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a call is a wanted one: no argument of another value, none missing, none too many."""
    given, accepted = call["arguments"], wanted["arguments"]
    if call["name"] != wanted["name"] or not set(given) <= set(accepted):
        return False
    for name, values in accepted.items():
        if name not in given:
            if LEFT_OUT not in values:
                return False
        elif not any(_same(given[name], value) for value in values):
            return False
    return True


def _same(given: Any, wanted: Any) -> bool:
    """Return whether two values are the same to the leaderboard: case, blanks and some marks do not count,
    nor whether a whole number has a point."""
    if isinstance(given, str) and isinstance(wanted, str):
        return _NOISE.sub("", given).casefold() == _NOISE.sub("", wanted).casefold()
    if isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if isinstance(given, list) and isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(_same, given, wanted))
    if isinstance(given, dict) and isinstance(wanted, dict):
        # inside an object each value is a list of accepted ones, as on the outside
        lists = {key: value if isinstance(value, list) else [value] for key, value in wanted.items()}
        return _fits({"name": "", "arguments": given}, {"name": "", "arguments": lists})
    return bool(given == wanted)


def _all_matched(fits: list[list[int]]) -> bool:
    """Return whether each wanted call has a call of its own among those that fit (augmenting paths)."""
    taken: dict[int, int] = {}

    def find_call(wanted: int, seen: set[int]) -> bool:
        for call in fits[wanted]:
            if call not in seen:
                seen.add(call)
                # Kuhn's step: the wanted call that has this one takes another, if it can
                if call not in taken or find_call(taken[call], seen):
                    taken[call] = wanted
                    return True
        return False

    return all(find_call(wanted, set()) for wanted in range(len(fits)))
