"""Trial of a virtual world: its tools are called with drawn arguments of their schemas, from many states.

Most arguments fit the tables, so that tools give results; the others are anything that the schema allows, so
that arguments come to light which it allows and the tool cannot take.
"""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from data_prep.synth.generator import SampleVerdict
from data_prep.synth.generators.drawing import draws_of
from megatron_sov.base.documents.messages import BadRecord, refuse_deep
from megatron_sov.judge.rewards.patterns import NO_JSON, json_of
from megatron_sov.judge.rewards.reward import Refused
from megatron_sov.judge.tools.environment import ToolFault
from megatron_sov.judge.tools.virtual.spec import Spec, ToolSpec, problems_of, spec_of
from megatron_sov.judge.tools.virtual.steps import Tables, WorldStep
from megatron_sov.judge.tools.worlds.virtual import Virtual

MIN_TOOLS, MIN_CHANGING_TOOLS, MIN_ROWS = 4, 2, 6
DAYS = ("2026-03-02", "2026-07-15", "2027-01-31")
"""Arguments that are days, beside those of the tables."""
DAY_FUNCTIONS = {"days", "is_day"}
MAX_STATES = 24
"""States that calls begin from."""
FITTING_SHARE, LEFT_OUT_SHARE = 0.7, 0.4
"""Of arguments, those that fit the tables; of optional ones, those that are left out."""
SIMPLE: Mapping[str, Sequence[Any]] = {
    "string": ("alpha", "Zz 9", ""), "integer": (0, 1, 2, 3, 7, -1, 100), "boolean": (True, False),
    "number": (0, 1, 2, 3, 7, -1, 100, 0.5), "null": (None,)}
WORLD_FAULTS = ("failed", "result", "state", "arguments")
"""Codes of faults that are the world's own where a call keeps to the schema."""


def json_object(reply: str) -> dict[str, Any] | str:
    """Return the JSON object of a reply, with or without words around it, or a sentence about its fault."""
    if getattr(reply, "cut", False):
        return "the answer was cut off at its limit of tokens"
    begin, end = reply.find("{"), reply.rfind("}")
    try:
        found = json_of(reply)
        if found is NO_JSON and 0 <= begin < end:
            found = json_of(reply[begin:end + 1])
        if found is not NO_JSON:
            refuse_deep(found)
            # numbers and characters that the journal cannot hold fail here
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (BadRecord, Refused, ValueError, RecursionError) as e:
        return f"the answer holds no JSON that can be kept ({str(e)[:100]})"
    return found if isinstance(found, dict) else "the answer is no JSON object"


def world_verdicts(world: Mapping[str, Any], name: str, calls_per_tool: int) -> list[SampleVerdict]:
    """Return the verdicts on a world; of one without a sound description the first alone.

    Args:
        world: its description.
        name: of the stream that arguments are drawn from.
        calls_per_tool: drawn calls.
    """
    if problems := problems_of(world):
        return [_verdict("sound", problems)]
    spec = spec_of(world)
    trial = Trial(world, spec, draws_of("trial", name))
    trial.run(calls_per_tool)
    changing = [tool.name for tool in spec.tools.values() if tool.changes]
    counts = (("tools", len(spec.tools), MIN_TOOLS), ("tools that change a table", len(changing),
              MIN_CHANGING_TOOLS), ("rows", sum(len(t.rows) for t in spec.tables.values()), MIN_ROWS))
    return [
        _verdict("sound", []),
        _verdict("size", [f"world: has {count} {what}, fewer than {least}"
                          for what, count, least in counts if count < least]),
        _verdict("distinct tools", _repeated_tools(world["tools"])),
        _verdict("honest schema", [*trial.unused_arguments(), *trial.faults.values()]),
        _verdict("every tool comes through", [
            f"tool {tool}: none of {calls_per_tool} drawn calls gave a result, also with arguments that fit "
            "the tables" for tool in spec.tools if tool not in trial.successful]),
        _verdict("every change takes place", [
            f"tool {tool}: has steps that change a table, and none of its calls did"
            for tool in changing if tool in trial.successful and tool not in trial.changing])]


def _verdict(check: str, problems: Sequence[str]) -> SampleVerdict:
    return SampleVerdict(check, not problems, "\n".join(problems))


def _repeated_tools(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each tool that says or does the same as an earlier one, which leaves the choice
    between them to chance."""
    found, known = [], dict[str, str]()
    for tool in tools:
        says = " ".join(str(tool["description"]).casefold().split())
        does = json.dumps([tool["does"], tool.get("parameters"), tool.get("returns")], sort_keys=True)
        for what, value in (("says", says), ("does", does)):
            if value in known:
                found.append(f"tool {tool['name']}: {what} the same as {known[value]}")
            known.setdefault(value, tool["name"])
    return found


@dataclass
class Trial:
    """Drawn calls of a world's tools, and their outcome."""

    world: Mapping[str, Any]
    spec: Spec
    draws: Random
    successful: set[str] = field(default_factory=set)
    """Tools of which a call gave a result."""
    changing: set[str] = field(default_factory=set)
    """Tools of which a call changed a table."""
    faults: dict[str, str] = field(default_factory=dict)
    """Tool -> a call that its schema allows and the tool or its world does not."""

    def run(self, calls_per_tool: int) -> None:
        """Call each tool so often."""
        virtual = Virtual()
        virtual.reset({"question": "", "world": self.world, "goal": {}})
        states = [virtual.snapshot()]
        for _ in range(calls_per_tool):
            for tool in self.spec.tools.values():
                before = self.draws.choice(states)
                virtual.restore(before)
                self._call(virtual, tool, self._arguments(tool, before))
                after = virtual.snapshot()
                # later calls begin there too: some tools need what another one has changed
                if after != before:
                    self.changing.add(tool.name)
                    states = [*states, after][:MAX_STATES]

    def unused_arguments(self) -> list[str]:
        """Return a sentence for each argument that no step of its tool reads."""
        found = []
        for tool in self.spec.tools.values():
            used = {name for step in tool.steps for expression in step.expressions()
                    for name in expression.names}
            found += [f"tool {tool.name}: nothing uses its argument {name}"
                      for name in sorted(set(tool.parameters) - used)]
        return found

    def _call(self, virtual: Virtual, tool: ToolSpec, arguments: Mapping[str, Any]) -> None:
        try:
            virtual.call(tool.name, arguments)
            self.successful.add(tool.name)
        except ToolFault as e:
            if e.code in WORLD_FAULTS:
                shown = json.dumps(arguments, ensure_ascii=False)[:160]
                self.faults.setdefault(
                    tool.name, f"tool {tool.name}: its schema allows {shown}, and the call {e.reason}")

    def _arguments(self, tool: ToolSpec, tables: Tables) -> dict[str, Any]:
        """Return arguments that the tool's schema allows, many of which fit the tables."""
        found = {}
        for name, schema in tool.schemas.items():
            if not tool.is_required(name) and self.draws.random() < LEFT_OUT_SHARE:
                continue
            fitting = [value for place in places_of(tool).get(name, ())
                       for value in values_at(self.spec, place, tables)
                       if value is not None and not tool.held[name].problem(value)]
            # a tool may change a list that it is given, and the next call would get it
            found[name] = (copy.deepcopy(self.draws.choice(fitting))
                           if fitting and self.draws.random() < FITTING_SHARE else self._any_value(schema))
        return found

    def _any_value(self, schema: Mapping[str, Any]) -> Any:
        if "enum" in schema:
            return self.draws.choice(schema["enum"])
        named = schema["type"]
        kind = self.draws.choice(named) if isinstance(named, list) else named
        if kind == "object":
            return {name: self._any_value(part) for name, part in schema.get("properties", {}).items()}
        if kind == "array":
            return [self._any_value(schema["items"]) for _ in range(self.draws.randrange(3))]
        return self.draws.choice(SIMPLE[kind])


def places_of(tool: ToolSpec) -> dict[str, list[tuple[str, str]]]:
    """Return argument -> tables and columns whose values it is likely to take: keys of rows that it names,
    columns that it is compared with or written into; no table: it is a day."""
    found: dict[str, dict[tuple[str, str], None]] = {}
    for step in tool.steps:
        for argument, table, column in _places(step):
            found.setdefault(argument, {})[table, column] = None
    return {argument: list(places) for argument, places in found.items()}


def _places(step: WorldStep) -> Iterator[tuple[str, str, str]]:
    if "key" in step.values and isinstance(step.values["key"].tree, ast.Name):
        yield step.values["key"].tree.id, step.table, "id"
    for column, value in step.columns.items():
        if step.table and isinstance(value.tree, ast.Name):
            yield value.tree.id, step.table, column
    for node in (node for expression in step.expressions() for node in ast.walk(expression.tree)):
        names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
        columns = [part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in DAY_FUNCTIONS:
            yield from ((name, "", "day") for name in names)
        elif isinstance(node, (ast.Compare, ast.Call)) and step.table and len(columns) == 1:
            yield from ((name, step.table, columns[0]) for name in names)


def values_at(spec: Spec, place: tuple[str, str], tables: Tables) -> list[Any]:
    """Return the values of a place in tables as they are."""
    table, column = place
    if not table:
        return list(DAYS)
    if column == "id":
        return list(tables[table])
    described = spec.tables[table].columns.get(column, {})
    keys: Mapping[str, Any] = tables.get(described.get("references", ""), {})
    return [*keys, *described.get("enum", ()), *(row.get(column) for row in tables[table].values())]


def json_text(value: Any) -> str:
    """Return a value as JSON, in the order of its keys."""
    return json.dumps(value, ensure_ascii=False)
