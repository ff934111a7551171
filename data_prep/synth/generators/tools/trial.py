"""A described world tried out: its tools are called with drawn arguments of the declared types, from many
states, and held to what they declare.

Most arguments fit the tables, so that tools come through; the others are anything that the schema allows, so
that what it allows and the tool cannot do comes to light.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.synth.generators.tools.draws import Draws
from data_prep.synth.generators.tools.hints import places_of, values_of
from megatron_sov.tools.faults import ToolFault
from megatron_sov.tools.virtual.spec import ToolSpec, spec_of
from megatron_sov.tools.worlds.virtual import Virtual

MAX_STATES = 24
"""That calls begin from."""
FITTING = 0.7
"""Share of arguments that fit the tables."""
LEFT_OUT = 0.4
"""Share of optional arguments that are left out."""
TEXTS = ("alpha", "Zz 9", "")
NUMBERS = (0, 1, 2, 3, 7, -1, 100)
LIES = ("failed", "result", "state")
"""Faults that are the world's own."""


@dataclass
class Trial:
    """What came of it."""

    num_calls: int = 0
    successes: dict[str, int] = field(default_factory=dict)
    """Tool -> calls that gave a result."""
    changes: dict[str, int] = field(default_factory=dict)
    """Tool -> calls that changed a table."""
    lies: list[str] = field(default_factory=list)
    """Sentences: a call that the schema allows and the tool or its world does not, an argument that nothing
    uses, a call that cannot be made again."""


def tried(world: Mapping[str, Any], name: str, calls_per_tool: int) -> Trial:
    """Return what comes of calling a sound world's tools.

    Args:
        world: its description.
        name: of the stream that arguments are drawn from.
        calls_per_tool: to make.
    """
    spec, draws, trial = spec_of(world), Draws("trial", name), Trial()
    virtual = Virtual()
    virtual.reset({"question": "", "world": world, "goal": {}})
    states = [virtual.snapshot()]
    trial.lies += [f"tool {tool.name}: nothing uses its argument {argument}"
                   for tool in spec.tools.values() for argument in sorted(_ignored(tool))]
    places = {tool.name: places_of(tool) for tool in spec.tools.values()}
    for _ in range(calls_per_tool):
        for tool in spec.tools.values():
            state = draws.one(states)
            arguments = _arguments(tool, values_of(spec, places[tool.name], state), draws)
            after = _call(virtual, tool, state, arguments, trial)
            if after is not None and after != state and len(states) < MAX_STATES:
                states.append(after)
    return trial


def _call(virtual: Virtual, tool: ToolSpec, state: Any, arguments: dict[str, Any], trial: Trial) -> Any:
    """Make a call twice; returns the state behind it, or None where there was no result."""
    virtual.restore(state)
    trial.num_calls += 1
    shown = json.dumps(arguments, ensure_ascii=False)[:160]
    try:
        result, after = virtual.call(tool.name, arguments), virtual.snapshot()
    except ToolFault as e:
        if e.code in LIES and not any(lie.startswith(f"tool {tool.name}: ") for lie in trial.lies):
            trial.lies.append(f"tool {tool.name}: its schema allows {shown}, and the call {e.reason}")
        if e.code == "arguments":
            trial.lies.append(f"tool {tool.name}: refuses arguments of its schema: {e.reason}")
        return None
    virtual.restore(state)
    if (virtual.call(tool.name, arguments), virtual.snapshot()) != (result, after):
        trial.lies.append(f"tool {tool.name}: the same call {shown} gives something else")
    trial.successes[tool.name] = trial.successes.get(tool.name, 0) + 1
    if after != state:
        trial.changes[tool.name] = trial.changes.get(tool.name, 0) + 1
    return after


def _ignored(tool: ToolSpec) -> set[str]:
    used = {name for step in tool.steps for expression in step.expressions() for name in expression.names}
    return set(tool.parameters) - used


def _arguments(tool: ToolSpec, fitting: Mapping[str, list[Any]], draws: Draws) -> dict[str, Any]:
    """Return arguments that the tool's schema allows, many of them from those that fit."""
    found = {}
    for name, schema in tool.schemas.items():
        if not tool.is_required(name) and draws.share() < LEFT_OUT:
            continue
        values = [value for value in fitting[name] if not tool.held[name].problem(value)]
        found[name] = (copy.deepcopy(draws.one(values)) if values and draws.share() < FITTING
                       else _anything(schema, draws))
    return found


def _anything(schema: Mapping[str, Any], draws: Draws) -> Any:
    """Return some value that a schema allows."""
    if "enum" in schema:
        return draws.one(schema["enum"])
    named = schema["type"]
    kind = draws.one(named) if isinstance(named, list) else named
    if kind == "object":
        return {name: _anything(part, draws) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [_anything(schema["items"], draws) for _ in range(draws.below(3))]
    simple: dict[str, tuple[Any, ...]] = {"string": TEXTS, "integer": NUMBERS, "boolean": (True, False),
                                          "number": (*NUMBERS, 0.5), "null": (None,)}
    return draws.one(simple[kind])
